"""What the package imports is declared in pyproject.toml, the lock satisfies it, and a wheel has what it needs."""

import ast
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version

import pytest
from helpers import ROOT
from packaging.requirements import Requirement

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = [Requirement(line) for line in (*PROJECT["dependencies"], *(line for of in EXTRAS.values() for line in of))]


def imported() -> set[str]:
    """The top-level names that the package and lora_utils import from elsewhere."""
    names = set()
    for file in (*(ROOT / "minionerec").rglob("*.py"), ROOT / "lora_utils.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - {"minionerec", "lora_utils"}


def test_every_import_is_declared():
    declared = {requirement.name.lower().replace("_", "-") for requirement in DECLARED}
    providers = packages_distributions()
    lacking = [
        name
        for name in imported()
        if not {of.lower().replace("_", "-") for of in providers.get(name, [name])} & declared
    ]
    assert not lacking


@pytest.mark.parametrize(
    "line", [line for line in (ROOT / "requirements.txt").read_text().splitlines() if "==" in line]
)
def test_the_lock_is_inside_the_ranges(line):
    pinned = Requirement(line)
    ranges = [requirement for requirement in DECLARED if requirement.name == pinned.name]
    assert ranges and all(requirement.specifier.contains(version(pinned.name)) for requirement in ranges)


@pytest.mark.slow
def test_an_installed_package_is_complete(tmp_path):
    """Built without a network, imported from outside the checkout."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "minionerec", source / "minionerec", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "lora_utils.py"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    built = subprocess.run([*command, str(tmp_path / "site"), str(source)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    code = (
        "import minionerec; from minionerec import InputError, Ranker, RLFlags, RunError, SFTFlags; import lora_utils; "
    )
    code += "print(minionerec.__file__); SFTFlags(use_lora=True), RLFlags(beta=0)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.startswith(str(tmp_path)), done.stderr[-2000:]
    packaged = {str(file.relative_to(ROOT)) for file in (ROOT / "minionerec").rglob("*.*") if file.suffix != ".pyc"}
    installed = {str(file.relative_to(tmp_path / "site")) for file in (tmp_path / "site" / "minionerec").rglob("*.*")}
    assert {name for name in packaged if "__pycache__" not in name} <= installed
