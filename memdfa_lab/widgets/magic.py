"""%%memory: what a notebook cell holds in tensors while it runs, and when."""

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
        `%%memory name` also leaves the Trace in that variable. A cell that fails is accounted for, too, and fails.
        Raises ValueError for what is not a name, and for a cell with await.
        """
        shell: Any = self.shell
        name = line.strip()
        if name and not name.isidentifier():
            raise _in_a_line(ValueError(f"%%memory takes the name of one variable, such as trace, got {name!r}"))
        if shell.should_run_async(cell, transformed_cell=shell.transform_cell(cell)):
            raise _in_a_line(ValueError("%%memory runs no cell with await: move what awaits to a cell of its own"))
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


def _in_a_line(problem: Any) -> BaseException:
    """Return a problem for which the notebook shows a line in place of a traceback."""
    problem._render_traceback_ = lambda: [f"{type(problem).__name__}: {problem}"]
    return problem
