"""One command at a time writes to a folder or a file."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, evaluate_flags, rl_flags, run_command, sft_flags, succeed

from minionerec import locks
from minionerec.errors import InputError, Problems
from minionerec.locks import hold, lock_of_folder, lock_of_new, releasing

HOLDER = """
import sys
from minionerec import locks
locks.hold("output_dir", sys.argv[2], getattr(locks, sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held():
    """`held(target, place)`: a process that writes there until the test ends."""
    holders = []

    def start(target: Path, place=lock_of_folder, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLDER, place.__name__, str(target)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        holders.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, **pipes))
        assert holders[-1].stdout.readline() == b"held\n"
        return holders[-1]

    yield start
    for holder in holders:
        holder.kill()
        holder.communicate()


def commands(files: dict[str, str], base: str, run: Path, out: Path) -> dict[str, tuple]:
    """Every command that writes: what it writes to, where its lock is, the flags."""
    csv = {"train_file": files["train"], "eval_file": files["valid"], "info_file": files["info"]}
    raw = {"interactions": files["train"], "items": files["train"], "category": "bolts", "title_column": "item_title"}
    raw |= {"time_column": "item_id", "min_interactions": 1, "codes": 8}
    start = run / "final_checkpoint"
    return {
        "sft.py": ("output_dir", lock_of_folder, sft_flags(files, base, out)),
        "rl.py": ("output_dir", lock_of_folder, rl_flags(files, start, out, use_lora=True)),
        "evaluate.py": ("result_json_data", lock_of_new, evaluate_flags(files, out, base_model=start)),
        "recommend.py": (
            *("output", lock_of_new),
            {"model": start, "info_file": files["info"], "histories": files["test"], "output": out},
        ),
        "merge_lora.py": ("output_dir", lock_of_new, {"adapter": start, "output_dir": out}),
        "train_sasrec.py": ("output_dir", lock_of_new, {**csv, "output_dir": out}),
        "make_base.py": ("output_dir", lock_of_folder, {"item_meta_path": files["item"], "output_dir": out}),
        "prepare_data.py": ("output_dir", lock_of_new, {**raw, "output_dir": out}),
    }


NAMES = ["sft.py", "rl.py", "evaluate.py", "recommend.py", "merge_lora.py"]
NAMES += ["train_sasrec.py", "make_base.py", "prepare_data.py"]


@pytest.mark.parametrize("script", NAMES)
def test_the_second_command_is_refused_before_torch_is_imported(
    files, base, sft_run, tmp_path, monkeypatch, held, script
):
    out = tmp_path / "out" / "it"
    flag, place, flags = commands(files, base, sft_run("lora"), out)[script]
    first = held(out, place)
    if place is lock_of_folder:  # the first run may have come this far
        (out / "checkpoint-5").mkdir()
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    monkeypatch.setitem(sys.modules, "torch", None)
    path = script if (ROOT / script).is_file() else f"scripts/{script}"
    result = run_command(path, **flags)
    said = f"--{flag} {out}: process {first.pid} writes there; wait until it ends, or name another one"
    assert (result.returncode, result.stderr) == (2, f"{script}: error: {said}\n")
    assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before


def test_a_killed_run_locks_nothing(files, base, tmp_path, held):
    out = tmp_path / "run"
    first = held(out)
    first.kill()
    first.wait()
    assert os.listdir(out) == [".lock"]
    succeed("sft.py", **sft_flags(files, base, out, use_lora=True, sample=4, resume_from_checkpoint=True))
    assert ".lock" not in os.listdir(out) and (out / "final_checkpoint").is_dir()


def test_nothing_is_left_of_a_lock(tmp_path):
    for place in (lock_of_folder, lock_of_new):
        with releasing():
            hold("output_dir", str(tmp_path / "a" / "b"), place)
            assert [path.name for path in tmp_path.rglob(".*")] == [os.path.basename(place(str(tmp_path / "a" / "b")))]
        assert not os.listdir(tmp_path)
    with pytest.raises(InputError, match=f"process {os.getpid()} writes there"), releasing():
        hold("output_dir", str(tmp_path / "a"), lock_of_folder)
        (tmp_path / "a" / "file").touch()
        hold("output_dir", f"{tmp_path}/b/../a/", lock_of_folder)  # another thread, by another name
    assert os.listdir(tmp_path / "a") == ["file"]


def test_the_processes_of_a_run_share_its_lock(tmp_path, monkeypatch, held):
    ours = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    first = held(tmp_path, RANK="0", **ours)
    for name, value in {**ours, "RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    problems = Problems()
    assert locks.check_free(problems, "output_dir", str(tmp_path), lock_of_folder) and not problems
    hold("output_dir", str(tmp_path), lock_of_folder)
    monkeypatch.setenv("MASTER_PORT", "29501")  # of another torchrun
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(InputError, match=f"process {first.pid} writes there"):
            hold("output_dir", str(tmp_path), lock_of_folder)
    assert not locks.check_free(problems, "output_dir", str(tmp_path), lock_of_folder)


def test_other_files_of_a_folder_are_free(tmp_path, held):
    """MiniOneRec's evaluate.sh ranks the parts of a file at the same time."""
    held(tmp_path / "0.json", lock_of_new)
    with releasing():
        hold("result_json_data", str(tmp_path / "1.json"), lock_of_new)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, capsys, number):
    def lockf(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "lockf", lockf)
    with releasing():
        hold("output_dir", str(tmp_path / "run"), lock_of_folder)
    said = f"warning: {tmp_path}/run: locks do not work there ({os.strerror(number)}); nothing stops a second command"
    assert capsys.readouterr().err.startswith(said)
    monkeypatch.setattr(locks, "fcntl", None)
    hold("output_dir", str(tmp_path / "run"), lock_of_folder)
    assert "locks do not work there" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["/proc", "/proc/x", "/dev/null/x"])
@pytest.mark.parametrize("place", [lock_of_folder, lock_of_new])
def test_a_folder_that_takes_no_files_is_refused(folder, place):
    """Before a model is loaded, also for the superuser, who may write anywhere as far as permissions go."""
    with pytest.raises(InputError, match=f"^--output_dir {folder}/run: cannot be written: "), releasing():
        hold("output_dir", f"{folder}/run", place)


def test_the_dry_run_locks_nothing(files, base, tmp_path, held):
    held(tmp_path / "run")
    succeed("sft.py", **sft_flags(files, base, tmp_path / "run", use_lora=True, dry_run=True))
