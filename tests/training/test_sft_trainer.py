import itertools
import json
import os
import shutil
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import PartialState, skip_first_batches
from architectures import build
from datasets import Dataset
from models import adapted, examples, make_model, trainer_of
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback

import sft
from minionerec.checkpoint import Checkpoint
from minionerec.data.examples import Collator
from minionerec.errors import InputError
from minionerec.training import sft_trainer
from minionerec.training.finish import save_final
from minionerec.training.resume import newest_checkpoint
from minionerec.training.row_batches import RowBatches, StepSampler
from minionerec.training.sft_trainer import SFTTrainer, response_logits, row_losses


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "llama", "mistral", "gemma2", "phi3", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_label_only_loss_equals_the_ordinary_one(architecture, tied, method):
    batch = Collator(0)(examples(6))
    losses, gradients = [], []
    for label_only in (False, True):
        model = adapted(architecture, tied, method)
        if label_only:
            logits, targets = response_logits(model, batch)
            assert logits.shape == (int((batch["labels"] != -100).sum()), 96)
            loss = F.cross_entropy(logits.float(), targets)
        else:
            padding = (batch["input_ids"] != 0).long()  # no example holds token 0
            loss = model(**batch, attention_mask=padding).loss
        loss.backward()
        losses.append(loss.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(losses[0], losses[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-4)


def one_step(tmp_path, *settings):
    trainer = trainer_of(tmp_path, *settings)
    trainer.train()
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer.state.log_history[0]["loss"], weights


def test_accumulation_and_grouping_by_length_change_nothing(tmp_path):
    loss, weights = one_step(tmp_path, 8)
    start = {n: p for n, p in adapted("qwen2", True, "lora").named_parameters() if p.requires_grad}
    assert all(not torch.equal(weights[name], start[name]) for name in weights)
    for micro_batch_size, strategy in ((1, "sequential"), (2, "sequential"), (2, "group_by_length"), (2, "random")):
        other_loss, other = one_step(tmp_path, micro_batch_size, strategy)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other[name], weight, atol=1e-6, rtol=1e-5)


def test_the_examples_of_a_step_stand_from_the_longest_to_the_shortest():
    lengths = torch.randint(5, 50, (103,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = StepSampler(lengths, 16, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(103)) and order == list(sampler)
        steps = [order[start : start + 16] for start in range(0, 103, 16)]
        for step in steps:
            assert [lengths[i] for i in step] == sorted((lengths[i] for i in step), reverse=True)
        epochs.append([set(step) for step in steps])
    assert epochs[0] != epochs[1]
    # Which examples make a step does not depend on their lengths: that would make its gradient another one.
    alike = StepSampler([1] * 103, 16, seed=3)
    order = list(alike)
    assert [set(order[start : start + 16]) for start in range(0, 103, 16)] == epochs[0]
    assert list(StepSampler(lengths, 16, seed=4)) != list(StepSampler(lengths, 16, seed=3))


def test_training_takes_its_examples_in_that_order(tmp_path):
    trainer = trainer_of(tmp_path, 2, "random", seed=5)
    loader = trainer.get_train_dataloader()
    for epoch in range(2):
        sampler = StepSampler(trainer.train_dataset["length"], 8, seed=5)
        sampler.set_epoch(epoch)
        expected = [trainer.train_dataset[i]["input_ids"] for i in sampler]
        loader.set_epoch(epoch)
        taken = [ids[ids != 0].tolist() for batch in loader for ids in batch["input_ids"]]
        assert taken == expected


def test_processes_take_every_row_once_and_as_many_micro_batches():
    for rows, micro_rows, processes in itertools.product((1, 2, 5, 16, 23), (1, 3, 4), (1, 2, 3, 8)):
        sampler = StepSampler([1] * rows, micro_rows * processes, seed=3)
        shares = [RowBatches(sampler, micro_rows, processes, process) for process in range(processes)]
        for epoch in range(2):
            for batches in shares:
                batches.set_epoch(epoch)
            taken = [list(batches) for batches in shares]
            assert {len(batches) for batches in taken} == {len(batches) for batches in shares} == {len(taken[0])}
            in_turn = [row for turn in zip(*taken, strict=True) for batch in turn for row in batch]
            assert in_turn == list(sampler) and sorted(in_turn) == list(range(rows))


def test_a_resumed_process_goes_on_where_it_stopped():
    loader = DataLoader(
        range(23), batch_sampler=RowBatches(StepSampler([1] * 23, 12, seed=3), 2, 3, 1), collate_fn=list
    )
    assert list(skip_first_batches(loader, 2)) == list(loader)[2:]


@pytest.mark.parametrize("architecture", ["qwen2", "gpt2", "rwkv", "mamba2", "lfm2", "qwen3_next", "mpt"])
def test_a_micro_batch_without_rows_has_a_gradient_of_zero(architecture):
    """Of every weight, since the processes add up theirs."""
    model = build(architecture).train()
    row_losses(model, Collator(0)(examples(2)))[0].sum().backward()
    used = {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    row_losses(model, Collator(0)([]))[0].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == used and not any(gradient.any() for gradient in gradients.values())


def test_grouped_by_length_steps_are_of_similar_length():
    lengths = torch.randint(5, 500, (4003,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = StepSampler(lengths, 16, seed=3, group_by_length=True)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(4003)) and order == list(sampler)
        assert lengths[order[0]] == max(lengths)
        steps = [[lengths[i] for i in order[start : start + 16]] for start in range(0, 4000, 16)]
        assert all(step == sorted(step, reverse=True) for step in steps)
        assert sum(step[0] - step[-1] for step in steps) / len(steps) < 15  # of 495 tokens; at random it is 440
        epochs.append(order)
    assert epochs[0] != epochs[1]


GROWING = {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2, "save_strategy": "steps"}
GROWING |= {"save_steps": 3, "optim": "adamw_torch"}


class Interrupted(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


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
    stopped = trainer_of(tmp_path / "stopped", 2, strategy, count=16, **growing)
    stopped.add_callback(Interrupted(8))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    torch.manual_seed(99)
    resumed = trainer_of(tmp_path / "stopped", 2, strategy, count=16, **growing)
    resumed.train(Checkpoint.read(newest_checkpoint(resumed.args.output_dir)))
    weights = trained_weights(resumed)
    assert all(torch.equal(weights[name], weight) for name, weight in trained_weights(whole).items())


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
    stopped = watched("before", losses)
    stopped.add_callback(Interrupted(8))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
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
    stopped = watched(tmp_path, [1.0, 2.0, 3.0])
    stopped.add_callback(Interrupted(5))
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    shutil.rmtree(stopped.state.best_model_checkpoint)
    resumed = watched(tmp_path, [1.0, 2.0, 3.0], max_steps=6)
    resumed.train(Checkpoint.read(newest_checkpoint(resumed.args.output_dir)))
    assert resumed.best_checkpoint is None
    assert "checkpoint-2, no longer exists" in capfd.readouterr().out


def test_a_run_that_stopped_early_has_nothing_left_to_train(tmp_path):
    runs = []
    for resume in (False, True):
        trainer = watched(tmp_path, [1.0, 2.0, 3.0, 0.5])
        trainer.add_callback(EarlyStoppingCallback(2))
        trainer.train(Checkpoint.read(newest_checkpoint(trainer.args.output_dir)) if resume else None)
        assert (trainer.state.global_step, trainer.best_checkpoint) == (6, "checkpoint-2")
        runs.append(trained_weights(trainer))
    assert all(torch.equal(runs[1][name], weight) for name, weight in runs[0].items())


def test_validation_takes_the_longest_rows_first_and_gives_the_same_loss(tmp_path, monkeypatch):
    losses = []
    for rows in (1, 3, 8):
        trainer = trainer_of(tmp_path, 8, per_device_eval_batch_size=rows)
        widths, losses_of = [], trainer._losses
        monkeypatch.setattr(
            trainer, "_losses", lambda *args, f=losses_of, w=widths: w.append(args[1]["input_ids"].shape[1]) or f(*args)
        )
        losses.append(trainer.evaluate()["eval_loss"])
        assert widths == sorted(widths, reverse=True) and widths[0] == max(trainer.eval_dataset["length"])
    each = []
    for example in examples(8):
        logits, targets = response_logits(trainer.model, Collator(0)([example]))
        each.append(F.cross_entropy(logits.float(), targets).item())
    assert losses == pytest.approx([sum(each) / len(each)] * 3, rel=1e-5)


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


def test_a_final_checkpoint_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    final = tmp_path / "final_checkpoint"
    trainer = trainer_of(tmp_path, 8)
    save_model = trainer.save_model

    def interrupted(folder):
        save_model(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_final(trainer, str(final))
    assert not final.exists()
    (tmp_path / "final_checkpoint.partial" / "leftover").touch()
    monkeypatch.setattr(trainer, "save_model", save_model)
    save_final(trainer, str(final))
    assert {"adapter_config.json", "adapter_model.safetensors", "minionerec.json"} <= {f.name for f in final.iterdir()}
    assert not (final / "leftover").exists()
    assert not (tmp_path / "final_checkpoint.partial").exists()


@pytest.mark.parametrize("merged", [True, False])
def test_a_trial_of_the_largest_micro_batch_leaves_nothing_behind(monkeypatch, merged):
    model, rows = adapted("qwen2", True, "lora").train(), Dataset.from_list(examples(16))
    sizes = (1, 16, 8, 1, 0, PartialState(cpu=True))
    trees = sft_trainer.plan_trees(model, rows, rows, *sizes) if merged else None
    random = torch.get_rng_state()
    assert sft_trainer.fits(model, rows, trees, 8, 0)

    def too_large(*_):
        torch.rand(3)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(sft_trainer, "tree_losses" if merged else "row_losses", too_large)
    assert not sft_trainer.fits(model, rows, trees, 8, 0)
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [sft.next_smaller(rows, 96) for rows in (96, 32, 3, 2)] == [48, 16, 1, 1]
