"""Random settings of SFT against one row at a time: architectures, methods, batches, trees and rows of all kinds.

`FUZZ_SEEDS=500 pytest tests/training/test_sft_fuzz.py` tries more of them.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from accelerate import PartialState
from architectures import CHANGES, build
from datasets import Dataset
from models import IDS, METHODS, QUIET, flags_of, gradients_by_rows
from plain import fuzz_seeds
from transformers import TrainerCallback, TrainingArguments

import lora_utils
from minionerec.data.examples import Collator
from minionerec.errors import InputError
from minionerec.model import architecture, loading, token_trees
from minionerec.training.reference import disable_dropout
from minionerec.training.sft_trainer import SFTTrainer, plan_trees

RANDOM = {"phimoe"}  # its router draws experts at random in training


@dataclass
class Setting:
    """What a seed stands for."""

    seed: int
    name: str = ""
    method: str = ""
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self):
        chance = np.random.default_rng(self.seed)
        self.name = str(chance.choice([name for name in CHANGES if name not in RANDOM]))
        self.method = str(chance.choice(list(METHODS)))
        self.micro_batch_size = int(chance.integers(1, 5))
        self.batch_size = self.micro_batch_size * int(chance.integers(1, 5))
        self.pack_rows = int(chance.choice([0, 1, 3, 8]))
        self.block = int(chance.choice([8, 16, 128]))
        self.rows = random_rows(chance, int(chance.integers(1, 15)))


def random_rows(chance: np.random.Generator, count: int) -> list[dict]:
    """Rows that share beginnings, some of them equal, some with a response of one token or a prompt of one."""
    rows, beginnings = [], [chance.integers(1, 96, length).tolist() for length in (4, 12)]
    for _ in range(count):
        if rows and chance.random() < 0.2:
            rows.append(dict(rows[chance.integers(len(rows))]))
            continue
        beginning = beginnings[chance.integers(2)][: chance.integers(1, 13)] if chance.random() < 0.7 else []
        ids = [*beginning, *chance.integers(1, 96, chance.integers(2, 12)).tolist()]
        ids[chance.integers(len(ids))] = int(chance.choice(IDS))
        response = 1 if chance.random() < 0.3 else int(chance.integers(1, len(ids)))
        rows.append({"input_ids": ids, "prompt_length": len(ids) - response, "length": len(ids)})
    return rows


class Gradients(TrainerCallback):
    """Keeps the gradients of every step."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


def model_of(setting: Setting, folder):
    flags, model = flags_of(setting.method), build(setting.name)
    if flags.bits < 16:
        model.save_pretrained(folder)
        model = loading.load_base(str(folder), lora_utils.quantization_config(flags))
    architecture.freeze_non_text_modules(model)
    torch.manual_seed(4)
    freeze = setting.method == "freeze_LLM"
    model = lora_utils.train_sid_rows_only(model, IDS) if freeze else lora_utils.adapt(model, flags, IDS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and setting.method != "full" and "magnitude" not in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    disable_dropout(model)
    return model


def trained(setting: Setting, model, folder) -> tuple[SFTTrainer, Gradients]:
    """An epoch whose steps have a learning rate of 0."""
    dataset, gradients, state = Dataset.from_list(setting.rows), Gradients(), PartialState(cpu=True)
    sizes = setting.batch_size, setting.micro_batch_size, 1
    trees = plan_trees(model, dataset, dataset, setting.pack_rows, *sizes, seed=setting.seed, state=state)
    args = TrainingArguments(
        **QUIET, output_dir=str(folder), per_device_train_batch_size=setting.micro_batch_size, num_train_epochs=1,
        per_device_eval_batch_size=setting.micro_batch_size, learning_rate=0.0, optim="sgd", max_grad_norm=0.0,
        gradient_accumulation_steps=trees.accumulation if trees else setting.batch_size // setting.micro_batch_size,
        logging_steps=1, bf16=flags_of(setting.method).bits < 16, dataloader_pin_memory=False, seed=setting.seed,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, run={}, args=args, train_batches=trees, data_collator=Collator(0), train_dataset=dataset,
        eval_dataset=dataset, callbacks=[gradients],
    )  # fmt: skip
    trainer.train()
    return trainer, gradients


@pytest.mark.slow
@pytest.mark.parametrize("seed", fuzz_seeds(12))
def test_random_settings_train_as_one_row_at_a_time(seed, tmp_path, monkeypatch):
    setting = Setting(seed)
    monkeypatch.setattr(token_trees, "BLOCK", setting.block)
    try:
        trainer, gradients = trained(setting, model_of(setting, tmp_path / "base"), tmp_path / "run")
    except InputError as error:
        pytest.skip(str(error))  # such as DoRA on experts
    trees, bits = trainer.train_batches, flags_of(setting.method).bits
    order = list(trees.sampler if trees else trainer._get_train_sampler())
    steps = [order[start : start + setting.batch_size] for start in range(0, len(order), setting.batch_size)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    twin, error = model_of(setting, tmp_path / "base"), 1e-3 if bits == 16 else 0.15
    for step, loss, found in zip(steps, losses, gradients.steps, strict=True):
        expected_loss, expected = gradients_by_rows(twin, setting.rows, step, bits)
        assert loss == pytest.approx(expected_loss, rel=error / 10), setting
        assert found.keys() == expected.keys()
        whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
        for name, gradient in expected.items():
            assert (found[name] - gradient).norm() <= error * gradient.norm() + error / 10 * whole, (name, setting)
    means = [gradients_by_rows(twin, setting.rows, [i], bits)[0] for i in range(len(order))]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(np.mean(means), rel=error / 10), setting
