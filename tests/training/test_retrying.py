"""Memory that runs out: steps and evaluations go on in smaller parts, and give what they would have given."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from helpers import rl_flags, sft_flags, succeed
from models import QUIET, examples, model_of, tree_trainer
from processes import assert_same_run, two_processes
from transformers import TrainingArguments

from minionerec.data.examples import Collator
from minionerec.training import retrying
from minionerec.training.sft_trainer import SFTTrainer


def row_trainer(model, output_dir, rows, **settings) -> SFTTrainer:
    """A trainer of one epoch over separate rows, two micro-batches of four a step."""
    args = TrainingArguments(
        **QUIET, output_dir=str(output_dir), logging_steps=1, gradient_accumulation_steps=2, num_train_epochs=1,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, dataloader_pin_memory=False, max_grad_norm=0.0,
        **settings,
    )  # fmt: skip
    dataset = Dataset.from_list(rows)
    return SFTTrainer(
        model=model, run={}, args=args, data_collator=Collator(0), train_dataset=dataset, eval_dataset=dataset
    )


def runs_out(trainer: SFTTrainer, most: int, backward: bool) -> None:
    """From the second micro-batch of the second step on, more than `most` rows do not fit: the error comes after the
    loss, or after the backward pass has added to all gradients."""
    losses, back, seen = trainer._losses, trainer.accelerator.backward, []

    def too_large(in_backward: bool) -> bool:
        late = trainer.state.global_step >= 1 and len(trainer._of_step) > 1
        return late and seen[-1] > most and in_backward == backward

    def limited(model, inputs):
        found = losses(model, inputs)
        seen.append(int(found[1].max()) + 1)
        evaluates = not torch.is_grad_enabled()
        if too_large(False) or (evaluates and seen[-1] > most):
            raise torch.OutOfMemoryError
        return found

    def limited_backward(*args, **kwargs):
        back(*args, **kwargs)
        if too_large(True):
            raise torch.OutOfMemoryError

    trainer._losses, trainer.accelerator.backward = limited, limited_backward


SGD = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd"}


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("merged", [True, False])
def test_a_step_that_runs_out_of_memory_trains_the_same_in_halves(base, tmp_path, capsys, merged, backward):
    found = []
    for limited in (False, True):
        rows, model = examples(24), model_of("lora", base)
        trainer = tree_trainer(model, tmp_path, rows, 8, 4) if merged else row_trainer(model, tmp_path, rows, **SGD)
        if limited:
            runs_out(trainer, 2, backward)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        found.append((losses, weights, trainer.evaluate()["eval_loss"]))
    assert trainer.state.global_step == 3 and trainer.halving.parts >= 2 and trainer.eval_halving.parts >= 2
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5) and found[1][2] == pytest.approx(found[0][2], rel=1e-5)
    for name, weight in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], weight, atol=1e-6, rtol=1e-4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("out of memory: ")]
    assert said[0] == "out of memory: micro-batches are computed in 2 parts from here on"


def test_a_row_that_does_not_fit_ends_the_run(base, tmp_path):
    trainer = tree_trainer(model_of("lora", base), tmp_path, examples(16), 8, 4)
    runs_out(trainer, 0, False)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_gradients_of_processes_are_averaged_in_few_messages(monkeypatch):
    """Those of small parameters together, a large one by itself; a process without a gradient counts as 0."""
    model = torch.nn.ModuleList([*(torch.nn.Linear(8, 8, dtype=torch.float32) for _ in range(30))])
    model.append(torch.nn.Linear(64, 64, dtype=torch.float32)).append(torch.nn.Linear(8, 8, dtype=torch.bfloat16))
    model[0].bias.requires_grad_(False)
    monkeypatch.setattr(retrying, "BUCKET", 4 * 64 * 64)
    sent = []

    def with_those_of_two_others(tensor, **_):
        sent.append(tensor.numel())
        tensor.add_(2)

    monkeypatch.setattr(dist, "all_reduce", with_those_of_two_others)
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=3), accelerator=SimpleNamespace(no_sync=nullcontext))
    with retrying.averaged_afterwards(trainer, model):
        for number, parameter in enumerate(model.parameters()):
            if parameter.requires_grad and number % 3:
                parameter.grad = torch.full_like(parameter, 3.0 * number)
    for number, parameter in enumerate(model.parameters()):
        expected = torch.full_like(parameter, number + 2.0 if number % 3 else 2.0)
        assert torch.equal(parameter.grad, expected) if parameter.requires_grad else parameter.grad is None
    assert len(sent) == 4 and sum(sent) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_leaves_no_other_waiting(files, base, tmp_path):
    """The last process does so in the micro-batch after which gradients are averaged."""
    more = {"use_lora": True, "lora_dropout": 0.0, "sample": 40, "num_epochs": 1, "micro_batch_size": "auto"}
    flags = sft_flags(files, base, tmp_path / "one", **more)
    succeed("sft.py", **flags)
    two_processes("torchrun", tmp_path, "sft.py", {**flags, "output_dir": tmp_path / "two"}, "runs_out")
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-5)
    assert (tmp_path / "rank1.parts").read_text() == "2" and (tmp_path / "rank0.parts").read_text() == "1"


@pytest.mark.slow
def test_a_process_that_runs_out_of_memory_in_rl_logs_as_much_as_the_others(files, sft_run, tmp_path):
    """What the first attempt left in the log would be reduced with nothing, and the run would end there."""
    more = {"use_lora": True, "beta": 0.01, "train_batch_size": 8, "num_generations": 4, "sft_weight": 1}
    flags = {**rl_flags(files, sft_run("lora") / "final_checkpoint", tmp_path / "two"), **more, "eval_sample": 20}
    two_processes("torchrun", tmp_path, "rl.py", flags, "runs_out")
    assert (tmp_path / "rank1.parts").read_text() == "4" and (tmp_path / "rank0.parts").read_text() == "8"
    history = json.loads((tmp_path / "two" / "metrics.json").read_text())["history"]
    assert all(entry["entropy"] > 0 for entry in history if "entropy" in entry)
