"""The paper's comparison: a list of experiments (`plan`), their `runs`, `memory` tables, and what all of it says."""

from memdfa_lab.batch.paper import memory as memory
from memdfa_lab.batch.paper import plan as plan
from memdfa_lab.batch.paper import runs as runs
from memdfa_lab.batch.paper import tables as tables
