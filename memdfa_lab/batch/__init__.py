"""Notebooks and training runs by the dozen."""
