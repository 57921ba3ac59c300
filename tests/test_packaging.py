"""The files around the package agree with each other, and importing it stays cheap."""

import importlib
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import memdfa_lab
from memdfa_lab.batch.sweep_file import from_yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONDA_NAMES = {"torch": "pytorch", "build": "python-build"}  # where conda-forge's name is not PyPI's
BY_PIP = {"playwright"}  # under conda, too

# What `import memdfa_lab` leaves to its first use: plots, notebooks, data sets.
HEAVY = {"matplotlib", "seaborn", "torchvision", "IPython", "jupyter", "jupyterlab", "papermill", "ipywidgets"}
HEAVY |= {"ipykernel", "nbclient", "nbformat", "nbconvert", "sympy", "mlxtend", "sklearn", "scipy"}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def bounds(requirements):
    """Return {name: specifier}, refusing anything that is not one plain lower bound."""
    parsed = [Requirement(line) for line in requirements]
    for requirement in parsed:
        assert [spec.operator for spec in requirement.specifier] == [">="], f"not a lower bound: {requirement}"
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


def make(*arguments, cwd=ROOT):
    """Run make as from a fresh shell: nothing is handed down by a make that runs these tests."""
    of_make = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES", "PY", "PYTHON", "VENV", "ARGS", "WORKERS"}
    env = {name: value for name, value in os.environ.items() if name not in of_make}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_environment_yml_has_the_packages_and_bounds_of_pyproject():
    environment = from_yaml((ROOT / "environment.yml").read_text(encoding="utf-8"))
    conda = [line for line in environment["dependencies"] if isinstance(line, str) and line != "pip"]
    pip = [line for line in environment["dependencies"] if isinstance(line, dict)]

    lines = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    wanted = bounds([line for line in lines if not line.startswith(f"{PROJECT['name']}[")])  # an extra with an extra
    by_pip = [name + wanted.pop(name) for name in sorted(BY_PIP)]
    wanted = {CONDA_NAMES.get(name, name): spec for name, spec in wanted.items()}
    wanted["python"] = PROJECT["requires-python"]

    assert bounds(conda) == wanted
    assert len(conda) == len(wanted), "a package is listed twice"
    assert pip == [{"pip": [*by_pip, "-e ."]}]


def test_citation_and_command_are_of_this_version():
    citation = from_yaml((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert (citation["version"], citation["license"]) == (memdfa_lab.__version__, PROJECT["license"])
    module, function = PROJECT["scripts"]["memdfa"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_wheel_made_from_the_sdist_has_the_modules_notebooks_and_tables(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())

    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "memdfa_lab").rglob("*") if path.is_file()}
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    tables = {path.name for path in (ROOT / "reports" / "paper").glob("*.csv")}
    assert {name for name in in_wheel if name.endswith(".py")} == {name for name in package if name.endswith(".py")}
    assert {name for name in package if name.endswith((".csv", ".toml"))} <= in_wheel
    assert {name for name in in_wheel if name.endswith(".ipynb")} == {f"memdfa_lab/_notebooks/{n}" for n in notebooks}
    assert {f"memdfa_lab/reports/paper/{name}" for name in tables} <= in_wheel
    assert {f"notebooks/{name}" for name in notebooks} <= in_sdist


def test_libraries_for_plots_notebooks_and_data_are_loaded_when_they_are_used():
    steps = ["import torch", "import memdfa_lab as ml", 'ml.datasets.load("mnist5k")', "ml.figures"]
    code = "\n".join(f"{step}; print(*{{name.partition('.')[0] for name in sys.modules}})" for step in steps)
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    torchs, imported, with_data, with_figures = (set(line.split()) for line in done.stdout.splitlines())
    assert (imported - torchs) & HEAVY == set()
    assert (with_data - imported) & HEAVY == {"mlxtend"}
    assert "matplotlib" in with_figures


def test_ci_runs_all_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert lines.index("make test") < lines.index("make test-slow")


@needs_make
def test_make_lists_every_target_and_uses_the_python_that_is_named():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    done = make("help")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  make (\S+) ", done.stdout, flags=re.MULTILINE) == targets[1].split()
    assert make().stdout == done.stdout, "help is what a bare make shows"
    done = make("--dry-run", "reproduce", "PY=python", "ARGS=-p epochs 1")
    assert done.stdout.splitlines() == ["memdfa reproduce -p epochs 1"]
    quick, slow = (make("--dry-run", target, "PY=python").stdout for target in ("test", "test-slow"))
    assert "-m 'not slow'" in quick
    assert "-m slow" in slow


FAKE_PYTHON = """#!/bin/sh
# Stands in for python: makes "environments" that hold itself, and logs what it is asked to do.
case "$*" in
  "-c "*) test ! -e too_old ;;
  "-m venv --clear "*) echo venv >> log; rm -rf "$4"; mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip --version") ;;
  "-m pip install "*) echo install >> log; test ! -e no_network ;;
esac
"""


@needs_make
@pytest.mark.skipif(os.name == "nt", reason="stands in for python with a shell script")
def test_make_env_is_made_once_and_an_interrupted_install_is_taken_up_again(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "fake-python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def env(fault=None):
        """Run make env, with a fault if it is named, and return whether it worked and what it asked for."""
        (tmp_path / "log").write_text("")
        if fault:
            (tmp_path / fault).touch()
        done = make("env", f"PYTHON={python}", cwd=tmp_path)
        (tmp_path / str(fault)).unlink(missing_ok=True)
        assert fault != "too_old" or "needs Python 3.11 or newer" in done.stderr
        return done.returncode == 0, (tmp_path / "log").read_text().split()

    assert env("too_old") == (False, [])
    assert env("no_network") == (False, ["venv", "install"])
    assert env() == (True, ["install"]), "the environment is kept, the install is repeated"
    assert env() == (True, []), "nothing to do"
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert env() == (True, ["install"]), "pyproject.toml changed"
