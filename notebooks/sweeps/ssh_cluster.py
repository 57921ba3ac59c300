"""A sweep on machines that SSH reaches, with memdfa_lab installed and a disk in common (pip install asyncssh, too).

python notebooks/sweeps/ssh_cluster.py HOST [HOST ...]    # the first one gets the scheduler
"""

import sys
from pathlib import Path

from distributed import SSHCluster

from memdfa_lab import sweep

if __name__ == "__main__":
    workers = {"nthreads": 1, "n_workers": 4}  # on each machine: a run a worker
    with SSHCluster([sys.argv[1], *sys.argv[1:]], worker_options=workers) as cluster:
        sweep.run(Path(__file__).with_name("rules.yaml"), scheduler=cluster.scheduler_address)
