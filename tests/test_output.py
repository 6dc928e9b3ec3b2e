"""A full disk ends every command in one line, and leaves nothing half written. Where a file system of a few kilobytes
cannot be mounted, a limit on the size of files stands for it."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from helpers import ROOT, evaluate_flags, largest_file, newest, rl_flags, run_command, sft_flags
from safetensors.torch import save_file
from transformers import AutoTokenizer

from minionerec.errors import Problems, RunError
from minionerec.flags import LONGEST_NAME, check_new_file, check_new_folder
from minionerec.output import whole_file, whole_folder, writing
from minionerec.plots import SFT_PANELS, plot_curves
from minionerec.prepare.cleaning import INTERACTION, Spool
from minionerec.prepare.writing import save_array
from minionerec.saving import write_json


@pytest.fixture
def disk(tmp_path):
    """`with disk(kilobytes) as folder`: a folder with little room."""

    @contextlib.contextmanager
    def small(kilobytes: int) -> Iterator[Path]:
        folder = tmp_path / "disk"
        folder.mkdir(exist_ok=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        with contextlib.suppress(OSError):
            if os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0:
                try:
                    yield folder
                finally:
                    subprocess.run(["umount", "-l", str(folder)], check=True)
                return
        with largest_file(kilobytes * 256):
            yield folder

    return small


def left_in(folder: Path) -> list[str]:
    """What a failed command must not leave: folders of checkpoints or results, and parts of files."""
    names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*"))]
    return [name for name in names if not name.startswith("run/tensorboard")]


def assert_one_line(result: subprocess.CompletedProcess, start: str) -> None:
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    (line,) = (line for line in result.stderr.splitlines() if "error: " in line)
    assert line.startswith(start), line


BIG = np.zeros(100_000, np.float32)


def _fill(spool: Spool) -> None:
    """In pieces so small that C's stdio, by which `tofile` writes, keeps each until the file is closed."""
    for _ in range(20):
        spool.append(np.zeros(100, int), np.zeros(100, INTERACTION))


WRITERS = {
    "json": lambda path: write_json(path, list(range(50_000))),
    "safetensors": lambda path: save_file({"x": torch.from_numpy(BIG)}, path),
    "torch": lambda path: torch.save(torch.from_numpy(BIG), path),
    "torch, of many": lambda path: torch.save({i: torch.ones(1) for i in range(600)}, path),
    "figure": lambda path: plot_curves([{"step": i, "loss": i % 7} for i in range(300)], path, SFT_PANELS),
    "spool": lambda path: _fill(Spool(path, INTERACTION, 1)),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_writes_says_so_in_one_line(disk, writer):
    plt.close()
    with disk(16) as folder, pytest.raises(RunError) as raised, writing("it", "; make room"):
        WRITERS[writer](str(folder / "file"))
    (line,) = str(raised.value).splitlines()
    assert line.startswith("it cannot be written: ") and line.endswith("; make room")
    assert not list(folder.glob("*.partial"))


def test_a_tokenizer_that_cannot_be_written(disk, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    with disk(8) as folder, pytest.raises(RunError, match=r"^it cannot be written: .*\(os error \d+\)$"), writing("it"):
        tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("size mismatch"), Exception("no such token"), ValueError("inline_container")):
        with pytest.raises(type(error), match=str(error)), writing("it"):
            raise error


def test_files_and_folders_appear_whole_or_not_at_all(tmp_path):
    for whole in (whole_file, whole_folder):
        with contextlib.suppress(ZeroDivisionError), whole(str(tmp_path / "it")) as partial:
            os.mkdir(partial) if whole is whole_folder else Path(partial).touch()
            _ = 1 / 0
        assert not os.listdir(tmp_path)


def test_arrays_are_written_to_their_last_byte(disk, tmp_path):
    """numpy's own writing loses without an error what C's stdio holds at the end, here of the last 4 KB."""
    rows = np.random.default_rng(0).random((4095, 4), np.float32)
    with disk(64) as folder, pytest.raises(OSError):
        save_array(str(folder / "rows.npy"), rows)
    save_array(str(tmp_path / "rows.npy"), rows)
    np.save(tmp_path / "same.npy", rows)
    assert (tmp_path / "rows.npy").read_bytes() == (tmp_path / "same.npy").read_bytes()


SASREC = {"num_epochs": 1, "hidden_size": 16}


@pytest.mark.parametrize(
    ("script", "kilobytes"),
    [
        ("evaluate.py", 4),
        ("merge_lora.py", 100),
        ("train_sasrec.py", 28),
        ("make_base.py", 100),
        ("prepare_data.py", 36),
    ],
)
def test_a_command_that_makes_files_leaves_none(files, sft_run, disk, script, kilobytes):
    start = sft_run("lora") / "final_checkpoint"
    csv = {"train_file": files["train"], "eval_file": files["valid"], "info_file": files["info"]}
    raw = {"interactions": files["train"], "items": files["train"], "category": "bolts", "title_column": "item_title"}
    with disk(kilobytes) as folder:
        out = folder / "out"
        flags = {
            "evaluate.py": evaluate_flags(files, out, base_model=start),
            "merge_lora.py": {"adapter": start, "output_dir": out, "sample": 1},
            "train_sasrec.py": {**csv, **SASREC, "output_dir": out},
            "make_base.py": {"item_meta_path": files["item"], "output_dir": out},
            "prepare_data.py": {**raw, "time_column": "item_id", "min_interactions": 1, "codes": 8, "output_dir": out},
        }[script]
        result = run_command(script if (ROOT / script).is_file() else f"scripts/{script}", **flags)
        assert_one_line(result, f"{script}: error: {out} cannot be written: ")
        assert not left_in(folder)


@pytest.mark.parametrize("kilobytes", [60, 184])
def test_a_training_leaves_no_checkpoint_without_its_end(files, base, disk, kilobytes):
    with disk(kilobytes) as folder:
        flags = sft_flags(files, base, folder / "run", use_lora=True, lora_r=4, eval_step=0.5, report_to="tensorboard")
        result = run_command("sft.py", **flags)
        assert_one_line(result, "sft.py: error: the checkpoint of step 8 cannot be written: ")
        assert "nothing has been saved yet. Make room, then the same command" in result.stderr
        assert left_in(folder) in ([], ["run"])  # the log, which another thread writes, may have come in or not


def test_rl_keeps_its_start_and_no_half_checkpoint(files, sft_run, disk):
    with disk(300) as folder:
        start = sft_run("lora") / "final_checkpoint"
        flags = rl_flags(files, start, folder / "run", use_lora=True, average_weights=True, sync_ref_model=True)
        result = run_command("rl.py", **flags)
        assert_one_line(result, "rl.py: error: the checkpoint of step ")
        assert "Make room, then the same command with --resume_from_checkpoint True starts anew" in result.stderr
        assert [path.name for path in (folder / "run").iterdir()] in (["checkpoint-0"], [])


def test_the_log_of_a_tracker(files, base, disk, tmp_path, monkeypatch):
    with disk(4) as folder:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "log"))
        flags = sft_flags(files, base, tmp_path / "run", use_lora=True, report_to="tensorboard", num_epochs=4)
        result = run_command("sft.py", **flags)
    assert_one_line(result, "sft.py: error: the run cannot write its log: ")


