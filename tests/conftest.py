"""Fixtures that the tests of several files use, and how many random networks are drawn."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

import memdfa_lab as ml

FOUND = [Phase.explicit, Phase.reuse, Phase.generate]  # the nightly run makes failures small, which takes minutes
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=30, derandomize=True, database=None, phases=FOUND, **COMMON)
settings.register_profile("deep", max_examples=500, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Hear Ctrl-C again after a command that was interrupted, which ignores it on its way out."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def mnist5k():
    return ml.datasets.load("mnist5k")


@pytest.fixture(scope="session")
def data(mnist5k):
    """A few digits; the tests that train on them need no accuracy."""
    return mnist5k.subset(300, 100)
