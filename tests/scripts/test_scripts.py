"""The shell scripts, over a folder laid out like the public MiniOneRec release."""

import csv
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, succeed
from processes import quick_python

import evaluate
import rl
import sft
from minionerec import flags as flags_of_all
from minionerec.cli import parse_flags
from minionerec.errors import Problems
from scripts.train_sasrec import train_sasrec

SMALL_STEP = "--gradient_accumulation_steps 1"  # 4 prompts: the validation file here has 10 rows
RL_STEP = ("train_batch_size", "gradient_accumulation_steps")


@pytest.fixture(scope="module")
def checkout(files, tmp_path_factory):
    """The project's files over a folder laid out like a MiniOneRec checkout: what README tells to copy, and data in
    data/Amazon/{train,valid,test,info,index}."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("sft.py", "rl.py", "evaluate.py", "data.py", "minionerec_trainer.py", "sasrec.py"):
        (folder / name).write_text("raise SystemExit('the file that was here before')\n")
    for name in ("minionerec", "scripts", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "sft.py",
        "rl.py",
        "evaluate.py",
        "recommend.py",
        "merge_lora.py",
        "lora_utils.py",
        "requirements.txt",
    ):
        shutil.copy(ROOT / name, folder)
    for kind, name in (("train", "train"), ("valid", "valid"), ("test", "test"), ("info", "info")):
        suffix = os.path.splitext(files[name])[1]
        target = folder / "data" / "Amazon" / kind / f"Bolts_5_2016-10-2018-11{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(files[name], target)
    (folder / "data" / "Amazon" / "index").mkdir()
    for name in ("index", "item"):
        shutil.copy(files[name], folder / "data" / "Amazon" / "index" / f"Bolts.{name}.json")
    return folder


def bash(checkout, script: str, *flags: str, **settings: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHON": sys.executable, "CATEGORY": "Bolts", **settings}
    return subprocess.run(
        ["bash", f"scripts/{script}", *flags],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_pipeline_runs_from_the_default_paths(checkout, base):
    result = bash(
        checkout, "pipeline.sh", "--seed", "7", PYTHON=quick_python(),
        METHOD="lora", PRESET="quick", BASE_MODEL=base,
        SFT_FLAGS="--num_epochs 1 --batch_size 32 --eval_step 0.5 --learning_rate 0.01",
        RL_FLAGS="--train_batch_size 16 --num_generations 8 --gradient_accumulation_steps 1 --tasks sid_history_to_sid "
        "--test_beam 10 --eval_step 0.5 --save_steps 0.5",
        EVAL_FLAGS="--num_beams 10",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| lora SFT + RL |" in result.stdout and "| lora SFT + RL with SASRec |" in result.stdout
    assert "| lora SFT with SASRec |" in result.stdout
    out = checkout / "output" / "Bolts_lora"
    flags = json.loads((out / "rl" / "final_checkpoint" / "minionerec.json").read_text())["flags"]
    assert flags["seed"] == 7 and flags["listwise"] and flags["sft_weight"] == 1 and flags["num_generations"] == 8
    assert (
        flags["train_file"]
        == flags["eval_file"]
        != json.loads((out / "sft" / "final_checkpoint" / "minionerec.json").read_text())["flags"]["train_file"]
    )
    adapter = json.loads((out / "rl" / "final_checkpoint" / "adapter_config.json").read_text())
    assert adapter["r"] == 8 and len(adapter["target_modules"]) == 4
    again = bash(checkout, "evaluate.sh", "rl", "--num_beams", "5", METHOD="lora", PYTHON=quick_python())
    assert again.returncode == 0, again.stderr
    metrics = json.loads((out / "rl" / "result.metrics.json").read_text())
    assert "HR@5" in metrics and "HR@10" not in metrics


@pytest.mark.parametrize("script", ["sft_lora.sh", "sft_qlora.sh", "rl_lora.sh", "rl_qlora.sh"])
def test_the_stage_scripts_pass_flags_on(checkout, base, script):
    """Each fails on the flag given last, and on nothing before it: what they pass is what the commands take."""
    settings = {"BASE_MODEL": base, "MODEL_PATH": base, "OUT": "output/other", "PRESET": "best"}
    few = ["--gradient_accumulation_steps", "1"] if "rl" in script else []  # for the few rows here
    result = bash(checkout, script, *few, "--lora_dropout", "7", **settings)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "--lora_dropout 7.0: must be at least 0 and below 1" in line
    assert line.startswith(f"{script.split('_')[0]}.py: error:")


def test_an_engine_gets_the_flags_of_a_plain_run(checkout):
    plain, engine = (
        [
            line[line.index(".py ") :]
            for line in bash(checkout, "pipeline.sh", PYTHON="echo", **setting).stdout.splitlines()
        ]
        for setting in ({}, {"CONFIG": "configs/zero2.yaml"})
    )
    assert plain == engine and "--sid_learning_rate 3e-3" in plain[0] and "--listwise True" in plain[1]


@pytest.mark.parametrize("setting", [{"METHOD": "lori"}, {"PRESET": "fast"}, {"NPROC": "x"}, {"CONFIG": "zero2"}])
def test_unknown_settings_are_refused(checkout, setting):
    result = bash(checkout, "pipeline.sh", **setting)
    (name,) = setting
    assert result.returncode == 2 and f"pipeline.sh: error: {name}={setting[name]}: " in result.stderr


def test_an_rl_step_has_the_same_prompts_with_any_number_of_processes(checkout):
    for processes in (1, 2, 4, 8, 16, 32, 64):
        result = bash(checkout, "rl_lora.sh", PYTHON="echo", NPROC=str(processes))
        words = result.stdout.split()
        batch, passes = (int(words[words.index(f"--{name}") + 1]) for name in RL_STEP)
        assert batch * passes * processes == 1024 and batch % 16 == 0 and batch <= 64
    for script in ("pipeline.sh", "compare.sh"):  # before SFT trains
        result = bash(checkout, script, PYTHON="echo", NPROC="3")
        assert result.returncode == 2 and "NPROC=3: does not divide the 64 prompts" in result.stderr
        assert not result.stdout
    for given in (["--train_batch_size", "40"], ["--train_batch_size=40"], ["--train-batch-size", "40"]):
        result = bash(checkout, "rl_lora.sh", *given, PYTHON="echo", NPROC="3")
        assert result.returncode == 0 and result.stdout.replace("-", "_").count("__train_batch_size") == 2
    given = "--train_batch_size", "4"  # the only size of a process that its step does not have anyway
    result = bash(checkout, "rl_lora.sh", *given, PYTHON="echo", NPROC="512")
    assert result.returncode == 0 and not result.stderr
    result = bash(checkout, "sft_lora.sh", "--micro_batch_size", "3", PYTHON="echo", NPROC="3")
    assert result.returncode == 2 and "NPROC=3: does not divide the 64 rows of an SFT step" in result.stderr
    assert bash(checkout, "sft_lora.sh", "--batch_size", "66", PYTHON="echo", NPROC="3").returncode == 0


@pytest.mark.parametrize(
    "given", ["--dry_run", "--dry-run TRUE", "--dry_run=True", "--dry_run true", "--dry_run True --seed 3", "SFT_FLAGS"]
)
def test_a_dry_run_of_the_pipeline_ends_after_sft(checkout, given):
    of_sft = {"SFT_FLAGS": "--dry_run True"} if given == "SFT_FLAGS" else {}
    result = bash(checkout, "pipeline.sh", *([] if of_sft else given.split()), PYTHON="echo", **of_sft)
    assert result.returncode == 0 and "rl.py --model_path" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("RL starts from the checkpoint of SFT, and its dry run needs one")
    real = bash(checkout, "pipeline.sh", "--dry_run", "False", PYTHON="echo", MODEL_PATH="out/old", OUT="output/own")
    assert "rl.py --model_path output/own/sft/final_checkpoint" in real.stdout


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        (["--output_dir", "output/own"], {}),
        (["--output-dir=output/own"], {}),
        ([], {"SFT_FLAGS": "--output_dir output/own"}),
        ([], {"EVAL_FLAGS": "--result_json_data output/own.json"}),
    ],
)
def test_the_pipeline_refuses_a_folder_of_one_stage(checkout, given, setting):
    result = bash(checkout, "pipeline.sh", *given, PYTHON="echo", **setting)
    name = "result_json_data" if "EVAL_FLAGS" in setting else "output_dir"
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith(f"pipeline.sh: error: --{name} is that of one stage, where the others do not look")


def test_the_pipeline_refuses_first_what_its_last_stages_would(checkout, tmp_path):
    (tmp_path / "sasrec").mkdir()
    for setting, message in (
        ({"OUT": str(tmp_path)}, f"{tmp_path}/sasrec: has no result.json, which the table needs"),
        ({"RL_FLAGS": "--dry_run True"}, "RL_FLAGS=--dry_run True: trains nothing to evaluate; give the flag to rl.py"),
    ):
        result = bash(checkout, "pipeline.sh", PYTHON="echo", **setting)
        assert result.returncode == 2 and not result.stdout
        assert result.stderr.startswith(f"pipeline.sh: error: {message}")


def test_files_are_found_in_folders_with_any_name(checkout, tmp_path):
    (tmp_path / "d [1]*" / "train").mkdir(parents=True)
    (tmp_path / "d [1]*" / "train" / "Bolts_5.csv").touch()
    result = bash(checkout, "sft_lora.sh", PYTHON="echo", CATEGORY="Bolts", DATA=str(tmp_path / "d [1]*"))
    assert (
        f"--train_file {tmp_path}/d [1]*/train/Bolts_5.csv --eval_file {tmp_path}/d [1]*/valid/Bolts*" in result.stdout
    )


def test_a_search_path_of_folders_does_not_lead_to_another_project(checkout, tmp_path):
    (tmp_path / "scripts").mkdir()
    result = bash(checkout, "sft_lora.sh", PYTHON="pwd", CDPATH=str(tmp_path))
    assert result.returncode == 0 and result.stdout.strip() == str(checkout)


def test_a_python_that_is_missing_is_named(checkout):
    result = bash(checkout, "sft_lora.sh", PYTHON="", BASE_PYTHON="python3.99")
    assert result.returncode == 2 and not (checkout / ".venv").exists()
    assert "setup.sh: error: python3.99 is missing, or older than Python 3.11; name another one" in result.stderr


def test_a_file_of_a_category_is_not_another_that_begins_with_it(checkout, tmp_path):
    (tmp_path / "train").mkdir()
    for name in ("Tools", "Tools-old", "Tools & Home", "Bolts_5", "Bolts_6"):
        (tmp_path / "train" / f"{name}.csv").touch()
    result = bash(checkout, "sft_lora.sh", PYTHON="echo", CATEGORY="Tools", DATA=str(tmp_path))
    assert f"--train_file {tmp_path}/train/Tools.csv --eval_file" in result.stdout
    result = bash(checkout, "sft_lora.sh", PYTHON="echo", CATEGORY="Bolts", DATA=str(tmp_path))
    assert result.returncode == 2 and not result.stdout
    assert "2 files begin with" in result.stderr and "name one: TRAIN_FILE=..." in result.stderr


@pytest.mark.parametrize(
    ("flags", "setting"),
    [
        ((), {"SEEDS": "three"}),
        ((), {"METHODS": "full,lora"}),
        (("--num_epochs", "1"), {}),
        ((), {"RL_RATES_lora": "1e-4, 1e-5"}),
        ((), {"RL_RATES_lora": "1e-4 1e-5"}),
        ((), {"RL_RATES_lora": "1e-4 1e-5", "RL_FILE": "rl.csv", "RL_FLAGS": "--test_during_training False"}),
        ((), {"SFT_FLAGS": "--batch_size 32 --seed 7"}),
        ((), {"RL_FLAGS": "--learning-rate=1e-5"}),
        ((), {"TRY_SFT": "--dry_run True"}),
        ((), {"TRY_SFT": '--num_epochs "1'}),
        ((), {"EVAL_FLAGS": "--result_json_data out/result.json"}),
    ],
)
def test_a_comparison_refuses_what_it_does_not_know_before_it_trains(checkout, flags, setting):
    result = bash(checkout, "compare.sh", *flags, **setting)
    assert result.returncode == 2 and result.stderr.startswith("compare.sh: error: ")


# Stands in for PYTHON: notes the flags of a stage, and writes what the stage would leave. A rate of 1e-3 has the lowest
# validation loss and the highest metric; evaluations choose a penalty of 1, next to SASRec 1.5, and a weight of 0.3.
STAND_IN = """#!{python} -S
import csv, json, math, os, sys

