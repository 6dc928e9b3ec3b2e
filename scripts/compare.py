"""Trains and compares the methods; scripts/compare.sh is the command, and its head says what it does.

A run is a folder in OUT, named after what it is. A finished one is kept, so the same command continues.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

# Learning rates to choose from, where the environment names none.
SFT_RATES = {"full": "1e-4 3e-4 1e-3", "lora": "3e-4 1e-3 3e-3", "qlora": "3e-4 1e-3 3e-3"}
RL_RATES = {"full": "1e-4", "lora": "5e-4", "qlora": "5e-4"}
METRICS = "result.metrics.json"  # of an evaluated run: the last file that evaluate.py writes
FIRST_SEED = 42  # of the runs that choose the rates
# What all runs in a folder must share.
SHARED = ["BASE_MODEL", "PRESET", "CATEGORY", "SFT_FLAGS", "TRY_SFT", "RL_FLAGS", "EVAL_FLAGS"]
SHARED += ["TRAIN_FILE", "RL_FILE", "EVAL_FILE", "TEST_FILE", "INFO_FILE", "INDEX_FILE", "ITEM_FILE"]
STAGE = ("bash", "-c", 'source scripts/stages.sh; "$@"', "compare.sh")  # then a function of stages.sh and its flags


def setting(name: str, default: str = "") -> str:
    """An environment variable; an empty one counts as none."""
    return os.environ.get(name) or default


def flags_in(name: str) -> list[str]:
    try:
        return shlex.split(setting(name))
    except ValueError:
        fail(f"{name}={setting(name)}: a quote in it is not closed")


def fail(problem: str) -> NoReturn:
    print(f"compare.sh: error: {problem}", file=sys.stderr)
    sys.exit(2)


def run(*command: str | Path, **environment: str) -> None:
    """Runs a command, and ends with its exit code if it fails."""
    done = subprocess.run([str(word) for word in command], env={**os.environ, **environment})
    if done.returncode:
        sys.exit(done.returncode)


def check_settings(out: Path) -> None:
    """Refuses settings that finished runs in the folder were not made with, and records those of the first time."""
    file, here = out / "settings.json", {name: setting(name) for name in SHARED}
    try:
        there = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else here
    except ValueError:
        fail(f"{file}: is damaged, so the settings of the runs there are not known; name another folder: OUT=...")
    changed = [name for name in SHARED if there.get(name) != here[name]]
    if changed:
        was = "; ".join(f"{name}={there.get(name)!r} and is {here[name]!r} now" for name in changed)
        fail(f"{out} holds runs with {was}; name another folder: OUT=..., or remove this one")
    if not file.is_file():
        out.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(here, indent=1), encoding="utf-8")
        partial.replace(file)


def check_rates(method: str) -> None:
    """Refuses learning rates that are not numbers, and several for RL without evaluations, which cannot choose one."""
    for stage, default in (("SFT", SFT_RATES), ("RL", RL_RATES)):
        name = f"{stage}_RATES_{method}"
        rates = setting(name, default[method]).split()
        for rate in rates:
            if not re.fullmatch(r"\d*\.?\d+(?:[eE][+-]?\d+)?", rate):
                fail(f"{name}={' '.join(rates)}: {rate} is no learning rate; separate them by spaces")
    if len(rates) > 1 and setting("RL_FILE") == setting("EVAL_FILE"):
        fail(
            f"{name}={' '.join(rates)}: RL learns the validation rows, so they choose no rate; name one, or RL_FILE=..."
        )
    if len(rates) > 1 and re.search(r"(?:^| )--test[_-]during[_-]training[= ](?i:false)", setting("RL_FLAGS")):
        fail(f"RL_FLAGS: without evaluations none of {', '.join(rates)} is the best rate; name one: {name}={rates[0]}")


def check_flags() -> None:
    """Refuses flags that tell the runs apart, or that leave nothing to compare."""
    own = {"seed": "SEEDS", "learning_rate": "SFT_RATES_lora and its like", "output_dir": "OUT", "dry_run": "sft.py"}
    own["result_json_data"] = "OUT"
    for name in ("SFT_FLAGS", "TRY_SFT", "RL_FLAGS", "EVAL_FLAGS"):
        for word in flags_in(name):
            flag = word.partition("=")[0].removeprefix("--").replace("-", "_")
            if word.startswith("--") and flag in own:
                fail(f"{name}: --{flag} would be that of all runs; use {own[flag]} instead")


class Method:
    """The runs of a method: full, lora or qlora."""

    def __init__(self, name: str, out: Path):
        self.name, self.folder = name, out / name

    def train(self, stage: str, folder: Path, rate: str, seed: int, flags: Sequence[str], start: Path | None) -> None:
        """Runs a stage, sft or rl, or resumes it, unless it is finished. `start` is the run that RL starts from."""
        if not (folder / "metrics.json").is_file():
            of_run = ("--output_dir", folder, "--learning_rate", rate, "--seed", str(seed))
            environment = {"MODEL_PATH": str(start / "final_checkpoint")} if start else {}
            run(*STAGE, stage, *of_run, "--resume_from_checkpoint", "True", *flags, METHOD=self.name, **environment)

    def choose(
        self,
        stage: str,
        name: str,
        rates: Sequence[str],
        best: Callable[..., str],
        flags: Sequence[str],
        start: Path | None = None,
    ) -> tuple[Path, str]:
        """Trains with every rate, and returns the run that is `best` (min or max) on the validation file, and its
        rate."""
        runs = {rate: self.folder / f"{name}_{rate}" for rate in rates}
        for rate, folder in runs.items():
            self.train(stage, folder, rate, FIRST_SEED, flags, start)
        rate = best(runs, key=lambda rate: best_eval(runs[rate]))
        print(f"{self.name} {name}: learning rate {rate}", flush=True)
        return runs[rate], rate

    def compare(self, seeds: int) -> list[tuple[str, Path]]:
        """Trains and evaluates SFT and RL with every seed; the runs by their names in the table."""
        sft_flags, rl_flags = flags_in("SFT_FLAGS"), flags_in("RL_FLAGS")

        # Choose the rate of SFT, in short runs first if there are flags for them, and then that of RL.
        rates = setting(f"SFT_RATES_{self.name}", SFT_RATES[self.name]).split()
        if short := flags_in("TRY_SFT"):
            rates = [self.choose("sft", "sft_try", rates, min, [*sft_flags, *short])[1]]
        sft, sft_rate = self.choose("sft", "sft", rates, min, sft_flags)
        rates = setting(f"RL_RATES_{self.name}", RL_RATES[self.name]).split()
        rl, rl_rate = self.choose("rl", f"rl_from_{sft_rate}", rates, max, rl_flags, start=sft)

        # Both again with the other seeds.
        sft_runs, rl_runs = [sft], [rl]
        for seed in range(FIRST_SEED + 1, FIRST_SEED + seeds):
            sft_runs.append(self.folder / f"sft_{sft_rate}_seed{seed}")
            rl_runs.append(self.folder / f"rl_from_{sft_rate}_{rl_rate}_seed{seed}")
            self.train("sft", sft_runs[-1], sft_rate, seed, sft_flags, None)
            self.train("rl", rl_runs[-1], rl_rate, seed, rl_flags, sft_runs[-1])

        # RL has learned the validation rows, so numbers that an evaluation chooses on them are those of SFT.
        evaluations: list[tuple[Path, Sequence[str | Path]]] = [(folder, ["evaluate"]) for folder in sft_runs]
        pairs = zip(sft_runs, rl_runs, strict=True)
        evaluations += [(folder, ["evaluate_as", start / METRICS]) for start, folder in pairs]
        for folder, stage in evaluations:
            if not (folder / METRICS).is_file():
                run(*STAGE, *stage, folder, *flags_in("EVAL_FLAGS"), METHOD=self.name)
        return [(f"{self.name} SFT", one) for one in sft_runs] + [(f"{self.name} SFT + RL", one) for one in rl_runs]


def best_eval(folder: Path) -> float:
    """What a run's best checkpoint had on the validation file: a loss of SFT, a ranking metric of RL."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return next(value for name, value in metrics.items() if name.startswith("best_eval_"))


