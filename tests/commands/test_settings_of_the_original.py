"""What MiniOneRec's own commands train with, where no flag says it: the same argument list does the same here."""

import pytest
from helpers import rl_flags, sft_flags

import rl
import sft
from minionerec.data.files import read_catalogue
from minionerec.model import loading
from minionerec.training import rl_trainer, sft_trainer


class Stop(Exception):
    """Instead of a training: what it would have been."""


@pytest.fixture
def start(files, base, tmp_path) -> str:
    """A whole checkpoint that knows the SID tokens."""
    model, tokenizer = loading.load_base(base), loading.load_tokenizer(base)
    loading.add_sid_tokens(model, tokenizer, read_catalogue(files["index"], files["item"]).sid_tokens)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def arguments(monkeypatch, module, name: str, command, flags: dict) -> dict:
    def stop(self, *_, **arguments):
        raise Stop(arguments)

    monkeypatch.setattr(getattr(module, name), "__init__", stop)
    with pytest.raises(Stop) as stopped:
        command(**flags)
    return stopped.value.args[0]


def schedule(args, steps: int) -> tuple:
    return args.lr_scheduler_type, args.get_warmup_steps(steps), args.max_grad_norm


def optimizer(args) -> tuple:
    return args.optim.value.split("_fused")[0], args.weight_decay, args.adam_beta1, args.adam_beta2, args.adam_epsilon


@pytest.mark.parametrize(("num_epochs", "warmup"), [(1, 1), (20, 20)])
def test_sft_falls_linearly_after_20_steps(monkeypatch, files, base, tmp_path, num_epochs, warmup):
    flags = sft_flags(files, base, str(tmp_path / "run"), num_epochs=num_epochs)
    args = arguments(monkeypatch, sft_trainer, "SFTTrainer", sft.train, flags)["args"]
    steps = 15 * num_epochs  # 240 examples in steps of 16
    assert schedule(args, steps) == ("linear", warmup, 1.0)
    assert optimizer(args) == ("adamw_torch", 0.0, 0.9, 0.999, 1e-8)


def test_rl_clips_at_0_3_and_warms_up_over_3_percent(monkeypatch, files, start, tmp_path):
    flags = rl_flags(files, start, str(tmp_path / "run"), num_train_epochs=10)
    args = arguments(monkeypatch, rl_trainer, "ReReTrainer", rl.train, flags)["args"]
    assert schedule(args, 100) == ("cosine", 3, 0.3)  # 40 prompts in steps of 4
    assert optimizer(args) == ("adamw_torch", 0.0, 0.9, 0.999, 1e-8)
    assert (args.ref_model_mixup_alpha, args.ref_model_sync_steps, args.scale_rewards) == (0.6, 512, "group")


def test_sample_train_leaves_out_a_fifth(monkeypatch, files, start, tmp_path):
    rows = {}
    for sample_train in (False, True):
        flags = rl_flags(files, start, str(tmp_path / "run"), sample_train=sample_train)
        dataset = arguments(monkeypatch, rl_trainer, "ReReTrainer", rl.train, flags)["train_dataset"]
        rows[sample_train] = [tuple(prompt) for prompt in dataset["prompt"]]
    assert len(rows[False]) == 40 and len(rows[True]) == 32
    assert set(rows[True]) < set(rows[False]) and rows[True] != rows[False][:32]