command, *words = sys.argv[1:]
if command in ("-c", "scripts/compare.py", "scripts/table.py"):
    os.execv({python!r}, [{python!r}, command, *words])
flags = dict(zip(words[::2], words[1::2]))
start = flags.get("--model_path") or flags.get("--base_model", "")
if start.endswith("/final_checkpoint") and not os.path.isdir(start):
    sys.exit(f"{{command}}: error: {{start}}: no such folder")
with open("stages.jsonl", "a") as file:
    file.write(json.dumps([command, words]) + "\\n")
if "--nope" in words:
    sys.exit(2)
out = flags.get("--output_dir") or os.path.dirname(flags["--result_json_data"])
os.makedirs(out + "/final_checkpoint", exist_ok=True)
if command != "evaluate.py":
    costs = dict.fromkeys(("trainable_parameters", "seconds", "peak_memory_gb", "checkpoint_mb"), 1)
    off = abs(math.log10(float(flags.get("--learning_rate", 1))) + 3)
    best = {{"best_eval_loss": off}} if command == "sft.py" else {{"best_eval_mean@10": -off}}
    with open(out + "/metrics.json", "w") as file:
        json.dump({{**costs, **best}}, file)
if command not in ("sft.py", "rl.py"):
    with open(flags["--test_data_path"], newline="") as file:
        targets = [row["item_sid"] for row in csv.DictReader(file)]
    result = flags.get("--result_json_data", out + "/result.json")
    blend = {{"blend": {{"weight": 0.3}}}} if "--blend" in flags else {{}}
    penalty = flags.get("--seen_penalty", 0)
    with open(result[:-5] + ".metrics.json", "w") as file:
        json.dump({{**blend, "seen_penalty": (1.5 if blend else 1.0) if penalty == "auto" else float(penalty)}}, file)
    with open(result, "w") as file:
        json.dump([{{"output": target, "predict": ["<a_0><b_0><c_0>"] * 10}} for target in targets], file)
