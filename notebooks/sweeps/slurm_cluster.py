"""A sweep on a SLURM cluster, from its login node (pip install dask-jobqueue, too).

Written from the documentation of dask-jobqueue; it has not been run on a SLURM cluster.

python notebooks/sweeps/slurm_cluster.py
"""

from pathlib import Path

from dask_jobqueue import SLURMCluster

from memdfa_lab import sweep

if __name__ == "__main__":
    # A job has `processes` workers of cores / processes threads, each for one run at a time.
    with SLURMCluster(cores=8, processes=8, memory="16GB", walltime="04:00:00", queue="YOUR_QUEUE") as cluster:
        cluster.scale(jobs=4)
        sweep.run(Path(__file__).with_name("rules.yaml"), scheduler=cluster.scheduler_address)
