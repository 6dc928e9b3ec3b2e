"""The floors of the package hold: no floor imports a higher one, and the package imports no file outside itself. Tests
stand in folders like its rooms, and are found by the name of their module."""

import ast
import re
from pathlib import Path

import pytest
from helpers import ROOT

# From the lowest to the highest: the rooms (folders) and files of minionerec/, and the files next to it.
FLOORS = [
    [
        *("minionerec.cards", "minionerec.errors", "minionerec.locks", "minionerec.metrics", "minionerec.output"),
        "minionerec.plots",
        *("minionerec.process_memory", "minionerec.statistics", "minionerec.version", "minionerec.world"),
    ],
    ["minionerec.cli", "minionerec.data", "minionerec.flags"],
    ["minionerec.sasrec", "minionerec.sasrec_files"],
    [
        *("minionerec.checkpoint", "minionerec.model_card", "minionerec.saving"),
        *("minionerec.soft_targets", "minionerec.validation"),
    ],
    ["minionerec.model"],
    ["minionerec.decoding", "minionerec.prepare"],
    ["minionerec.serving"],
    ["minionerec.blending", "minionerec.ranking"],
    ["minionerec.training"],
    ["minionerec.dryrun", "lora_utils"],
    ["evaluate", "merge_lora", "minionerec", "recommend", "rl", "sft"],  # minionerec: the door, for other code
]
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}
NEIGHBOURS = {"minionerec.decoding", "minionerec.prepare"}  # on one floor, without a door between them
FILES = [file.relative_to(ROOT) for file in sorted([*ROOT.glob("*.py"), *(ROOT / "minionerec").rglob("*.py")])]
OUTSIDE = {file.stem for folder in (".", "benchmarks", "scripts", "tests") for file in (ROOT / folder).glob("*.py")}
OUTSIDE |= {"benchmarks", "scripts", "tests"}


def room_of(name: str) -> str:
    """`minionerec.data` for `minionerec.data.files.read_info`; else the module at the top."""
    top, *rest = name.split(".")
    if top == "minionerec" and rest:
        path = ROOT / top / rest[0]
        return f"{top}.{rest[0]}" if path.is_dir() or path.with_suffix(".py").is_file() else top
    return top


def imports(file: Path) -> set[str]:
    """The full names of what a file imports, in its functions too."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"line {node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=str)
def test_no_floor_imports_a_higher_one(file):
    room = room_of(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    assert room in FLOOR_OF, "it needs a place in FLOORS"
    others = {name: room_of(name) for name in imports(file)}
    higher = {name for name, other in others.items() if FLOOR_OF.get(other, 0) > FLOOR_OF[room]}
    assert not higher
    assert not {name for name, other in others.items() if {room, other} == NEIGHBOURS}
    if room.startswith("minionerec"):
        assert not {name for name, other in others.items() if other in OUTSIDE}  # the package and libraries only


def test_test_files_do_not_import_each_other():
    """What they share is in files of tests/ without tests, and in the conftest.py of a folder."""
    for file in (ROOT / "tests").rglob("*.py"):
        assert not {name for name in imports(file) if name.split(".")[0].startswith("test_")}, file


# Modules without a test file of their name, and where they are tested.
ELSEWHERE = {
    "flags/rl.py": "commands/test_rl.py",  # fields alone: the command checks them
    "flags/sft.py": "commands/test_bad_input.py",  # fields alone: the command checks them
    "version.py": "test_checkpoint.py",  # a name alone: records have it
}


def test_the_tests_of_a_module_are_found_by_its_name():
    """tests/serving/test_worker.py tests minionerec/serving/worker.py."""
    package, tests = ROOT / "minionerec", ROOT / "tests"
    modules = [file.relative_to(package) for file in package.rglob("*.py") if file.stem != "__init__"]
    without = {str(file) for file in modules if not (tests / file.with_name(f"test_{file.name}")).is_file()}
    assert without == ELSEWHERE.keys()
    assert not {place for place in ELSEWHERE.values() if not (tests / place).is_file()}


def test_few_lines_are_typed_by_any():
    """Real types tell a reader and a checker more."""
    lines = [line for file in FILES for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    assert sum(bool(re.search(r"\bAny\b", line)) for line in lines) < 30