def test_the_cache_of_examples(files, base, disk, tmp_path, monkeypatch):
    with disk(16) as folder:
        monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        result = run_command("sft.py", **sft_flags(files, base, tmp_path / "run", use_lora=True))
        assert_one_line(
            result, f"sft.py: error: {folder}/cache/minionerec (tokenized examples; HF_DATASETS_CACHE names "
        )
        assert not list((folder / "cache" / "minionerec").iterdir())
    assert not (tmp_path / "run").exists()


def test_what_comes_after_the_last_checkpoint_can_be_made_again(files, base, tmp_path, monkeypatch):
    """final_checkpoint, metrics.json and curves.png."""
    flags = sft_flags(files, base, tmp_path / "run", use_lora=True, sample=16)
    done = run_command("sft.py", **flags)
    assert done.returncode == 0
    for name in ("final_checkpoint", "metrics.json", "curves.png"):
        target = f"{tmp_path / 'run' / name}"

        def full(source, path, target=target, replace=os.replace):
            if os.fspath(path) == target:
                raise OSError(28, "No space left on device")
            return replace(source, path)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", full)
            result = run_command("sft.py", **flags, resume_from_checkpoint=True)
        assert_one_line(
            result, f"sft.py: error: {target} cannot be written: [Errno 28] No space left on device; make room"
        )
        assert newest(tmp_path / "run") and not list((tmp_path / "run").glob("*.partial"))


def test_standard_output_on_a_full_disk():
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "sft.py", "--help"], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"sft.py: error: cannot write: [Errno 28] No space left on device\n"


def test_names_that_no_file_system_takes(tmp_path):
    problems, long = Problems(), "x" * 250
    check_new_file(problems, "output", str(tmp_path / long), "the rankings")
    check_new_folder(problems, str(tmp_path / long / "run"))
    check_new_folder(problems, str(tmp_path / "a" / ("b/" * 3000)))
    assert [problem.split(": ")[1] for problem in problems] == [
        "is too long for a file system; give a shorter path"
    ] * 3
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("ending", [".partial.json", ".metrics.json"])
def test_what_is_written_next_to_the_longest_name_fits(tmp_path, ending):
    """It is written last, after hours."""
    problems, path = Problems(), str(tmp_path / ("x" * LONGEST_NAME))
    check_new_file(problems, "output", path, "the rankings")
    check_new_file(problems, "output", f"{path}x", "the rankings")
    write_json(path + ending, {})
    assert len(problems) == 1 and os.path.exists(path + ending)
