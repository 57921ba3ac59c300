"""%%memory: the tensor memory of a notebook cell over time. %%exercise: a cell with an answer and its checks."""

import ast
import traceback
from typing import Any

from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.display import SVG, display

from memdfa_lab.memory import Ledger
from memdfa_lab.memory.advice import advice
from memdfa_lab.widgets.pictures import sparkline


@magics_class
class MemoryMagic(Magics):
    """`%load_ext memdfa_lab` registers it."""

    @cell_magic
    def memory(self, line: str, cell: str) -> None:
        """Run the cell, then show the peak of the tensors it makes, by category, and a small timeline.

        For a plain training loop, a sentence says what the peak is made of, and what would lower it.
        `%%memory name` also leaves the Trace in that variable. A cell that fails is measured, too, and its error is
        raised. Raises ValueError if the name is not one, and for a cell with await.
        """
        shell: Any = self.shell
        name = line.strip()
        if name and not name.isidentifier():
            raise _in_a_line(ValueError(f"%%memory takes the name of one variable, such as trace, got {name!r}"))
        if shell.should_run_async(cell, transformed_cell=shell.transform_cell(cell)):
            raise _in_a_line(ValueError("%%memory cannot run a cell with await: move await to another cell"))
        with Ledger() as ledger:
            result = shell.run_cell(cell)  # it shows the traceback itself, if there is one
        trace = ledger.trace()
        if name:
            shell.user_ns[name] = trace
        display(trace)
        if advice(trace):
            print(advice(trace))
        display(SVG(sparkline(list(trace.totals), trace.peak_bytes)))
        problem = result.error_before_exec or result.error_in_exec
        if problem is not None:  # so that the cells after it do not run
            raise _in_a_line(problem)


@magics_class
class ExerciseMagic(Magics):
    """`%load_ext memdfa_lab` registers it."""

    @cell_magic
    def exercise(self, line: str, cell: str) -> None:
        """Run the cell: an answer, then asserts that check it. Print "Right.", or in one line what is not right yet.

        An answer ends at the line "# check"; while it has a `...`, nothing is run. An assert's message says what is
        wrong; any other error is printed with its line. The cells below can run in each case.
        """
        shell: Any = self.shell
        source = shell.transform_cell(cell)
        try:
            answer = ast.parse(source.partition("\n# check\n")[0])
            if any(isinstance(node, ast.Constant) and node.value is ... for node in ast.walk(answer)):
                print("Not yet: put your answer in place of each ...")
                return
            exec(compile(source, "<exercise>", "exec"), shell.user_ns)  # noqa: S102  # the student's own cell
        except AssertionError as problem:
            print(f"Not yet: {problem}")
        except Exception as problem:
            frames = [frame for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == "<exercise>"]
            line_number = problem.lineno if isinstance(problem, SyntaxError) else frames[-1].lineno
            print(f"Not yet: {type(problem).__name__} in line {(line_number or 0) + 1} of the cell: {problem}")
        else:
            print("Right.")


def _in_a_line(problem: Any) -> BaseException:
    """Return an error for which the notebook shows one line instead of a traceback."""
    problem._render_traceback_ = lambda: [f"{type(problem).__name__}: {problem}"]
    return problem
