"""What a checkpoint keeps of a run: its steps, its log and its best model."""

import json
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from models import make_model, trainer_of
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from minionerec.checkpoint import Checkpoint
from minionerec.errors import InputError
from minionerec.training.resume import newest_checkpoint
from minionerec.training.sft_trainer import SFTTrainer

GROWING = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
GROWING |= {"save_steps": 3, "optim": "adamw_torch"}


class Interrupted(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def interrupted(trainer, step: int):
    """A trainer whose run has ended badly after a step."""
    trainer.add_callback(Interrupted(step))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def resume(trainer):
    """A trainer that has gone on from the newest checkpoint of its folder."""
    trainer.train(Checkpoint.read(newest_checkpoint(trainer.args.output_dir)))
    return trainer


def trained_weights(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("strategy", "optim"), [("random", "adamw_torch"), ("group_by_length", "adamw_torch"), ("random", "adamw_8bit")]
)
def test_a_resumed_run_meets_the_same_steps(tmp_path, strategy, optim):
    growing = {**GROWING, "optim": optim}
    whole = trainer_of(tmp_path / "whole", 2, strategy, count=16, **growing)
    whole.train()
    assert whole.state.global_step == 12
    interrupted(trainer_of(tmp_path / "stopped", 2, strategy, count=16, **growing), 8)
    torch.manual_seed(99)
    resumed = resume(trainer_of(tmp_path / "stopped", 2, strategy, count=16, **growing))
    weights = trained_weights(resumed)
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(whole).items())


def test_the_cost_of_a_resumed_run_is_that_of_the_whole_one(tmp_path):
    """Also where nothing is left to train, which takes little memory and no time."""
    trainer = trainer_of(tmp_path, 2, count=16, **GROWING)
    trainer.train()
    record = Path(newest_checkpoint(trainer.args.output_dir)) / "minionerec.json"
    cost = json.loads(record.read_text())
    assert cost["seconds"] > 0 and cost["peak_memory_gb"] > 0
    record.write_text(json.dumps({**cost, "seconds": 3600.0, "peak_memory_gb": 5000.0}))
    again = trainer_of(tmp_path, 2, count=16, **GROWING)
    again.train(Checkpoint.read(str(record.parent)))
    assert again.seconds > 3600 and again.peak_memory_gb == 5000


def test_a_resumed_run_takes_the_rate_and_the_evaluations_of_its_flags(tmp_path):
    """A third of the rate, and the schedule of twice the epochs; the run is evaluated by its own flag."""
    settings = {**GROWING, "lr_scheduler_type": "linear", "eval_strategy": "steps", "eval_steps": 0.25}
    interrupted(trainer_of(tmp_path, 2, count=16, **settings), 8)
    changed = {**settings, "learning_rate": 3e-3, "num_train_epochs": 6, "eval_steps": 0.5}
    resumed = resume(trainer_of(tmp_path, 2, count=16, **changed))
    log = resumed.state.log_history
    rates = {entry["step"]: entry["learning_rate"] for entry in log if "learning_rate" in entry}
    expected = {step: (1e-2 * (13 - step) / 12 if step < 7 else 3e-3 * (25 - step) / 24) for step in range(1, 25)}
    assert rates == pytest.approx(expected)
    assert [entry["step"] for entry in log if "eval_loss" in entry] == [3, 6, 12, 24]


def test_a_finished_run_that_goes_on_takes_the_rate_of_its_longer_schedule_at_once(tmp_path):
    """The schedule of one epoch ended at 0."""
    settings = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "steps", "lr_scheduler_type": "linear"}
    trainer_of(tmp_path, 2, count=2, **settings).train()
    resumed = resume(trainer_of(tmp_path, 2, count=2, **{**settings, "num_train_epochs": 2}))
    rates = [entry["learning_rate"] for entry in resumed.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2, 5e-3])


def test_the_log_of_a_resumed_run_is_that_of_the_whole_one(tmp_path):
    """Its checkpoint is of step 6, and its log has entries at 5 and 10: the losses of step 6 count in the second."""
    logs = []
    for folder, stop in (("whole", None), ("parts", 8), ("parts", None)):
        trainer = trainer_of(tmp_path / folder, 2, "random", count=16, **{**GROWING, "logging_steps": 5})
        if stop:
            trainer.add_callback(Interrupted(stop))
        newest = newest_checkpoint(trainer.args.output_dir)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            trainer.train(Checkpoint.read(newest) if newest else None)
        keys = ("step", "loss", "grad_norm", "train_loss")
        logs.append([[entry.get(key) for key in keys] for entry in trainer.state.log_history])
    assert logs[2] == logs[0] and [entry[0] for entry in logs[0]] == [5, 10, 12]


