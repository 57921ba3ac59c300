"""Fixtures that the tests of several files use."""

import pytest

import memdfa_lab as ml


@pytest.fixture(scope="session")
def mnist5k():
    return ml.datasets.load("mnist5k")


@pytest.fixture(scope="session")
def data(mnist5k):
    """A few digits; the tests that train on them need no accuracy."""
    return mnist5k.subset(300, 100)
