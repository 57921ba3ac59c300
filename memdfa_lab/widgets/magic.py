"""%%memory: what a notebook cell holds in tensors while it runs, and when."""

from typing import Any

from IPython.core.magic import Magics, cell_magic, magics_class
from IPython.display import SVG, display

from memdfa_lab.memory import Ledger, Trace


@magics_class
class MemoryMagic(Magics):
    """`%load_ext memdfa_lab` registers it."""

    @cell_magic
    def memory(self, line: str, cell: str) -> None:
        """Run the cell, then show the peak of the tensors it made, by category, and a small timeline.

        `%%memory name` also leaves the Trace in that variable. The account is given for a cell that fails, too.
        """
        shell: Any = self.shell
        with Ledger() as ledger:
            shell.run_cell(cell)  # it shows the traceback itself, if there is one
        trace = ledger.trace()
        if line.strip():
            shell.user_ns[line.strip()] = trace
        display(trace)
        display(SVG(_sparkline(trace)))


def _sparkline(trace: Trace, width: int = 480, height: int = 60) -> str:
    """Return a picture of the bytes alive, event by event."""
    totals: list[Any] = [0, *trace.timeline["total_bytes"]]
    top = max(*totals, 1) if len(totals) > 1 else 1
    last = max(len(totals) - 1, 1)
    points = " ".join(f"{width * i / last:.1f},{height * (1 - total / top):.1f}" for i, total in enumerate(totals))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 4}" role="img">'
        f"<title>bytes alive over the cell, peak {trace.peak_bytes:,}</title>"
        f'<polyline points="0,{height} {points} {width},{height}" fill="#0072B233" stroke="#0072B2"/></svg>'
    )