@pytest.mark.parametrize(
    "unlogged",
    [
        5,
        {"total": 1.0},
        {"total": "1", "loss": 0.0, "step": 1},
        {"total": 1, "loss": 0, "step": 1, "metrics": {"a": 1}},
    ],
)
def test_what_a_checkpoint_has_not_logged_is_checked(tmp_path, unlogged):
    (tmp_path / "minionerec.json").write_text(json.dumps({"unlogged": unlogged}))
    with pytest.raises(InputError, match=r"unlogged is .* and must be an object with the numbers total, loss and step"):
        Checkpoint.read(str(tmp_path))


WATCHED = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
WATCHED |= {"save_total_limit": 2, "restore_callback_states_from_checkpoint": True}


def watched(folder, losses: list[float], **more) -> SFTTrainer:
    """A trainer whose evaluations, one every 2 steps, give these losses."""
    trainer = trainer_of(folder, 2, "random", 16, **{**GROWING, **WATCHED, "save_steps": 2, "eval_steps": 2, **more})

    def losses_of(model, inputs):
        found, row = type(trainer)._losses(trainer, model, inputs)
        if not model.training:
            found = torch.full_like(found, losses[trainer.state.global_step // 2 - 1])
        return found, row

    trainer._losses = losses_of
    return trainer


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_moved_run_finds_its_best_checkpoint(tmp_path, monkeypatch, capfd, absolute, copied):
    monkeypatch.chdir(tmp_path)
    losses = [5.0, 1.0, 4.0, 3.0, 2.0, 2.5]  # the best is of step 4
    whole = watched("whole", losses)
    whole.train()
    stopped = interrupted(watched("before", losses), 8)
    assert stopped.best_checkpoint == "checkpoint-4"
    (shutil.copytree if copied else shutil.move)("before", "after")
    resumed = watched("after", losses)
    folder = resumed.args.output_dir
    assert not os.path.isabs(folder)
    resumed.train(Checkpoint.read(newest_checkpoint(os.path.abspath(folder) if absolute else folder)))
    assert resumed.state.best_model_checkpoint == os.path.join(folder, "checkpoint-4")
    assert resumed.best_checkpoint == "checkpoint-4"
    assert sorted(os.listdir(folder)) == ["checkpoint-12", "checkpoint-4"]  # the best is kept when others go
    weights = trained_weights(resumed)
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(whole).items())
    assert "est checkpoint" not in "".join(capfd.readouterr())


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path, capfd):
    stopped = interrupted(watched(tmp_path, [1.0, 2.0, 3.0]), 5)
    shutil.rmtree(stopped.state.best_model_checkpoint)
    resumed = resume(watched(tmp_path, [1.0, 2.0, 3.0], max_steps=6))
    assert resumed.best_checkpoint is None
    assert "checkpoint-2, no longer exists" in capfd.readouterr().out


def test_a_best_checkpoint_is_found_in_the_folder_that_the_run_came_from(tmp_path, capfd):
    """It resumed from there into a new one, and has been stopped since."""
    trainer = trainer_of(tmp_path, 2)
    best, newest = tmp_path / "old" / "checkpoint-2", os.path.join(trainer.args.output_dir, "checkpoint-4")
    for folder, step in ((str(best), 2), (newest, 4)):
        os.makedirs(folder)
        state = TrainerState(global_step=step, best_global_step=2, best_model_checkpoint=str(best), train_batch_size=2)
        state.save_to_json(os.path.join(folder, "trainer_state.json"))
    trainer._init_training_state(12, 4, 3, newest, None)
    assert trainer.state.best_model_checkpoint == str(best)
    assert "no longer exists" not in capfd.readouterr().out


def test_a_run_that_stopped_early_has_nothing_left_to_train(tmp_path, capfd):
    runs = []
    for resume in (False, True):
        trainer = watched(tmp_path, [1.0, 2.0, 3.0, 0.5])
        trainer.add_callback(EarlyStoppingCallback(2))
        trainer.train(Checkpoint.read(newest_checkpoint(trainer.args.output_dir)) if resume else None)
        assert (trainer.state.global_step, trainer.best_checkpoint) == (6, "checkpoint-2")
        runs.append(trained_weights(trainer))
        assert ("/checkpoint-6 is of a run that stopped early" in capfd.readouterr().out) == resume
    assert all(torch.equal(runs[1][name], weight) for name, weight in runs[0].items())


def test_a_tied_head_is_not_called_missing(tmp_path, monkeypatch):
    trainer, warned = trainer_of(tmp_path, 4), []
    trainer.model = make_model("qwen2", tie_word_embeddings=True)
    monkeypatch.setattr(transformers.trainer.logger, "warning", warned.append)
    saved = {name: tensor for name, tensor in trainer.model.state_dict().items() if name != "lm_head.weight"}
    trainer._issue_warnings_after_load(trainer.model.load_state_dict(saved, strict=False))
    assert not warned
    del saved["model.norm.weight"]
    trainer._issue_warnings_after_load(trainer.model.load_state_dict(saved, strict=False))
    assert len(warned) == 1 and "['model.norm.weight']" in warned[0]
