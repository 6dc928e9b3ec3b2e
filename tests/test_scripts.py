"""The shell scripts, over a folder laid out like the public MiniOneRec release."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT, run_command


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
        checkout, "pipeline.sh", "--seed", "7",
        METHOD="lora", PRESET="quick", BASE_MODEL=base,
        SFT_FLAGS="--num_epochs 1 --batch_size 32 --eval_step 0.5 --learning_rate 0.01",
        RL_FLAGS="--train_batch_size 16 --num_generations 8 --gradient_accumulation_steps 1 --tasks sid_history_to_sid "
        "--test_beam 10 --eval_step 0.5 --save_steps 0.5",
        EVAL_FLAGS="--num_beams 10",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| lora SFT + RL |" in result.stdout
    out = checkout / "output" / "Bolts_lora"
    flags = json.loads((out / "rl" / "final_checkpoint" / "minionerec.json").read_text())["flags"]
    assert flags["seed"] == 7 and flags["add_gt"] and flags["sft_weight"] == 1 and flags["num_generations"] == 8
    adapter = json.loads((out / "rl" / "final_checkpoint" / "adapter_config.json").read_text())
    assert adapter["r"] == 8 and len(adapter["target_modules"]) == 4
    again = bash(checkout, "evaluate.sh", "rl", "--num_beams", "5", METHOD="lora")
    assert again.returncode == 0, again.stderr
    metrics = json.loads((out / "rl" / "result.metrics.json").read_text())
    assert "HR@5" in metrics and "HR@10" not in metrics


@pytest.mark.parametrize("script", ["sft_lora.sh", "sft_qlora.sh", "rl_lora.sh", "rl_qlora.sh"])
def test_the_stage_scripts_pass_flags_on(checkout, base, script):
    """Each fails on the flag given last, and on nothing before it: what they pass is what the commands take."""
    settings = {"BASE_MODEL": base, "MODEL_PATH": base, "OUT": "output/other", "PRESET": "best"}
    result = bash(checkout, script, "--lora_dropout", "7", **settings)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "--lora_dropout 7.0: must be at least 0 and below 1" in line
    assert line.startswith(f"{script.split('_')[0]}.py: error:")


@pytest.mark.slow
@pytest.mark.parametrize("script", ["sft_lora.sh", "rl_lora.sh"])
def test_an_engine_gets_no_flags_that_it_refuses(checkout, base, script):
    settings = {"BASE_MODEL": base, "MODEL_PATH": base, "OUT": "output/other", "CONFIG": "configs/fsdp.yaml"}
    result = bash(checkout, script, "--lora_dropout", "7", **settings)
    (error,) = [line for line in result.stderr.splitlines() if ".py: error: " in line]
    assert "--lora_dropout 7.0" in error


@pytest.mark.parametrize("setting", [{"METHOD": "lori"}, {"PRESET": "fast"}, {"NPROC": "x"}, {"CONFIG": "zero2"}])
def test_unknown_settings_are_refused(checkout, setting):
    result = bash(checkout, "pipeline.sh", **setting)
    (name,) = setting
    assert result.returncode == 2 and f"pipeline.sh: error: {name}={setting[name]}: " in result.stderr


@pytest.mark.parametrize(
    ("flags", "setting"), [((), {"SEEDS": "three"}), ((), {"METHODS": "full,lora"}), (("--num_epochs", "1"), {})]
)
def test_a_comparison_refuses_what_it_does_not_know_before_it_trains(checkout, flags, setting):
    result = bash(checkout, "compare.sh", *flags, **setting)
    assert result.returncode == 2 and result.stderr.startswith("compare.sh: error: ")


@pytest.mark.slow
def test_a_comparison_chooses_the_rate_in_short_runs(checkout, base):
    """Both rates are tried in short runs, and only the better one trains; the same command again trains nothing."""
    settings = {
        "METHODS": "lora", "BASE_MODEL": base, "OUT": "output/compared", "SFT_RATES_lora": "1e-6 1e-2",
        "TRY_SFT": "--num_epochs 1", "RL_RATES_lora": "1e-3", "EVAL_FLAGS": "--num_beams 10",
        "SFT_FLAGS": "--num_epochs 2 --batch_size 32 --eval_step 0.5 --tasks sid_history_to_sid",
        "RL_FLAGS": "--train_batch_size 16 --num_generations 8 --gradient_accumulation_steps 1 --test_beam 10 "
        "--tasks sid_history_to_sid --eval_step 0.5 --save_steps 0.5",
    }  # fmt: skip
    done = bash(checkout, "compare.sh", **settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "lora sft_try: learning rate 1e-2" in done.stdout and "| lora SFT + RL |" in done.stdout
    runs = checkout / "output" / "compared" / "lora"
    folders = {"sft_try_1e-6", "sft_try_1e-2", "sft_1e-2", "rl_from_1e-2_1e-3"}
    assert {run.name for run in runs.iterdir()} == folders
    epochs = {name: json.loads((runs / name / "metrics.json").read_text())["history"][-1]["epoch"] for name in folders}
    assert (epochs["sft_try_1e-2"], epochs["sft_1e-2"]) == (1, 2)
    before = {run: (runs / run / "metrics.json").stat().st_mtime for run in folders}
    assert bash(checkout, "compare.sh", **settings).returncode == 0
    assert before == {run: (runs / run / "metrics.json").stat().st_mtime for run in folders}


@pytest.mark.parametrize("method", ["", "full", "lora"])
def test_the_preset_for_little_memory(checkout, method):
    """QLoRA unless METHOD says otherwise, and checkpointing in any case."""
    result = bash(checkout, "pipeline.sh", PYTHON="echo", PRESET="low_memory", METHOD=method)
    sft, rl, *_ = result.stdout.splitlines()
    for line, script in ((sft, "sft.py"), (rl, "rl.py")):
        assert line.startswith(script) and "--gradient_checkpointing True" in line
        assert ("--use_qlora True" in line) == (not method) and ("--use_lora True" in line) == (method == "lora")


def test_a_dry_run_of_the_pipeline_stops_where_rl_needs_a_checkpoint(checkout, base, tmp_path):
    result = bash(checkout, "pipeline.sh", "--dry_run", "True", BASE_MODEL=base, OUT=str(tmp_path / "none"))
    assert result.returncode == 0, result.stderr
    assert "peak memory" in result.stdout and "RL starts from the checkpoint of SFT" in result.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("script", ["pipeline.sh", "compare.sh", "sft_lora.sh"])
def test_help_says_what_a_script_does_and_runs_nothing(checkout, script):
    result = bash(checkout, script, "--help", PYTHON="false")
    assert result.returncode == 0 and result.stdout.startswith(("Runs ", "Compares "))
    assert "METHOD=lora|qlora|full" in result.stdout


@pytest.mark.parametrize(
    ("script", "says"),
    [("quickstart.sh", "bundled demo"), ("test.sh", "runs the tests"), ("get_smollm2.sh", "OUT=out/smollm2-fp32")],
)
def test_help_of_the_other_scripts_installs_nothing(checkout, script, says):
    result = bash(checkout, script, "--help", PYTHON="")
    assert result.returncode == 0 and says in result.stdout and not result.stderr
    assert not (checkout / ".venv").exists()


def run(line: str) -> str:
    script, *words = line.split()
    done = run_command(script, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", " --use_lora True --lora_r 8"])
def test_the_argument_lists_of_the_original_run_unchanged(checkout, base, lora, monkeypatch):
    """With the flags that MiniOneRec's own scripts pass, and sizes that fit this test given after them."""
    monkeypatch.chdir(checkout)
    data, out = "data/Amazon", f"out{'_lora' if lora else ''}"
    shared = f"--category Bolts --sid_index_path ./{data}/index/Bolts.index.json --item_meta_path "
    shared += f"./{data}/index/Bolts.item.json --train_file ./{data}/train/Bolts_5_2016-10-2018-11.csv --eval_file "
    shared += f"./{data}/valid/Bolts_5_2016-10-2018-11.csv"
    info = f"./{data}/info/Bolts_5_2016-10-2018-11.txt"
    run(
        f"sft.py --base_model {base} --batch_size 1024 --micro_batch_size 16 --output_dir {out}/sft --wandb_run_name x "
        f"--train_from_scratch False --seed 42 --freeze_LLM False {shared}{lora} --batch_size 32 --num_epochs 1",
    )
    run(
        f"rl.py --model_path {out}/sft/final_checkpoint --train_batch_size 64 --eval_batch_size 128 "
        f"--num_train_epochs 2 --gradient_accumulation_steps 2 --info_file {info} --sample_train False "
        "--eval_step 0.0999 --reward_type ranking --num_generations 16 --mask_all_zero False --dynamic_sampling False "
        "--sync_ref_model True --beam_search True --test_during_training False --temperature 1.0 --learning_rate 1e-5 "
        f"--add_gt False --beta 1e-3 --dapo False --output_dir {out}/rl --wandb_run_name x {shared}{lora} "
        "--num_train_epochs 1",
    )
    printed = run(
        f"evaluate.py --base_model {out}/rl/final_checkpoint --info_file {info} --category Bolts --test_data_path "
        f"./{data}/test/Bolts_5_2016-10-2018-11.csv --result_json_data ./{out}/final.json --batch_size 8 "
        "--num_beams 50 --max_new_tokens 256 --length_penalty 0.0",
    )
    assert "NDCG@K" in printed
    results = json.loads((checkout / out / "final.json").read_text())
    assert len(results) == 10 and all(len(row["predict"]) == 39 for row in results)
    assert (checkout / out / "rl" / "final_checkpoint" / "adapter_config.json").exists() == bool(lora)
