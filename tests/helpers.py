"""What tests share: paths, tables of input, commands run in this process, and what their runs left."""

import contextlib
import csv
import gzip
import io
import json
import os
import random
import resource
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from minionerec import plots
from minionerec.output import whole_file

ROOT = Path(__file__).resolve().parent.parent
# The files of checkpoints, by what they are, and what those in the middle of a run hold too.
CHECKPOINT = {"README.md", "minionerec.json", "tokenizer.json", "tokenizer_config.json"}
ADAPTER = CHECKPOINT | {"adapter_config.json", "adapter_model.safetensors"}
WHOLE = CHECKPOINT | {"config.json", "generation_config.json", "model.safetensors"}
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"}
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


def succeed(script: str, *extra: str, **flags: object) -> subprocess.CompletedProcess:
    """`run_command` of a command that must succeed."""
    result = run_command(script, *extra, **flags)
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def compile_templates_once() -> None:
    """PEFT writes a model card with every checkpoint, and jinja2 compiles its template anew, a tenth of a small run."""
    jinja2.Environment.compile = cache(jinja2.Environment.compile)


def curves_undrawn(history, path: str, panels, plot=plots.plot_curves) -> None:
    """Stands for plots.plot_curves: all but the drawing, which takes half a second, and more in a new process."""

    def save(figure, path: str) -> None:
        with whole_file(path) as partial:
            Path(partial).touch()
        plots._pyplot().close(figure)

    with mock.patch.object(plots, "_save", save):
        plot(history, path, panels)


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing a file fails after `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


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


def rl_flags(files, start, output, **more) -> dict:
    flags = {"model_path": start, "train_file": files["train"], "eval_file": files["valid"]}
    flags |= {"info_file": files["info"], "sid_index_path": files["index"], "item_meta_path": files["item"]}
    flags |= {"output_dir": output, "category": "bolts", "num_generations": 4, "train_batch_size": 16}
    flags |= {"test_beam": 10, "learning_rate": 1e-3, "eval_step": 0.5, "save_steps": 0.5, "reward_type": "ranking"}
    return {**flags, "tasks": "sid_history_to_sid", "beam_search": True, **more}


def evaluate_flags(files, result, **more) -> dict:
    flags = {"info_file": files["info"], "test_data_path": files["test"], "result_json_data": result, "num_beams": 20}
    return {**flags, **more}


def refused(script: str, message: str, **flags) -> None:
    result = run_command(script, **flags)
    assert result.returncode == 2, result.stderr[-2000:]
    lines = result.stderr.strip().splitlines()
    assert any(message in line for line in lines), result.stderr
    assert all(line.startswith(f"{script}: error: ") for line in lines), result.stderr


def strings(flags: dict) -> dict:
    """Flags as the command line gives them to a command."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in flags.items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*model.safetensors")))


def newest(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]))


def cut_short(run: Path) -> Path:
    """Takes from a finished run what came after its last checkpoint but one, which is returned."""
    shutil.rmtree(run / "final_checkpoint")
    shutil.rmtree(newest(run))
    return newest(run)


def logged(run: Path, key: str) -> list[float]:
    history = json.loads((run / "metrics.json").read_text())["history"]
    return [entry[key] for entry in history if key in entry]


def encoded(rows: list[dict], form: str, zipped: bool = False) -> bytes:
    """Rows as the bytes of a file."""
    if form == "parquet":
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), file)
        content = file.getvalue()
    elif form == "json":
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], delimiter="\t" if form == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    return gzip.compress(content) if zipped else content


def read_rows(path: Path | str) -> list[dict[str, str]]:
    """The rows of a CSV file, by column."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Writes a CSV file with the columns of the first row."""
    path.write_bytes(encoded(rows, "csv"))
    return path


def run_rl(files, start, output, **more) -> tuple[dict, subprocess.CompletedProcess]:
    """The metrics of a run of rl.py, and the run."""
    result = succeed("rl.py", **rl_flags(files, start, output, **more))
    return json.loads((output / "metrics.json").read_text()), result


def adapter_bytes(output: Path) -> bytes:
    return (output / "final_checkpoint" / "adapter_model.safetensors").read_bytes()


def line_of(docstring: str, name: str) -> str:
    """What follows a name at the start of a line of a docstring."""
    (line,) = [line.strip() for line in docstring.splitlines() if line.split()[:1] == [name]]
    return line.removeprefix(name)
