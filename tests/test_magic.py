"""%%memory and %%exercise in a notebook's shell."""

import re

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import memdfa_lab


@pytest.fixture
def shell():
    shell = InteractiveShell.instance()  # display() asks for the one there is
    shell.run_line_magic("load_ext", "memdfa_lab")
    yield shell
    shell.history_manager.end_session()
    InteractiveShell.clear_instance()


def test_a_cell_is_run_and_its_peak_shown(shell):
    with capture_output() as shown:
        shell.run_cell("%%memory trace\nimport torch\na = torch.ones(1000)\nb = a + a\ndel a")
    trace = shell.user_ns["trace"]
    assert (trace.peak_bytes, trace.end_bytes) == (8000, 4000)
    assert shell.user_ns["b"].sum() == 2000
    assert isinstance(shown.outputs[0].data["text/html"], str)
    assert "8,000 bytes" in shown.outputs[0].data["text/html"]
    assert shown.outputs[1].data["image/svg+xml"].startswith("<svg")


@pytest.mark.parametrize("error", ["RuntimeError", "KeyboardInterrupt"])
def test_a_cell_that_fails_is_accounted_for_and_fails(shell, error):
    with capture_output() as shown:
        result = shell.run_cell(f"%%memory trace\nimport torch\na = torch.ones(1000)\nraise {error}")
    assert type(result.error_in_exec).__name__ == error  # the cells after it do not run
    assert (shown.stdout + shown.stderr).count("Traceback") == 1
    assert shell.user_ns["trace"].peak_bytes == 4000
    assert memdfa_lab.core.phases.listeners == []


@pytest.mark.parametrize(
    ("cell", "message"),
    [("%%memory\nimport asyncio\nawait asyncio.sleep(0)\nb = 1", "await"), ("%%memory 3 x\nb = 1", "'3 x'")],
)
def test_what_cannot_be_run_is_refused_in_a_line(shell, cell, message):
    with capture_output() as shown:
        result = shell.run_cell(cell)
    assert message in str(result.error_in_exec)
    assert shown.stdout.strip() == f"ValueError: {result.error_in_exec}"
    assert "b" not in shell.user_ns


def test_other_magics_may_stand_above_and_below(shell):
    for cell in ("%%memory trace\n%%time\nb = 1", "%%time\n%%memory trace\nb = 1"):
        with capture_output():
            assert shell.run_cell(cell).success
        assert shell.user_ns.pop("b") == 1


PLAIN = """%%memory trace
import torch
net = torch.nn.Sequential(*[torch.nn.Sequential(torch.nn.Linear({0}, {0}), torch.nn.ReLU()) for _ in range(6)])
optimizer = torch.optim.{2}
loss = net(torch.ones({1}, {0})).sum()
loss.backward()
optimizer.step()
del loss"""
SGD, ADAM = "SGD(net.parameters())", "Adam(net.parameters(), {})"


@pytest.mark.parametrize(
    ("width", "batch", "optimizer", "said"),
    [
        (8, 900, SGD, ["activations", "MEM-DFA"]),
        (90, 2, SGD, ["gradients", "step_in_backward"]),
        (90, 2, ADAM.format("foreach=True"), ["temporaries of the optimizer", "fused=True"]),
        (90, 2, ADAM.format("fused=True"), ["stay"]),
    ],
)
def test_a_plain_loop_is_told_what_its_peak_is_made_of(shell, width, batch, optimizer, said):
    with capture_output() as shown:
        shell.run_cell(PLAIN.format(width, batch, optimizer))
    text = shown.stdout
    assert all(part in text for part in said), text
    assert ("fused=True" in text) == ("foreach" in optimizer)
    shares = [int(share) for share in re.findall(r"(\d+)% ", text)]
    assert 97 <= sum(shares) <= 103


def test_a_rules_step_has_its_table_and_no_sentence(shell):
    with capture_output() as shown:
        shell.run_cell(
            "import memdfa_lab as ml, torch\nrule = ml.BP(ml.models.mlp(8, [8], 3), torch.optim.SGD)\n"
            "x, y = torch.ones(4, 8), torch.zeros(4, dtype=torch.long)"
        )
        shell.run_cell("%%memory trace\nrule.step(x, y)")
    assert "The peak is" not in shown.stdout


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("answer = 3", "Right."),
        ("answer = 4", "Not yet: three sides"),
        ("answer = ...", "Not yet: put your answer in place of each ..."),
        ("answer = 1 / 0", "Not yet: ZeroDivisionError in line 2 of the cell: division by zero"),
        ("answer = 3 +", "Not yet: SyntaxError in line 2 of the cell: invalid syntax"),
        ("answer = int('x')", "Not yet: ValueError in line 2 of the cell: invalid literal for int() with base 10: 'x'"),
    ],
)
def test_an_exercise_says_in_a_line_whether_it_is_right(shell, answer, line):
    with capture_output() as shown:
        result = shell.run_cell(f"%%exercise\n{answer}\n# check\nassert answer == 3, 'three sides'")
    assert result.success  # the cells after it run
    assert shown.stdout.startswith(line)
    assert shown.stdout.count("\n") == 1
    assert shell.user_ns.pop("answer", 3) in (3, 4)