"""
STAGES = {"sft.py": sft.train, "rl.py": rl.train, "evaluate.py": evaluate.evaluate}
STAGES["scripts/train_sasrec.py"] = train_sasrec


@pytest.fixture
def stand_in(checkout, tmp_path) -> str:
    (checkout / "stages.jsonl").unlink(missing_ok=True)
    file = tmp_path / "python"
    file.write_text(STAND_IN.format(python=sys.executable))
    file.chmod(0o755)
    return str(file)


def stages(checkout) -> list[tuple[str, str, dict[str, str]]]:
    """What ran: the command, the name of its run, and its flags, which must be those that it takes."""
    ran = []
    for command, words in map(json.loads, (checkout / "stages.jsonl").read_text().splitlines()):
        flags = parse_flags(words, dict(inspect.signature(STAGES[command]).parameters))
        folder = flags.get("output_dir") or os.path.dirname(flags["result_json_data"])
        ran.append((command, os.path.basename(folder), flags))
    return ran


def test_a_comparison_chooses_rates_and_repeats_the_best_with_other_seeds(checkout, stand_in):
    """Every rate is tried in a short run, and only the best one trains; then RL, and both with the other seed. The same
    command again trains nothing. The flags are those that the commands take; test_the_pipeline_runs runs them."""
    settings = {
        "METHODS": "full lora", "SEEDS": "2", "OUT": "output/compared", "PRESET": "quick", "PYTHON": stand_in,
        "SFT_RATES_full": "1e-3", "RL_RATES_full": "1e-5", "SFT_RATES_lora": "1e-2 1e-3", "RL_RATES_lora": "1e-5 1e-3",
        "RL_FILE": "more.csv",
        "TRY_SFT": "--num_epochs 1", "SFT_FLAGS": "--batch_size 64", "RL_FLAGS": "--test_beam 7", "EVAL_FLAGS": "--K 9",
    }  # fmt: skip
    done = bash(checkout, "compare.sh", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    says = ["full sft_try", "full sft", "full rl_from_1e-3", "lora sft_try", "lora sft", "lora rl_from_1e-3"]
    rates = ["1e-3", "1e-3", "1e-5", "1e-3", "1e-3", "1e-3"]
    lines = done.stdout.splitlines()
    assert lines[:6] == [f"{what}: learning rate {rate}" for what, rate in zip(says, rates, strict=True)]
    names = ["popularity", "SASRec", "full SFT", "full SFT + RL", "lora SFT", "lora SFT + RL"]
    assert [line.split(" | ")[0] for line in lines[8:]] == [f"| {name}" for name in names]
    assert "HR@10 / full" in lines[6] and "MRR / lora" in lines[6]
    assert (checkout / "output/compared/compare.md").read_text().splitlines() == lines[6:]

    ran = stages(checkout)
    assert ran[0][0] == "scripts/train_sasrec.py"
    lora = ran[-11:]
    assert [(command, name) for command, name, _ in lora] == [
        *[("sft.py", f"sft_{name}") for name in ("try_1e-2", "try_1e-3", "1e-3")],
        *[("rl.py", f"rl_from_1e-3_{rate}") for rate in ("1e-5", "1e-3")],
        *[("sft.py", "sft_1e-3_seed43"), ("rl.py", "rl_from_1e-3_1e-3_seed43")],
        *[
            ("evaluate.py", name)
            for name in ("sft_1e-3", "sft_1e-3_seed43", "rl_from_1e-3_1e-3", "rl_from_1e-3_1e-3_seed43")
        ],
    ]
    assert all(flags["K"] == "9" for command, _, flags in ran if command == "evaluate.py")
    assert not any("use_lora" in flags for _, _, flags in ran[:-11])
    flags = {name: flags for command, name, flags in lora if command != "evaluate.py"}
    assert [flags[name].get("num_epochs") for name in ("sft_try_1e-3", "sft_1e-3", "sft_1e-3_seed43")] == [
        "1",
        "3",
        "3",
    ]
    for name, seed, start in (
        ("rl_from_1e-3_1e-5", "42", "sft_1e-3"),
        ("rl_from_1e-3_1e-3_seed43", "43", "sft_1e-3_seed43"),
    ):
        assert flags[name]["seed"] == seed and flags[name]["test_beam"] == "7"
        assert flags[name]["model_path"] == f"output/compared/lora/{start}/final_checkpoint"
    assert flags["sft_1e-3_seed43"]["learning_rate"] == "1e-3" and flags["sft_1e-3_seed43"]["batch_size"] == "64"

    assert bash(checkout, "compare.sh", **settings).returncode == 0
    assert stages(checkout) == ran
    other = bash(checkout, "compare.sh", **settings | {"PRESET": "best"})
    assert other.returncode == 2 and "holds runs with PRESET='quick' and is 'best' now; name another" in other.stderr
    assert stages(checkout) == ran
    (checkout / "output/compared/settings.json").write_text("{")
    damaged = bash(checkout, "compare.sh", **settings)
    assert damaged.returncode == 2 and len(damaged.stderr.splitlines()) == 1
    assert "compared/settings.json: is damaged, so the settings of the runs there are not known" in damaged.stderr
    assert stages(checkout) == ran


@pytest.mark.parametrize("script", ["pipeline.sh", "compare.sh"])
def test_rl_is_evaluated_with_the_numbers_that_sft_chose(checkout, stand_in, tmp_path, script):
    """It has learned the rows that they are chosen on. A value with spaces is one."""
    auto = f"--seen_penalty auto --eval_file '{tmp_path}/valid 1.csv'"
    settings = {"PYTHON": stand_in, "OUT": str(tmp_path / "out"), "METHODS": "lora", "SFT_RATES_lora": "1e-3"}
    settings |= {"EVAL_FLAGS": auto, "SFT_FLAGS": '--wandb_run_name "first try"', "RL_FLAGS": "--wandb_run_name 'r *'"}
    done = bash(checkout, script, **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    ran = stages(checkout)
    assert [flags["wandb_run_name"] for command, _, flags in ran if command in ("sft.py", "rl.py")] == [
        "first try",
        "r *",
    ]
    names = ("seen_penalty", "blend_weight", "eval_file")
    used = [[flags.get(name) for name in names] for command, _, flags in ran if command == "evaluate.py"]
    chosen, given = ["auto", None, f"{tmp_path}/valid 1.csv"], ["1.0", None, ""]
    blended = [chosen, ["1.5", "0.3", ""]] if script == "pipeline.sh" else []
    assert used == [chosen, given, *blended]

    settings["EVAL_FLAGS"] = "--prompt_file Bob's.json"
    refused = bash(checkout, script, **settings)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and stages(checkout) == ran
    assert f"{script}: error: EVAL_FLAGS=--prompt_file Bob's.json: a quote in it is not closed" in refused.stderr


def test_a_comparison_ends_with_the_stage_that_fails(checkout, stand_in):
    done = bash(checkout, "compare.sh", PYTHON=stand_in, OUT="output/failed", METHODS="lora", SFT_FLAGS="--nope 1")
    assert done.returncode == 2 and not done.stdout
    ran = [json.loads(line)[0] for line in (checkout / "stages.jsonl").read_text().splitlines()]
    assert ran == ["scripts/train_sasrec.py", "sft.py"]


@pytest.mark.parametrize("script", ["pipeline.sh", "compare.sh"])
def test_wrong_flags_of_later_stages_are_refused_before_sft_trains(checkout, base, tmp_path, script):
    wrong = {"RL_FLAGS": "--reward_type rul --add_gtt", "EVAL_FLAGS": "--num_beams 0"}
    wrong |= {"OUT": str(tmp_path / "none"), "BASE_MODEL": base, "METHODS": "full lora"}
    unknown = bash(checkout, script, **wrong)
    values = bash(checkout, script, **wrong | {"RL_FLAGS": "--reward_type rul --num_generations 5000"})
    assert unknown.returncode == values.returncode == 2 and not unknown.stdout and not values.stdout
    first, last = unknown.stderr.splitlines()
    assert first == "rl.py: error: unknown flag --add_gtt; did you mean --add_gt?"
    assert last.startswith("evaluate.py: error: --num_beams 0: ")
    lines = values.stderr.splitlines()
    assert any("--reward_type 'rul': " in line for line in lines) and any("different SIDs" in line for line in lines)
    assert lines[-1] == last and not (tmp_path / "none").exists()
    # Checkpoints that are there do not start what is only to be checked.
    others = {"MODEL_PATH": base, "RL_FLAGS": f"{SMALL_STEP} --model_path {base}"}
    others["EVAL_FLAGS"] = f"--base_model {base} --num_beams 0"
    started = bash(checkout, script, **wrong | others)
    assert started.returncode == 2 and started.stderr.splitlines() == [last] and not (tmp_path / "none").exists()


@pytest.fixture
def no_launcher(tmp_path) -> str:
    """A Python that starts no launcher."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" != -m ] || exit 9\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("processes", [1, 8])
