"""Which checkpoints a run resumes from: those of 0.1.0, for which two stored runs stand, and those of this release."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import ROOT, logged, refused, succeed, tensors_of
from models import trainer_of
from recorded import problems_of, resumable
from safetensors.torch import load_file

from minionerec import __version__
from minionerec.checkpoint import Checkpoint
from minionerec.data.prompts import load_prompts
from minionerec.errors import InputError
from minionerec.training.resume import resume_point

STORED = ROOT / "tests" / "runs_0_1_0"


def decoded(value: object, tensors: dict[str, torch.Tensor]) -> object:
    """What a state file held: tensors, arrays and long tuples are in `tensors`, by name."""
    if isinstance(value, list):
        return [decoded(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "dict":
        return {key: decoded(one, tensors) for key, one in inner}
    if kind == "tuple":
        return tuple(decoded(one, tensors) for one in inner)
    if kind == "ints":
        return tuple(tensors[inner].tolist())
    return tensors[inner] if kind == "tensor" else tensors[inner].numpy().astype("uint32")


@pytest.fixture
def stored(tmp_path, monkeypatch) -> Path:
    """The stored runs as 0.1.0 left them, in the current folder."""
    shutil.copytree(STORED, tmp_path, dirs_exist_ok=True)
    for folder in tmp_path.glob("*/checkpoint-3"):
        tensors = load_file(folder / "states.safetensors")
        for name, state in json.loads((folder / "states.json").read_text()).items():
            torch.save(decoded(state, tensors), folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = {"command": "sft", "method": "full", "base_fingerprint": None, "flags": {}}


def flags_of(run: Path) -> dict[str, object]:
    flags = json.loads((run / "checkpoint-3" / "minionerec.json").read_text())["flags"]
    given = {name: value for name, value in flags.items() if value not in ("", None)}
    if flags["output_dir"] == "rl":  # recorded, but the checkpoint's own
        del given["cutoff_len"]
    return {**given, "resume_from_checkpoint": True}


@pytest.mark.parametrize("command", ["sft", "rl"])
def test_a_run_of_0_1_0_ends_with_the_weights_that_0_1_0_gave_it(stored, command):
    """SFT: equal to the last digit on the CPU that made them. RL adds up its loss in another order since, which moves
    weights of up to 0.2 by 1.5e-8; so do CPUs with other instructions."""
    run = stored / command
    expected = tensors_of(run / "final_checkpoint")
    shutil.move(run / "final_checkpoint", stored / "start" if command == "rl" else stored / "ended")
    flags = flags_of(run)
    done = succeed(f"{command}.py", **flags)
    assert "resuming from" in done.stdout and "warning" not in done.stdout, done.stdout
    found = tensors_of(run / "final_checkpoint")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
    assert logged(run, "loss") == pytest.approx(logged(STORED / command, "loss"), abs=1e-6)
    record = json.loads((run / "final_checkpoint" / "minionerec.json").read_text())
    assert (record["version"], record["processes"]) == (__version__, 1)


def test_a_run_of_0_1_0_does_not_resume_with_a_rate_for_sid_rows(stored):
    flags = {**flags_of(stored / "sft"), "sid_learning_rate": 3e-3}
    refused("sft.py", "--sid_learning_rate is 0.0 there, 0.003 here", **flags)
    refused("sft.py", "has no optimizer state for SID rows alone", **flags)


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
    checkpoint = tmp_path / "checkpoint-2"
    state = {"global_step": 2, "max_steps": 4, "epoch": 0.5, "best_metric": float("inf"), "log_history": []}
    flags = resumable(checkpoint, SMALL, state=json.dumps(state))
    (problem,) = problems_of(resume_point, flags=flags, run=SMALL, say=print)
    assert problem.endswith("has lost its optimizer state; resume from another checkpoint")
    (checkpoint / "optimizer.pt").touch()
    assert resume_point(flags, SMALL, print).path == str(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({**state, **changes}))
    (problem,) = problems_of(resume_point, flags=flags, run=SMALL, say=print)
    assert message in problem and "resume from another checkpoint" in problem


def test_a_record_that_lacks_values_is_of_another_run(tmp_path):
    flags = resumable(tmp_path / "checkpoint-5", {"seconds": 3}, "optimizer.pt")
    assert Checkpoint.read(str(tmp_path / "checkpoint-5")).run == {"seconds": 3}
    with pytest.raises(InputError, match="belongs to a different run: the command is None there, sft here"):
        resume_point(flags, SMALL, print)


def test_a_checkpoint_without_a_record_is_resumed_with_a_warning(tmp_path, capsys):
    flags = resumable(tmp_path / "checkpoint-5", None, "optimizer.pt")
    assert resume_point(flags, SMALL, print).path == str(tmp_path / "checkpoint-5")
    assert f"warning: {tmp_path}/checkpoint-5 records no flags and no wording" in capsys.readouterr().out


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


RUN = {
    "command": "rl",
    "method": "lora",
    "base_fingerprint": "f",
    "flags": {"lora_r": 8, "seed": 1, "use_dora": False},
}
RUN |= {"sid_tokens": "48 tokens, ab", "data": {"train_file": "a file of 5 bytes, ef"}}
RUN["flags"] |= {"train_file": "train.csv", "lora_alpha": 16, "lora_target_modules": "all", "use_rslora": False}
RUN["flags"]["load_in_8bit"] = False


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"command": "sft"}, "the command is rl there, sft here"),
        ({"method": "full"}, "the method is lora there, full here"),
        ({"base_fingerprint": "g"}, "the base is f there, g here"),
        ({"flags": {**RUN["flags"], "lora_r": 4}}, "--lora_r is 8 there, 4 here"),
        ({"sid_tokens": "51 tokens, cd"}, "the list of SID tokens is 48 tokens, ab there, 51 tokens, cd here"),
        ({"flags": {**RUN["flags"], "best_by": "hr"}}, "--best_by is ndcg there, hr here"),  # of an older release
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed, message):
    said, flags = [], resumable(tmp_path / "checkpoint-5", RUN, "optimizer.pt")
    assert resume_point(flags, {**RUN, "flags": {**RUN["flags"], "seed": 2}}, said.append)
    assert said[-1].startswith("warning: --seed is 2 here and was 1 up to ")
    assert resume_point(flags, {**RUN, "flags": {**RUN["flags"], "pack_rows": 16}}, said.append)
    assert said[-1].endswith("does not record it") and "--pack_rows is 16 here" in said[-1]
    assert resume_point(flags, {**RUN, "data": {"train_file": "a file of 5 bytes, f0"}}, said.append)
    assert said[-1].startswith("warning: --train_file train.csv: its content is not what it was up to ")
    with pytest.raises(InputError, match=message):
        resume_point(flags, {**RUN, **changed}, said.append)


def test_another_wording_in_the_same_prompt_file_is_said(tmp_path):
    run = {**RUN, "prompts": load_prompts("bolts").to_json()}
    run["flags"] = {**RUN["flags"], "prompt_file": "prompts.json"}
    said, flags = [], resumable(tmp_path / "checkpoint-5", run, "optimizer.pt")
    assert resume_point(flags, run, said.append) and not said[1:]
    other = {**run, "prompts": {**run["prompts"], "template": "{instruction} {input}\n"}}
    assert resume_point(flags, other, said.append)
    assert said[-1] == f"warning: the wording of the prompts is not what it was up to {tmp_path}/checkpoint-5"


def test_a_truncated_checkpoint_is_never_resumed(tmp_path):
    for step, state in ((5, '{"global_step": 5}'), (10, '{"global_step": 10, "log_his')):
        flags = resumable(tmp_path / f"checkpoint-{step}", None, "optimizer.pt", state=state)
    said = []
    assert resume_point(flags, RUN, said.append).path == str(tmp_path / "checkpoint-5")
    with pytest.raises(InputError, match="is not a complete checkpoint"):
        resume_point(replace(flags, resume_from_checkpoint=str(tmp_path / "checkpoint-10")), RUN, said.append)
    assert json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())["global_step"] == 5


def test_no_later_checkpoint_is_left_behind(tmp_path):
    """A stop would name it, and True would take it, instead of what was trained since."""
    for step in (5, 10):
        state = json.dumps({"global_step": step})
        flags = resumable(tmp_path / f"checkpoint-{step}", RUN, "optimizer.pt", state=state)
    flags = replace(flags, resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    (problem,) = problems_of(resume_point, flags=flags, run=RUN, say=print)
    assert f"{tmp_path} holds a later checkpoint, {tmp_path}/checkpoint-10, which" in problem
    for good in (
        replace(flags, output_dir=str(tmp_path / "new")),
        replace(flags, resume_from_checkpoint=str(tmp_path / "checkpoint-10")),
    ):
        assert resume_point(good, RUN, print).path == good.resume_from_checkpoint
