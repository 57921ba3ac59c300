"""Five works related to the paper, each in a small implementation: optional reading, with notebook 09."""

from memdfa_lab.neighbours import band, bilateral, hbfp, oni, quantizable

__all__ = ["band", "bilateral", "hbfp", "oni", "quantizable"]
