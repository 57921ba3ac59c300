"""The paper's comparison: a list of experiments (`plan`), their `runs`, tables of `memory`, and what follows: `tables`."""

from memdfa_lab.batch.paper import memory as memory
from memdfa_lab.batch.paper import plan as plan
from memdfa_lab.batch.paper import runs as runs
from memdfa_lab.batch.paper import tables as tables
