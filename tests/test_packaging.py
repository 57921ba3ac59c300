"""The files around the package agree with each other, and importing it stays cheap."""

import importlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from functools import partial
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


def test_lower_bounds_are_those_tested_and_a_raised_one_is_in_the_changelog():
    extras = PROJECT["optional-dependencies"]
    lines = [*PROJECT["dependencies"], *chain(*(extras[name] for name in extras if name not in ("test", "book")))]
    wanted = bounds([line for line in lines if not line.startswith(f"{PROJECT['name']}[")])
    oldest = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in oldest if not line.startswith("#"))
    assert pinned.keys() == wanted.keys()
    for name, version in pinned.items():
        least = wanted[name].removeprefix(">=")
        assert f"{version}.".startswith(f"{least}."), f"tests/oldest.txt has {name} {version}, and the bound is {least}"
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unsaid = [name + least for name, least in wanted.items() if not re.search(f"{name + least}[,. ]", notes)]
    assert not unsaid, "a lower bound was changed: say so in CHANGELOG.md"


def test_the_address_is_changed_in_one_line(tmp_path):
    for name in ("pyproject.toml", "CITATION.cff", "README.md", "CHANGELOG.md", ".ci", "notebooks"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    project = tmp_path / "pyproject.toml"
    old, new = PROJECT["urls"]["Repository"], "https://github.com/somebody/their.lab"
    project.write_text(project.read_text(encoding="utf-8").replace(f'"{old}"', f'"{new}"', 1), encoding="utf-8")
    subprocess.run([sys.executable, str(tmp_path / ".ci" / "address.py")], check=True, capture_output=True)
    files = [file for file in tmp_path.rglob("*") if file.suffix in {".toml", ".cff", ".md", ".ipynb"}]
    name = old.removeprefix("https://github.com/")
    assert [file.name for file in files if name in file.read_text(encoding="utf-8")] == []
    notebook = (tmp_path / "notebooks" / "01_memory_theory.ipynb").read_text(encoding="utf-8")
    assert {"github/somebody/their.lab/blob", "gh/somebody/their.lab/main"} <= set(
        re.findall(r"(?:github|gh)/somebody/their\.lab/\w+", notebook)
    )


LIGHT = {"torch", "numpy", "pandas", "tqdm", "sympy", "pydantic", "filelock"}
WITHOUT_EXTRAS = """
import sys
sys.modules.update(dict.fromkeys({missing}))
import torch
import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.core.checks import of_an_extra

model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3))
rule, batch = ml.MemDFA(model, torch.optim.SGD), (torch.ones(2, 8), torch.arange(2))
predicted = ml.memory.predict("memdfa", model, (2, 8), torch.optim.SGD)
assert ml.memory.measure(rule, *batch, warm_up=1).peak_bytes == predicted.peak_bytes
assert cli.main(["profile", "--network", "784-[8]x2-10", "--batch", "4"]) == 0
for ask in (lambda: ml.figures, lambda: ml.widgets, lambda: ml.sweep, lambda: ml.datasets.load("mnist5k")):
    try:
        ask()
    except ModuleNotFoundError as problem:
        print("refused:", problem)
print(cli.main(["explore"]), cli.main(["train"]))
try:
    with of_an_extra():
        import of_a_users_own
except ModuleNotFoundError as problem:
    assert str(problem) == "No module named 'of_a_users_own'"
"""


def test_without_the_extras_rules_and_profilers_run_and_the_rest_says_what_to_install():
    assert {Requirement(line).name for line in PROJECT["dependencies"]} == LIGHT
    extras = PROJECT["optional-dependencies"]
    names = {Requirement(line).name for name in ("notebooks", "sweep", "explore") for line in extras[name]}
    missing = sorted(({name.partition(".")[0] for name in names} | {"nbformat", "IPython"}) - {PROJECT["name"]})
    code = WITHOUT_EXTRAS.format(missing=missing)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    refused = [line for line in done.stdout.splitlines() if line.startswith("refused: ")]
    assert len(refused) == 4
    said = [*refused, *done.stderr.splitlines()]
    assert all(re.search(r" is not installed: pip install .memdfa_lab\[all\].$", line) for line in said), said
    assert done.stdout.splitlines()[-1] == "1 1"


def test_citation_changelog_and_command_are_of_this_version():
    citation = from_yaml((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    for work in citation["references"]:  # what the format demands of each
        assert {"type", "title", "authors"} <= work.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in work["authors"])
    notes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(memdfa_lab.__version__)}\]", notes, re.MULTILINE)
    assert (citation["version"], citation["license"]) == (memdfa_lab.__version__, PROJECT["license"])
    module, function = PROJECT["scripts"]["memdfa"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """Return the folder with the source archive, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_what_is_built_installs_into_a_fresh_environment_and_runs(dist, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    scripts = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin")
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    run = partial(subprocess.run, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)

    def ran(*command):
        done = run([str(scripts / command[0]), *command[1:]])
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    site = Path(ran("python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "of_the_tests.pth").write_text(sysconfig.get_path("purelib"))  # torch and all else; no editable install
    how = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    for kind in ("*.tar.gz", "*.whl"):
        ran("python", "-m", "pip", "install", "--force-reinstall", *how, str(next(dist.glob(kind))))
        assert memdfa_lab.__version__ in ran("memdfa", "--version")
    assert "memdfa" in ran("memdfa", "profile", "--network", "784-[8]x2-10", "--batch", "8")
    code = (
        "import memdfa_lab; from memdfa_lab.batch import notebooks; print(memdfa_lab.__file__, *notebooks.numbered())"
    )
    place, *found = ran("python", "-c", code).split()
    assert site in Path(place).parents
    assert len(found) == len(list((ROOT / "notebooks").glob("[0-9]*.ipynb")))


def test_the_wheel_made_from_the_sdist_has_the_modules_notebooks_and_tables(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.partition("/")[2] for name in sdist.getnames()}
    with zipfile.ZipFile(next(dist.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())

    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "memdfa_lab").rglob("*") if path.is_file()}
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    tables = {path.name for path in (ROOT / "reports" / "paper").glob("*.csv")}
    assert {name for name in in_wheel if name.endswith(".py")} == {name for name in package if name.endswith(".py")}
    assert {name for name in package if name.endswith((".csv", ".toml", "py.typed"))} <= in_wheel
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
    assert lines.index("make test") < lines.index("make test-slow") < lines.index("make dist")


def test_a_container_and_binder_install_what_the_book_says():
    about = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    running = (ROOT / "notebooks" / "book" / "running.md").read_text(encoding="utf-8")
    assert f"`{about['postCreateCommand']}`" in running
    python = re.fullmatch(r"mcr\.microsoft\.com/devcontainers/python:3\.(\d+)", about["image"])
    assert int(python[1]) >= int(PROJECT["requires-python"].removeprefix(">=3."))
    # Binder takes these in place of environment.yml, which is tested above.
    others = ("binder", ".binder", "Dockerfile", "requirements.txt", "runtime.txt", "postBuild", "apt.txt")
    assert not [name for name in others if (ROOT / name).exists()]
    for notebook in (ROOT / "notebooks").glob("[0-9]*.ipynb"):
        assert "https://mybinder.org/v2/gh/" in notebook.read_text(encoding="utf-8")


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
    for target in ("notebooks", "student", "test-notebooks"):
        assert " notebooks/01_memory_theory.ipynb" in make("--dry-run", target, "PY=python").stdout


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
