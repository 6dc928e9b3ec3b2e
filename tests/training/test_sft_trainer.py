import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from architectures import build
from datasets import Dataset
from models import adapted, examples, trainer_of
from plain import Copies
from transformers import TrainingArguments

import sft
from minionerec.data.examples import Collator
from minionerec.training import sft_trainer
from minionerec.training.row_batches import StepSampler
from minionerec.training.sft_trainer import response_logits, row_losses


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


def test_the_host_does_not_wait_until_a_micro_batch_is_copied(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, 2, "random", seed=5)
    monkeypatch.setattr(TrainingArguments, "device", torch.device("meta"))
    with Copies() as copies:
        next(iter(trainer.get_train_dataloader()))
    assert copies.go_on and all(copies.go_on)


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
