"""The paper's comparison: `plan` lists experiments, `runs` runs them, `memory` predicts, `tables` has results."""

from memdfa_lab.batch.paper import memory as memory
from memdfa_lab.batch.paper import plan as plan
from memdfa_lab.batch.paper import runs as runs
from memdfa_lab.batch.paper import tables as tables
