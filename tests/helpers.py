"""What tests share: paths, tables of input, and commands run in this process or in a new one."""

import contextlib
import csv
import io
import os
import random
import runpy
import subprocess
import sys
import traceback
from pathlib import Path
from unittest import mock

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid"]


def write_csv(path: Path, rows: list[list[int]], index: dict, items: dict) -> None:
    """Writes interactions: each row is a list of item numbers, the last one the target."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for number, (*past, target) in enumerate(rows):
            titles = [items[str(i)]["title"] for i in past]
            sids = ["".join(index[str(i)]) for i in past]
            target_sid = "".join(index[str(target)])
            writer.writerow([f"u{number}", titles, items[str(target)]["title"], past, target, sids, target_sid])


def flag_words(flags: dict[str, object]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def run_command(script: str, *extra: str, **flags: object) -> subprocess.CompletedProcess:
    """Runs a command line of the project in this process, as a new one would run it, and captures what it prints."""
    argv = [script, *flag_words(flags), *extra]
    output, errors = io.StringIO(), io.StringIO()
    _forget_earlier_runs()
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except Exception:
            traceback.print_exc()
            code = 1
    _forget_earlier_runs()
    return subprocess.CompletedProcess(argv, code, output.getvalue(), errors.getvalue())


def run_in_new_process(script: str, *extra: str, **flags: object) -> subprocess.CompletedProcess:
    """Runs a command line in a process of its own, where that is what a test is about."""
    argv = [sys.executable, str(ROOT / script), *flag_words(flags), *extra]
    return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, timeout=300)


def _forget_earlier_runs() -> None:
    """The libraries remember devices, engines and random state per process; a command starts without them."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    random.seed(0)
    np.random.seed(0)


def sft_flags(files: dict[str, str], base: str, output_dir: object, **more: object) -> dict[str, object]:
    """The flags of a small sft.py run."""
    flags = {
        "base_model": base,
        "train_file": files["train"],
        "eval_file": files["valid"],
        "sid_index_path": files["index"],
        "item_meta_path": files["item"],
        "output_dir": output_dir,
        "category": "bolts",
        "batch_size": 16,
        "micro_batch_size": 8,
        "num_epochs": 1,
        "eval_step": 0.25,
    }
    return {**flags, **more}