def main() -> None:
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(__doc__)
        return
    if "TRAIN_FILE" not in os.environ:
        fail("has no settings here; start it with: bash scripts/compare.sh")
    methods, seeds = [*dict.fromkeys(setting("METHODS", "full lora qlora").split())], setting("SEEDS", "1")
    out, train_file, test_file = Path(os.environ["OUT"]), os.environ["TRAIN_FILE"], os.environ["TEST_FILE"]
    if not re.fullmatch(r"[1-9][0-9]*", seeds):
        fail(f"SEEDS={seeds}: must be a number from 1")
    for name in methods:
        if name not in SFT_RATES:
            fail(f"METHODS={' '.join(methods)}: {name} must be full, lora or qlora")
        check_rates(name)
    check_flags()
    for name in methods:
        run(*STAGE, "check_later", METHOD=name)
    check_settings(out)
    signal.signal(signal.SIGINT, lambda *_: None)  # wait for the stage, which saves a checkpoint and ends with 130

    # SASRec, and every method.
    runs = [("SASRec", out / "sasrec")]
    if not (out / "sasrec" / "result.json").is_file():
        files = ("--train_file", train_file, "--eval_file", os.environ["EVAL_FILE"], "--test_data_path", test_file)
        catalogue = ("--info_file", os.environ["INFO_FILE"])
        run(os.environ["PYTHON"], "scripts/train_sasrec.py", *files, *catalogue, "--output_dir", out / "sasrec")
    for name in methods:
        runs += Method(name, out).compare(int(seeds))

    # The table, with ratios to full fine-tuning and LoRA where these ran.
    names = ",".join(f"{name}={folder}" for name, folder in runs)
    against = ",".join(name for name in ("full", "lora") if name in methods)
    command = [os.environ["PYTHON"], "scripts/table.py", "--train_file", train_file, "--test_data_path", test_file]
    command += ["--info_file", os.environ["INFO_FILE"]]
    command += ["--intervals", "True", "--runs", names, "--against", against, "--figure", str(out / "compare.png")]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if printed.returncode:
        sys.exit(printed.returncode)
    (out / "compare.md").write_text(printed.stdout, encoding="utf-8")
    print(printed.stdout, end="")


if __name__ == "__main__":
    main()
