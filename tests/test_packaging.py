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

# What `import memdfa_lab` leaves to its first use: plots, tables, notebooks, data sets.
HEAVY = {
    "matplotlib", "seaborn", "torchvision", "IPython", "jupyter", "jupyterlab", "papermill",
    "ipywidgets", "ipykernel", "nbclient", "sympy", "mlxtend", "sklearn", "scipy",
}  # fmt: skip

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def bounds(requirements: list[str]) -> dict[str, str]:
    """Return {name: specifier}, refusing anything that is not one plain lower bound."""
    parsed = [Requirement(line) for line in requirements]
    for requirement in parsed:
        assert [spec.operator for spec in requirement.specifier] == [">="], f"not a lower bound: {requirement}"
    return {requirement.name: str(requirement.specifier) for requirement in parsed}


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run make as from a fresh shell: nothing handed down by a make that runs these tests."""
    inherited = {
        "MAKEFLAGS",
        "MAKELEVEL",
        "MFLAGS",
        "MAKEOVERRIDES",
        "PY",
        "PYTHON",
        "VENV",
        "ARGS",
        "WORKERS",
    }
    env = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


# environment.yml, CITATION.cff, pyproject.toml


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
    assert environment["name"] == PROJECT["name"]
    assert environment["channels"] == ["conda-forge"]
    assert pip == [{"pip": [*by_pip, "-e ."]}]
    assert "pip" in environment["dependencies"]


def test_citation_is_complete_and_of_this_version():
    citation = from_yaml((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["version"] == memdfa_lab.__version__
    assert citation["license"] == PROJECT["license"]
    assert all({"type", "title", "authors"} <= reference.keys() for reference in citation["references"])
    first_authors = [reference["authors"][0]["family-names"] for reference in citation["references"]]
    assert first_authors == ["Chu", "Nøkland", "Lillicrap"]


def test_console_script_can_be_called():
    module, function = PROJECT["scripts"]["memdfa"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_wheel_made_from_the_sdist_carries_the_notebooks(tmp_path):
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr

    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert notebooks
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as sdist:
        top = f"memdfa_lab-{memdfa_lab.__version__}"
        assert {f"{top}/notebooks/{name}" for name in notebooks} <= set(sdist.getnames())
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    assert {name for name in names if name.endswith(".ipynb")} == {
        f"memdfa_lab/_notebooks/{name}" for name in notebooks
    }
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "memdfa_lab").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules
    assert "memdfa_lab/lab/networks.csv" in names
    tables = {f"memdfa_lab/reports/paper/{path.name}" for path in (ROOT / "reports" / "paper").glob("*.csv")}
    assert {
        "memdfa_lab/batch/paper/plan.toml",
        "memdfa_lab/batch/paper/published.csv",
        *tables,
    } <= names


# import


def modules_added(statement: str) -> set[str]:
    """Return the top-level modules that `statement` loads beyond `import torch`, in a fresh interpreter."""
    program = f"import sys, torch; before = set(sys.modules); {statement}; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_import_loads_no_plotting_notebook_or_dataset_library():
    added = modules_added("import memdfa_lab")
    assert "memdfa_lab" in added
    assert added & HEAVY == set()


def test_import_probe_would_notice():
    assert "seaborn" in modules_added("import seaborn") & HEAVY


# make and CI


def test_ci_runs_all_tests():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = script.read_text(encoding="utf-8").splitlines()
    assert "set -euo pipefail" in lines
    assert lines.index("make test") < lines.index("make test-slow")


@needs_make
def test_make_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    public = phony.group(1).split()
    assert {"help", "env", "reproduce", "test", "check", "lab", "clean"} <= set(public)
    done = make("help")
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^  make (\S+) ", done.stdout, flags=re.MULTILINE) == public
    assert make().stdout == done.stdout, "help is what a bare make shows"


@needs_make
def test_make_uses_the_named_python_instead_of_an_environment():
    done = make("--dry-run", "reproduce", "PY=python", "ARGS=-p epochs 1")
    assert done.stdout.splitlines() == ["memdfa reproduce -p epochs 1"]


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

    def env() -> tuple[subprocess.CompletedProcess, list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        return make("env", f"PYTHON={python}", cwd=tmp_path), log.read_text().split()

    (tmp_path / "too_old").touch()
    done, log = env()
    assert done.returncode != 0
    assert "memdfa_lab needs Python 3.11 or newer" in done.stderr
    assert log == []
    (tmp_path / "too_old").unlink()

    (tmp_path / "no_network").touch()
    done, log = env()
    assert done.returncode != 0
    assert log == ["venv", "install"]
    (tmp_path / "no_network").unlink()

    assert env()[1] == ["install"], "the environment is kept, the install is repeated"
    assert env()[1] == [], "nothing to do"
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert env()[1] == ["install"], "pyproject.toml changed"
