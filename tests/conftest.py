"""Fixtures that the tests of several files use, and how many random networks are drawn."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from torch.torch_version import TorchVersion

import memdfa_lab as ml

FOUND = [Phase.explicit, Phase.reuse, Phase.generate]  # the nightly run makes failures small, which takes minutes
COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("ci", max_examples=30, derandomize=True, database=None, phases=FOUND, **COMMON)
settings.register_profile("deep", max_examples=500, print_blob=True, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On releases of torch before 2.8, let those tests fail that differs_on_oldest.txt names."""
    if TorchVersion(torch.__version__) < "2.8":
        lines = Path(__file__).with_name("differs_on_oldest.txt").read_text(encoding="utf-8").splitlines()
        named = re.compile("|".join(line for line in lines if line and not line.startswith("#")))
        for item in items:
            if named.search(item.nodeid):
                item.add_marker(pytest.mark.xfail(strict=False, reason="differs_on_oldest.txt says why"))


@pytest.fixture(autouse=True)
def _ctrl_c_is_heard() -> Iterator[None]:
    """Hear Ctrl-C again after a command that was interrupted, which ignores it on its way out."""
    before = signal.getsignal(signal.SIGINT)
    yield
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _data_of_ones_own_are_out_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has data sets here gets the same results: tests that are for such data ask for them."""
    monkeypatch.delenv("MEMDFA_DATA", raising=False)


@pytest.fixture(scope="session")
def mnist5k():
    return ml.datasets.load("mnist5k")


@pytest.fixture(scope="session")
def data(mnist5k):
    """A few digits; the tests that train on them need no accuracy."""
    return mnist5k.subset(300, 100)
