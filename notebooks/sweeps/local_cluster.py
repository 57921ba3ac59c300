"""A sweep on the processes of this machine through Dask, for its dashboard (pip install bokeh, too).

python notebooks/sweeps/local_cluster.py
"""

from pathlib import Path

from distributed import LocalCluster

from memdfa_lab import sweep

if __name__ == "__main__":
    with LocalCluster(threads_per_worker=1, host="127.0.0.1") as cluster:
        sweep.run(Path(__file__).with_name("rules.yaml"), scheduler=cluster.scheduler_address)
