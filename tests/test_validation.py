"""What a checkpoint says about itself is input: checked like a prompt file and like flags, before torch is imported."""

import json
import time
from pathlib import Path

import pytest
import torch
from models import trainer_of
from safetensors.torch import save_file

import evaluate
import merge_lora
import rl
from minionerec import sasrec
from minionerec.checkpoint import Checkpoint
from minionerec.data.prompts import RECOMMENDATION, Prompts, load_prompts
from minionerec.errors import InputError
from minionerec.flags import RunFlags
from minionerec.training import resume

GOOD = load_prompts("tools").to_json()
HUGE = "{sid_history:>400000000}"


def task(**changes) -> dict:
    return {**next(t for t in GOOD["tasks"] if t["name"] == RECOMMENDATION), **changes}


def record(folder: Path, prompts: object = GOOD, **changes) -> Path:
    """A folder that passes for a checkpoint, with this record."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    run = {"command": "sft", "method": "full", "version": "0.1.0", "flags": {}, "prompts": prompts, **changes}
    (folder / "minionerec.json").write_text(json.dumps(run))
    return folder


def problems_of(command, **flags) -> list[str]:
    with pytest.raises(InputError) as error:
        command(**{name: str(value) if isinstance(value, Path) else value for name, value in flags.items()})
    assert not any("\n" in problem or len(problem) > 1000 for problem in error.value.problems)
    return error.value.problems


def evaluation(files, checkpoint: Path) -> dict:
    result = checkpoint / "result.json"
    flags = {"info_file": files["info"], "test_data_path": files["test"], "result_json_data": result}
    return {"base_model": checkpoint, "num_beams": 5, **flags}


PROMPTS = [
    ([task(input="Purchases: {sid_history} {sid}")], "input of task 'sid_history_to_sid' names unknown fields ['sid']"),
    ([task(input="Purchases: {sid_history} {title}")], "names unknown fields ['title']"),
    ([task(input=HUGE)], "write 'sid_history' without a conversion or format"),
    ([task(input="{sid_history!r}")], "without a conversion or format"),
    ([task(input="{sid_history.__class__}")], "names unknown fields ['sid_history.__class__']"),
    ([task(input="{sid_history[0]}")], "names unknown fields ['sid_history[0]']"),
    ([task(input="{}")], "names unknown fields ['']"),
    ([task(input="{")], "is not a format string"),
    ([task(input="x" * 10_001)], "has 10,001 characters; at most 10,000 are allowed"),
    ([task(input="{sid_history}" * 11)], "names a field more than 10 times"),
    ([task(input=5)], "input of task 'sid_history_to_sid' must be text, not 5"),
    ([task(instruction="\ud800")], "instruction of task 'sid_history_to_sid' must be text"),
    ([task(response="The SID is {sid}")], "must begin with {sid}"),
    ([task(response="{sid}{sid}")], "must begin with {sid}"),
    ([task(response="{sid:>400000000}")], "without a conversion or format"),
    ([task(response="")], "names no field"),
    ([task(weight=10**9)], "must be a whole number from 1 to 100, not 1000000000"),
    ([task(weight=True)], "must be a whole number from 1 to 100, not True"),
    ([task(weight="2")], "must be a whole number from 1 to 100, not '2'"),
    ([task(colour="red")], "has unknown keys ['colour']"),
    ([task(rows="item")], "task 'sid_history_to_sid' on rows 'item' is unknown"),
    ([task(), task()], "is unknown or listed twice"),
    ([task(name="nope")], "task 'nope' on rows 'interaction' is unknown"),
    ([task(name=["x"])], "task ['x'] on rows"),
    ([{}], "task None on rows None is unknown"),
    ([5], "tasks must be a list of objects"),
    ({RECOMMENDATION: task()}, "tasks must be a list of objects"),
]
WHOLE = [
    ({**GOOD, "template": "{input}"}, "template must contain {instruction} and {input}"),
    ({**GOOD, "template": "{instruction}{input:>400000000}"}, "template must contain {instruction} and {input}"),
    ({**GOOD, "template": "{instruction}" + "{input}" * 900}, "template must contain {instruction} and {input}"),
    ({**GOOD, "template": None}, "template must be text, not None"),
    ({**GOOD, "category": 5}, "category must be text, not 5"),
    ({**GOOD, "category": "x" * 10_001}, "category has 10,001 characters"),
    ({**GOOD, "more": 1}, "expected an object of template, category and tasks"),
    ({name: GOOD[name] for name in ("category", "tasks")}, "expected an object of template, category and tasks"),
]


@pytest.mark.parametrize(("prompts", "message"), [({**GOOD, "tasks": tasks}, m) for tasks, m in PROMPTS] + WHOLE)
def test_recorded_prompts_pass_the_checks_of_a_prompt_file(files, tmp_path, prompts, message):
    checkpoint = record(tmp_path / "c", prompts)
    started = time.perf_counter()
    (problem,) = problems_of(evaluate.evaluate, **evaluation(files, checkpoint))
    assert time.perf_counter() - started < 2
    assert problem.startswith(f"{checkpoint}/minionerec.json, prompts: ") and message in problem
    assert problem.endswith("; correct it there, or give rl.py and evaluate.py --category and a --prompt_file")
    # And the remedy is one: what is recorded then plays no part.
    (tmp_path / "prompts.json").write_text("{}")
    assert Checkpoint.read(str(checkpoint)).prompts("bolts", str(tmp_path / "prompts.json")).category == "bolts"


def test_every_command_checks_them(files, tmp_path):
    bad = {**GOOD, "tasks": [task(input=HUGE), {**GOOD["tasks"][1], "input": "{sid}"}]}
    checkpoint = record(tmp_path / "c", bad)
    flags = {"model_path": checkpoint, "train_file": files["train"], "eval_file": files["valid"]}
    flags |= {"info_file": files["info"], "sid_index_path": files["index"], "item_meta_path": files["item"]}
    problems = problems_of(rl.train, **flags, output_dir=tmp_path / "out")
    assert len(problems) == 2 and all("minionerec.json, prompts: input of task" in line for line in problems)
    checkpoint = record(tmp_path / "c", bad, flags={"use_qlora": True, "eval_file": files["valid"], "category": "x"})
    (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "hub/base"}))
    flags = {"adapter": checkpoint, "into": "original", "sid_index_path": files["index"], "output_dir": tmp_path / "m"}
    problems = problems_of(merge_lora.merge, **flags)
    assert len(problems) == 2 and all("minionerec.json, prompts: input of task" in line for line in problems)


def test_a_blank_category_is_none(tmp_path):
    checkpoint = Checkpoint.read(str(record(tmp_path / "c", GOOD)))
    (tmp_path / "prompts.json").write_text("{}")
    for prompt_file in (None, str(tmp_path / "prompts.json")):
        assert checkpoint.prompts("  ", prompt_file).category == GOOD["category"]


def test_tasks_that_were_not_trained_end_as_those_that_were(tmp_path):
    checkpoint = str(record(tmp_path / "c", {**GOOD, "tasks": [task(response="{sid}\n")]}))
    tasks = (
        Checkpoint.read(checkpoint).prompts("", default=("description_to_sid", "sid_to_title", RECOMMENDATION)).tasks
    )
    assert [task.response for task in tasks.values()] == ["{sid}\n", "{sid}\n", "{title}"]


def test_what_the_table_says_survives():
    assert Prompts.from_json(json.loads(json.dumps(GOOD)), "here").to_json() == GOOD


FLAGS = [
    ({"flags": {"cutoff_len": 10**9, "use_qlora": "no"}}, "use_qlora is 'no' and must be true or false"),
    ({"flags": {"cutoff_len": 3}}, "cutoff_len is 3 and must be a whole number from 32"),
    ({"flags": {"cutoff_len": 512.0}}, "cutoff_len is 512.0 and must be"),
    ({"flags": {"cutoff_len": True}}, "cutoff_len is True and must be"),
    ({"flags": {"load_in_8bit": 1}}, "load_in_8bit is 1 and must be true or false"),
    ({"flags": {"category": ["x"]}}, "category is ['x'] and must be text"),
    ({"flags": {"eval_file": 5}}, "eval_file is 5 and must be text"),
    ({"flags": {"lora_r": 0}}, "lora_r is 0 and must be a whole number from 1"),
    ({"flags": []}, "flags is [] and must be an object"),
    ({"seconds": "x"}, "seconds is 'x' and must be a number from 0"),
    ({"seconds": -1}, "seconds is -1 and must be a number from 0"),
    ({"base_fingerprint": 5}, "base_fingerprint is 5 and must be text or null"),
    ({"method": {}}, "method is {} and must be text"),
    ({"prompts": "x"}, "prompts is 'x' and must be an object"),
]


@pytest.mark.parametrize(("changes", "message"), FLAGS)
def test_recorded_values_have_types_and_ranges(files, tmp_path, changes, message):
    checkpoint = record(tmp_path / "c", **changes)
    (problem,) = problems_of(evaluate.evaluate, **evaluation(files, checkpoint))
    assert problem.startswith(f"{checkpoint}/minionerec.json") and message in problem and "correct it there" in problem


@pytest.mark.parametrize("content", ["[1]", "5", "{", "[" * 100_000, "\ud800"])
def test_a_record_that_is_no_object(files, tmp_path, content):
    checkpoint = record(tmp_path / "c")
    (checkpoint / "minionerec.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    (problem,) = problems_of(evaluate.evaluate, **evaluation(files, checkpoint))
    assert problem.startswith(f"{checkpoint}/minionerec.json: ")


ADAPTERS = [
    ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5 and must be text or null"),
    ({"peft_type": ["LORA"]}, "peft_type is ['LORA'] and must be LORA or TRAINABLE_TOKENS"),
    ({"peft_type": "FOO"}, "peft_type is 'FOO' and must be LORA or TRAINABLE_TOKENS"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS' and must be CAUSAL_LM or null"),
    ({"r": "8"}, "r is '8' and must be a whole number"),
    ({"r": 400_000_000}, "has rank 400000000, and its weights have 4 at most"),
    ({"rank_pattern": {"q_proj": 400_000_000}}, "has rank 400000000, and its weights have 4 at most"),
    ({"rank_pattern": [1]}, "rank_pattern is [1] and must be an object of ranks"),
    ({"lora_alpha": "x"}, "lora_alpha is 'x' and must be a number"),
    ({"target_modules": {}}, "target_modules is {} and must be a list of names"),
    ({"megatron_config": {"x": 1}, "megatron_core": "os"}, "megatron_config is {'x': 1} and must be null"),
    ({"layer_replication": [[0, 2]] * 9}, "layer_replication is [[0, 2]"),
]


@pytest.mark.parametrize(("changes", "message"), ADAPTERS)
def test_an_adapters_configuration_is_checked(files, tmp_path, changes, message):
    base, adapter = record(tmp_path / "b"), record(tmp_path / "c")
    config = {"base_model_name_or_path": "hub/base", "peft_type": "LORA", "r": 4, "lora_alpha": 8, **changes}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    save_file({"q_proj.lora_A.weight": torch.zeros(4, 8)}, adapter / "adapter_model.safetensors")
    ranking = evaluation(files, adapter)
    rewards = {"model_path": adapter, "output_dir": tmp_path / "rl", "use_lora": True}
    for command, flags in (
        (evaluate.evaluate, ranking),
        (evaluate.evaluate, {**ranking, "base_model": base, "adapter": adapter}),
        (merge_lora.merge, {"adapter": adapter, "output_dir": tmp_path / "m"}),
        (merge_lora.merge, {"adapter": adapter, "output_dir": tmp_path / "m", "base_model": "hub/base"}),
        (rl.train, rewards),
        (rl.train, {**rewards, "base_model": "hub/base"}),
    ):
        found = [line for line in problems_of(command, **flags) if message in line]
        assert found and all(line.startswith(f"{adapter}/adapter_config.json: ") for line in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_step": "2"}, "global_step is '2' and must be a whole number from 0"),
        ({"global_step": -1}, "global_step is -1"),
        ({"epoch": None}, "epoch is None and must be a number"),
        ({"best_metric": "x"}, "best_metric is 'x' and must be a number or null"),
        ({"best_model_checkpoint": ["x"]}, "best_model_checkpoint is ['x'] and must be text or null"),
        ({"log_history": {}}, "log_history is {} and must be a list of objects"),
        ({"stateful_callbacks": 5}, "stateful_callbacks is 5 and must be an object"),
        ({"colour": "red"}, "['colour'] are not values of a trainer state"),
    ],
)
def test_a_trainer_state_that_cannot_be_resumed(tmp_path, changes, message):
    checkpoint = record(tmp_path / "checkpoint-2")
    state = {"global_step": 2, "max_steps": 4, "epoch": 0.5, "best_metric": float("inf"), "log_history": []}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    run = {"command": "sft", "method": "full", "base_fingerprint": None, "flags": {}}
    flags = RunFlags(output_dir=str(tmp_path), resume_from_checkpoint="True")
    (problem,) = problems_of(resume.resume_point, flags=flags, run=run, say=print)
    assert problem.endswith("has lost its optimizer state; resume from another checkpoint")
    (checkpoint / "optimizer.pt").touch()
    assert resume.resume_point(flags, run, print).path == str(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, **changes}))
    (problem,) = problems_of(resume.resume_point, flags=flags, run=run, say=print)
    assert message in problem and "resume from another checkpoint" in problem


def test_a_record_that_lacks_values_is_of_another_run(tmp_path):
    checkpoint = record(tmp_path / "checkpoint-2")
    (checkpoint / "minionerec.json").write_text('{"seconds": 3}')
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    (checkpoint / "optimizer.pt").touch()
    assert Checkpoint.read(str(checkpoint)).run == {"seconds": 3}
    run = {"command": "sft", "method": "full", "base_fingerprint": None, "flags": {}}
    flags = RunFlags(output_dir=str(tmp_path), resume_from_checkpoint="True")
    with pytest.raises(InputError, match="belongs to a different run: the command is None there, sft here"):
        resume.resume_point(flags, run, print)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 10**9},
        {"length": 10**9},
        {"layers": 10**9},
        {"layers": 1},
        {"heads": 0},
        {"heads": 3},
        {"heads": "x"},
        {"dropout": 7},
        {"colour": "red"},
        {"hidden_size": None},
    ],
)
def test_a_sasrec_model_whose_files_disagree(tmp_path, changes):
    sasrec.save(sasrec.SASRec(["<a>", "<b>"], hidden_size=8), str(tmp_path))
    data = json.loads((tmp_path / "sasrec.json").read_text())
    data["settings"].update(changes)
    (tmp_path / "sasrec.json").write_text(json.dumps(data))
    (problem,) = problems_of(sasrec.load, folder=tmp_path)
    assert problem.startswith(f"--cf_path {tmp_path}: no SASRec model can be loaded: ")


class Attack:
    """Unpickled, it leaves a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_resuming_unpickles_nothing(tmp_path, name):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_of(tmp_path, 8, **settings).train()
    (checkpoint,) = tmp_path.glob("*/checkpoint-1")
    torch.save({"state": Attack(tmp_path / "executed")}, checkpoint / name)
    with pytest.raises(InputError) as error:
        trainer_of(tmp_path, 8, **{**settings, "max_steps": 2}).train(Checkpoint.read(str(checkpoint)))
    assert not (tmp_path / "executed").exists()
    assert f"--resume_from_checkpoint {checkpoint}: a .pt or .pth file there contains more than tensors" in str(
        error.value
    )
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "executed").exists()  # it is one


def test_a_damaged_state_file_is_named(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trainer_of(tmp_path, 8, **settings).train()
    (checkpoint,) = tmp_path.glob("*/checkpoint-1")
    content = (checkpoint / "optimizer.pt").read_bytes()
    (checkpoint / "optimizer.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"a .pt or .pth file there is damaged; resume from another checkpoint"):
        trainer_of(tmp_path, 8, **{**settings, "max_steps": 2}).train(Checkpoint.read(str(checkpoint)))
