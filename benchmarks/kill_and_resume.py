"""Kills SFT and RL with SIGKILL at random times, resumes them, and compares the result with an uninterrupted run.

    python -m benchmarks.kill_and_resume --output_dir out/kills --kills 20

Every second kill waits until a checkpoint appears and happens while it is being written. After each kill, all
checkpoints that count as complete are loaded. Exits with 1 if a file is damaged or the final weights differ.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from typing import NoReturn

from benchmarks.fixtures import ROOT
from minionerec import cli
from minionerec.flags import Flags, above_zero, check_new_folder, command, flag

DEMO = os.path.join(ROOT, "examples", "demo")


@dataclass(frozen=True, kw_only=True)
class KillFlags(Flags):
    """Where the runs are, and how often they are killed."""

    output_dir: str = flag("", "folder for the runs; it must not exist.")
    kills: int = flag(
        20,
        "the least number of kills of each of the two commands; the first run is killed until it finishes.",
        above_zero,
    )
    seed: int = flag(0, "seed of the random times.")


@command(KillFlags)
def kill_and_resume(flags: KillFlags) -> None:
    """Runs the experiment on the bundled demo."""
    problems = flags.problems()
    check_new_folder(problems, flags.output_dir)
    problems.check()
    output_dir = flags.output_dir
    rng = random.Random(flags.seed)
    base, demo = os.path.join(output_dir, "base"), os.path.join(output_dir, "data")
    raw = ["--interactions", f"{DEMO}/purchases.csv", "--items", f"{DEMO}/items.csv", "--codes", "16"]
    _wait(_start("scripts/prepare_data.py", [*raw, "--output_dir", demo, "--category", "tools"]))
    size = ["--vocab_size", "512", "--hidden_size", "64", "--num_hidden_layers", "2", "--intermediate_size", "128"]
    meta = ["--item_meta_path", f"{demo}/index/tools.item.json"]
    _wait(_start("scripts/make_base.py", [*meta, "--output_dir", base, *size]))
    data = [*meta, "--train_file", f"{demo}/train/tools.csv", "--eval_file", f"{demo}/valid/tools.csv"]
    data += ["--category", "tools", "--sid_index_path", f"{demo}/index/tools.index.json"]
    data += ["--tasks", "sid_history_to_sid", "--use_lora", "True"]
    sft = ["--base_model", base, "--sample", "400", "--batch_size", "16", "--micro_batch_size", "16"]
    sft += ["--num_epochs", "2", "--eval_step", "0.1", "--learning_rate", "1e-3"]
    rl = ["--model_path", f"{output_dir}/sft/uninterrupted/final_checkpoint", "--info_file", f"{demo}/info/tools.txt"]
    rl += ["--beam_search", "False", "--train_batch_size", "256", "--sample_train", "True", "--learning_rate", "1e-3"]
    rl += ["--sync_ref_model", "True", "--test_during_training", "False", "--save_steps", "0.1"]
    for script, words in (("sft.py", [*data, *sft]), ("rl.py", [*data, *rl])):
        _experiment(script, words, os.path.join(output_dir, script.removesuffix(".py")), flags.kills, rng)


def _experiment(script: str, flags: list[str], folder: str, kills: int, rng: random.Random) -> None:
    """Kills and resumes runs of one command until it was killed often enough, and checks each finished run."""
    uninterrupted = os.path.join(folder, "uninterrupted")
    started = time.perf_counter()
    _wait(_start(script, [*flags, "--output_dir", uninterrupted]))
    seconds = time.perf_counter() - started
    killed = saved = rounds = checked = 0
    while killed < kills:
        rounds += 1
        output = os.path.join(folder, f"killed_{rounds}")
        finished = False
        while not finished and (killed < kills or rounds == 1):
            before = _steps(output)
            process = _start(script, [*flags, "--output_dir", output, "--resume_from_checkpoint", "True"])
            finished = not _kill(process, output, killed % 2 == 1, rng.uniform(0.2, 1.1) * seconds, rng)
            if not finished:
                killed += 1
                checked += _check(output, before)
                saved += _steps(output) > before
                print(f"{script}: kill {killed} at step {_steps(output)}", flush=True)
        if not finished:
            _wait(_start(script, [*flags, "--output_dir", output, "--resume_from_checkpoint", "True"]))
        if _weights(output) != _weights(uninterrupted):
            sys.exit(f"{script}: the weights of {output} differ from those of {uninterrupted}")
        shutil.rmtree(output)
    print(
        f"{script}: {killed} kills, {rounds} finished runs, all with the weights of the uninterrupted run; {saved} "
        f"kills came after a new checkpoint; {checked} complete checkpoints loaded"
    )


def _start(script: str, flags: list[str]) -> subprocess.Popen:
    argv = [sys.executable, os.path.join(ROOT, script), *flags]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _wait(process: subprocess.Popen) -> None:
    """Waits for a process, and exits if it failed."""
    _, errors = process.communicate()
    if process.returncode:
        _exit_with(process, errors)


def _exit_with(process: subprocess.Popen, errors: str) -> NoReturn:
    words = process.args if isinstance(process.args, list) else [process.args]
    sys.exit(f"{' '.join(map(str, words))} failed:\n{errors[-2000:]}")


def _kill(process: subprocess.Popen, output: str, while_saving: bool, delay: float, rng: random.Random) -> bool:
    """Kills the process after `delay` seconds or, with `while_saving`, when it starts to write a checkpoint. False if
    it finished before that."""
    before = set(os.listdir(output)) if os.path.isdir(output) else set()
    deadline = time.perf_counter() + (600 if while_saving else delay)
    while process.poll() is None and time.perf_counter() < deadline:
        if while_saving and os.path.isdir(output):
            new = set(os.listdir(output)) - before
            if any(name.startswith(("checkpoint-", "final_checkpoint")) for name in new):
                time.sleep(rng.uniform(0, 0.05))
                break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode not in (0, -signal.SIGKILL):
        _exit_with(process, errors)
    return process.returncode != 0


def _complete(output: str) -> list[str]:
    """The complete checkpoints of a run."""
    from minionerec.training.resume import is_complete

    names = os.listdir(output) if os.path.isdir(output) else []
    folders = [os.path.join(output, name) for name in names if name.startswith("checkpoint-")]
    return [folder for folder in folders if is_complete(folder)]


def _steps(output: str) -> int:
    """The step of the newest complete checkpoint, 0 for none."""
    return max([int(folder.rsplit("-", 1)[1]) for folder in _complete(output)], default=0)


def _check(output: str, before: int) -> int:
    """Loads every file of the newest and the final checkpoint, and exits if one is damaged, or if the newest is older
    than step `before`. Returns the number of complete checkpoints."""
    from safetensors.torch import load_file

    folders = _complete(output)
    if _steps(output) < before:
        sys.exit(f"{output}: the checkpoint of step {before} is gone")
    final = os.path.join(output, "final_checkpoint")
    # Only the newest counts: an older one may have been killed while it was being removed.
    for folder in [folder for folder in folders if folder.endswith(f"-{_steps(output)}")] + [final]:
        for name in os.listdir(folder) if os.path.isdir(folder) else []:
            path = os.path.join(folder, name)
            if name.endswith(".safetensors"):
                load_file(path)
            elif name.endswith((".pt", ".pth")):
                damaged = zipfile.ZipFile(path).testzip()  # every member against its checksum
                if damaged:
                    sys.exit(f"{path}: {damaged} is damaged")
    if os.path.isdir(final) and "adapter_model.safetensors" not in os.listdir(final):
        sys.exit(f"{final} exists without its weights")
    return len(folders)


def _weights(output: str) -> bytes:
    with open(os.path.join(output, "final_checkpoint", "adapter_model.safetensors"), "rb") as file:
        return file.read()


if __name__ == "__main__":
    cli.run(kill_and_resume)