def test_a_validation_file_below_an_rl_step_is_refused_before_sft_trains(
    checkout, base, tmp_path, no_launcher, processes
):
    """A step is that of all processes: one of eight makes 8 prompts of it."""
    settings = {"PYTHON": no_launcher, "BASE_MODEL": base, "OUT": str(tmp_path / "none"), "NPROC": str(processes)}
    refused = bash(checkout, "pipeline.sh", **settings)
    assert refused.returncode == 2 and not refused.stdout and not (tmp_path / "none").exists()
    (line,) = refused.stderr.splitlines()
    assert line.startswith("rl.py: error: --train_file data/Amazon/valid/Bolts_5_2016-10-2018-11.csv: 10 prompts are ")
    assert line.endswith("the 64 of a step; lower --gradient_accumulation_steps or --train_batch_size")


def test_flags_that_do_not_fit_the_processes_are_refused_before_sft_trains(checkout, base, tmp_path, no_launcher):
    """A process of 64 has 16 completions of a step: no whole group of 32."""
    settings = {"PYTHON": no_launcher, "BASE_MODEL": base, "OUT": str(tmp_path / "none"), "NPROC": "64"}
    header, *rows = (checkout / "data/Amazon/valid/Bolts_5_2016-10-2018-11.csv").read_text().splitlines()
    (tmp_path / "rows.csv").write_text("\n".join([header, *rows * 13]) + "\n")  # enough for a step of 128 prompts
    settings["RL_FILE"] = str(tmp_path / "rows.csv")
    refused = bash(checkout, "pipeline.sh", **settings, RL_FLAGS="--num_generations 32")
    assert refused.returncode == 2 and refused.stderr.startswith(
        "rl.py: error: --num_generations 32 does not divide --train_batch_size 16 x --gradient_accumulation_steps 1 "
    )
    assert bash(checkout, "pipeline.sh", **settings, RL_FLAGS="--num_generations 8").returncode == 9


