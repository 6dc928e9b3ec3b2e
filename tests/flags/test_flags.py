"""Commands as functions: what a type checker and Python say of a call with flags, or with flat keywords."""

import dataclasses
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest
from helpers import ROOT

import rl
import sft
from minionerec import RLFlags, SFTFlags
from minionerec import flags as flags_module
from minionerec.errors import InputError
from minionerec.prepare.settings import PrepareFlags

# Of each line, what a type checker says; empty where it is right.
CALLS = {
    'sft.train(SFTFlags(base_model="a", use_lora=True, micro_batch_size="auto"))': "",
    'rl.train(RLFlags(model_path="a", beta=0, prompt_file=None))': "",
    'sft.train(base_model="a", micro_batch_size=4)["steps"]': "",
    'merge_lora.merge(adapter="a", output_dir="b")["saved"]': "",
    'recommend.recommend(model="a", K=5)': "",
    'evaluate.evaluate(base_model="a")["HR@10"].is_integer()': "",
    "SFTFlags(base_modle=3)": 'Unexpected keyword argument "base_modle"',
    "sft.train(base_modle=3)": 'Unexpected keyword argument "base_modle"',
    "rl.train(beam_saerch=True)": 'Unexpected keyword argument "beam_saerch"',
    'sft.train(batch_size="many")': "No overload variant",
    'SFTFlags(micro_batch_size="all")': "incompatible type",
    "sft.train(RLFlags())": "No overload variant",
    "rl.train(RLFlags(), beta=0)": "No overload variant",
    'evaluate.evaluate(adaptr="a")': 'Unexpected keyword argument "adaptr"',
    "minionerec.SFTFlag": "has no attribute",
}


def test_a_type_checker_takes_the_good_calls_and_no_other(tmp_path):
    """mypy, as anyone would run it on a file that uses the project, but without following the libraries."""
    lines = ["import evaluate, merge_lora, minionerec, recommend, rl, sft", "from minionerec import RLFlags, SFTFlags"]
    script = tmp_path / "script.py"
    script.write_text("\n".join([*lines, *CALLS]))
    commands = [f"{name}.py" for name in ("evaluate", "merge_lora", "recommend", "rl", "sft")]
    typed = [*commands, "minionerec/__init__.py", *map(str, (ROOT / "minionerec" / "flags").glob("*.py"))]
    mypy = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path), "--hide-error-context", "--no-pretty"]
    done = subprocess.run([*mypy, str(script), *typed], cwd=ROOT, capture_output=True, text=True)
    said = dict.fromkeys(CALLS, "")
    for line in done.stdout.splitlines():
        where, _, error = line.partition(": error: ")
        if error and where.startswith(str(script)):
            said[list(CALLS)[int(where.rpartition(":")[2]) - 1 - len(lines)]] += error
    assert {call: bool(error) for call, error in said.items()} == {call: bool(error) for call, error in CALLS.items()}
    assert all(CALLS[call] in error for call, error in said.items()), said


def test_flags_and_flat_keywords_are_the_same_call(tmp_path):
    problems = []
    wrong = {"batch_size": 0, "lora_r": 8, "output_dir": tmp_path, "learning_rate": 1}
    for call in (lambda: sft.train(SFTFlags(**wrong)), lambda: sft.train(**wrong)):
        with pytest.raises(InputError) as refused:
            call()
        problems.append(refused.value.problems)
    assert problems[0] == problems[1] and any("--batch_size 0: must be above 0" in line for line in problems[0])


def test_flags_of_another_command_or_type_are_refused():
    for call in (lambda: sft.train(RLFlags()), lambda: rl.train(RLFlags(), beta=0.0), lambda: rl.train("x")):
        with pytest.raises(TypeError, match=r"train\(\) takes keyword arguments, or (SFT|RL)Flags alone"):
            call()
    with pytest.raises(InputError, match="--batch_size 'abc': must be int, not str"):
        sft.train(SFTFlags(batch_size="abc"))


def test_a_number_of_zero_is_no_missing_one():
    by_name = {field.name: field for field in dataclasses.fields(PrepareFlags)}
    for given, meant in ((0.0, 0.0), (0, 0.0), (False, None), ("None", None), (None, None)):
        assert flags_module._typed({"min_rating": given}, by_name) == {"min_rating": meant}


def test_a_folder_of_logs_is_no_tracker(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(flags_module, "find_spec", lambda name: PathFinder.find_spec(name, [str(tmp_path)]))
    assert flags_module._report_to("wandb") == "wandb is not installed; pip install wandb"


def test_the_flags_are_imported_without_torch():
    """From the front door; minionerec.Ranker is the only name there that needs it."""
    code = "from minionerec import InputError, RLFlags, RunError, SFTFlags; import sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
