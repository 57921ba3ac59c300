"""%%memory in a notebook's shell."""

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


def test_a_cell_that_fails_is_accounted_for_and_leaves_nothing_behind(shell):
    with capture_output():
        shell.run_cell("%%memory trace\nimport torch\na = torch.ones(1000)\nraise RuntimeError")
    assert shell.user_ns["trace"].peak_bytes == 4000
    assert memdfa_lab.core.phases.listeners == []