@pytest.mark.parametrize("method", ["", "full", "lora"])
def test_the_preset_for_little_memory(checkout, method):
    """QLoRA unless METHOD says otherwise, and checkpointing in any case."""
    result = bash(checkout, "pipeline.sh", PYTHON="echo", PRESET="low_memory", METHOD=method)
    sft, rl, *_ = result.stdout.splitlines()
    for line, script in ((sft, "sft.py"), (rl, "rl.py")):
        assert line.startswith(script) and "--gradient_checkpointing True" in line
        assert ("--use_qlora True" in line) == (not method) and ("--use_lora True" in line) == (method == "lora")


def test_a_dry_run_of_the_pipeline_stops_where_rl_needs_a_checkpoint(checkout, base, tmp_path):
    result = bash(
        checkout,
        "pipeline.sh",
        "--dry_run",
        "True",
        BASE_MODEL=base,
        OUT=str(tmp_path / "none"),
        PYTHON=quick_python(),
        RL_FLAGS=SMALL_STEP,
    )
    assert result.returncode == 0, result.stderr
    assert "peak memory" in result.stdout and "RL starts from the checkpoint of SFT" in result.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("script", sorted(file.name for file in (ROOT / "scripts").glob("*.[ps][yh]")))
def test_help_explains_a_script_and_starts_nothing(checkout, script):
    """Without an environment, so that one which is made or used would show."""
    before = sorted(checkout.rglob("*"))
    if script.endswith(".sh"):
        done = bash(checkout, script, "--help", PYTHON="")
        head = re.search(r"^# (.+)", (ROOT / "scripts" / script).read_text(), re.M)[1]
    else:
        command = [sys.executable, "-B", f"scripts/{script}", "--help"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
        head = "compare.sh is the command" if script == "compare.py" else "DESCRIPTION"
    assert done.returncode == 0 and not done.stderr and head in done.stdout and len(done.stdout) > 100
    assert sorted(checkout.rglob("*")) == before


def run(line: str) -> str:
    script, *words = line.split()
    done = succeed(script, *words)
    return done.stdout


def split_like_the_original(path: Path, folder: Path, parts: int) -> None:
    """Writes a file in parts 0.csv, 1.csv, ..., with the number of each row in front, in a column without a name."""
    folder.mkdir(parents=True)
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    for part in range(parts):
        with open(folder / f"{part}.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["", *header])
            first, end = (number * len(rows) // parts for number in (part, part + 1))
            writer.writerows([number, *rows[number]] for number in range(first, end))


def merged_like_the_original(folder: Path) -> list[dict]:
    """The rows of every file that `ls *.json` lists."""
    listed = subprocess.run(f"ls {folder}/*.json", shell=True, capture_output=True, text=True, check=True)
    return [row for path in listed.stdout.split() for row in json.loads(Path(path).read_text(encoding="utf-8"))]


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", " --use_lora True --lora_r 8"])
def test_the_argument_lists_of_the_original_run_unchanged(checkout, base, lora, monkeypatch):
    """With the flags that MiniOneRec's own scripts pass, and sizes that fit this test given after them; then their
    steps from the parts of the test file to the metrics."""
    monkeypatch.chdir(checkout)
    installed = flags_of_all.find_spec
    monkeypatch.setattr(flags_of_all, "find_spec", lambda name: installed(name) if name != "wandb" else None)
    data, out = "data/Amazon", f"out{'_lora' if lora else ''}"
    shared = f"--category Bolts --sid_index_path ./{data}/index/Bolts.index.json --item_meta_path "
    shared += f"./{data}/index//Bolts.item.json --train_file ./{data}/train/Bolts_5_2016-10-2018-11.csv --eval_file "
    shared += f"./{data}/valid/Bolts_5_2016-10-2018-11.csv"
    info = f"./{data}/info/Bolts_5_2016-10-2018-11.txt"
    printed = run(
        f"sft.py --base_model {base} --batch_size 1024 --micro_batch_size 16 --output_dir {out}/sft --wandb_project p "
        f"--wandb_run_name x --train_from_scratch False --seed 42 --freeze_LLM False {shared}{lora} --batch_size 32 "
        "--num_epochs 1",
    )
    line = "--wandb_project p: wandb is not installed; pip install wandb; the run is not tracked there"
    assert printed.splitlines().count(line) == 1
    run(
        f"rl.py --model_path {out}/sft/final_checkpoint --train_batch_size 64 --eval_batch_size 128 "
        f"--num_train_epochs 2 --gradient_accumulation_steps 2 --info_file {info} --sample_train False "
        "--eval_step 0.0999 --reward_type ranking --num_generations 16 --mask_all_zero False --dynamic_sampling False "
        "--sync_ref_model True --beam_search True --test_during_training False --temperature 1.0 --learning_rate 1e-5 "
        f"--add_gt False --beta 1e-3 --dapo False --output_dir {out}/rl --wandb_run_name x {shared}{lora} "
        f"--num_train_epochs 1 --test_during_training {bool(lora)}",
    )
    parts = checkout / "temp" / f"Bolts-{out}"
    split_like_the_original(checkout / data / "test" / "Bolts_5_2016-10-2018-11.csv", parts, 2)
    for part in range(2):
        printed = run(
            f"evaluate.py --base_model ./{out}/rl/final_checkpoint --info_file {info} --category Bolts "
            f"--test_data_path {parts}/{part}.csv --result_json_data {parts}/{part}.json --batch_size 8 --num_beams 50 "
            "--max_new_tokens 256 --temperature 1.0 --guidance_scale 1.0 --length_penalty 0.0",
        )
        assert "NDCG@K" in printed and "changes nothing" not in printed
    results = merged_like_the_original(parts)
    assert len(results) == 10 and all(len(row["predict"]) == 39 for row in results)
    known = {line.split("\t")[0].strip() for line in Path(info).read_text(encoding="utf-8").splitlines()}
    hits, reciprocal = 0, 0.0
    for row in results:
        assert set(row["predict"]) <= known
        place = row["predict"].index(row["output"].strip(' \n"'))
        hits, reciprocal = hits + (place < 10), reciprocal + 1 / (place + 1)
    each = [json.loads((parts / f"{part}.metrics").read_text()) for part in range(2)]
    assert hits / 10 == pytest.approx(sum(one["HR@10"] for one in each) / 2)
    assert reciprocal / 10 == pytest.approx(sum(one["MRR"] for one in each) / 2)
    assert (checkout / out / "rl" / "final_checkpoint" / "adapter_config.json").exists() == bool(lora)


def test_every_evaluated_model_is_saved_unless_flags_say_otherwise():
    """MiniOneRec's rl.sh names an eval_step and has no save_steps."""
    for flags, fraction in (
        ({"eval_step": 0.0999}, 0.0999),
        ({}, 0.199),
        ({"eval_step": 0.0999, "test_during_training": False}, 0.199),
        ({"eval_step": 0.1, "save_steps": 0.2}, 0.2),
    ):
        problems = Problems()
        chosen = rl.RLFlags(output_dir="out", **flags)
        chosen.check(problems)
        assert chosen.save_fraction == fraction and not [line for line in problems if "save_steps" in line]
    rl.RLFlags(output_dir="out", eval_step=0.1, save_steps=0.15).check(problems)
    assert problems[-1].endswith("without the flag, every evaluated model is saved")


def test_flags_that_are_kept_say_when_they_change_nothing():
    flags = evaluate.EvaluateFlags(temperature=0.7, guidance_scale=2.0)
    assert flags.notes == [
        "--temperature 0.7 changes nothing: rankings are by beam search",
        "--guidance_scale 2 changes nothing: rankings are by beam search",
    ]
