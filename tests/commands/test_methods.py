"""What holds for every method: full, freeze_LLM, LoRA and DoRA on 16, 8 and 4 bits."""

import json
import shutil

import pytest
import torch
from architectures import build
from helpers import evaluate_flags, refused, rl_flags, run_command, sft_flags
from models import METHODS, check_last_step, examples, flags_of, make_model, model_of, rl_trainer, tree_trainer
from processes import start
from transformers.training_args import OptimizerNames

import lora_utils
from minionerec.decoding.probe import probe
from minionerec.errors import InputError
from minionerec.flags import OPTIMIZERS
from minionerec.model import loading

RL = [method for method in METHODS if method != "freeze_LLM"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("base"))
    make_model(scale=2.0, tie_word_embeddings=False, num_hidden_layers=1).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_a_last_step_with_fewer_rows_than_micro_batches(tiny, tmp_path, method):
    check_last_step(tiny, tmp_path, method)


@pytest.mark.slow
def test_a_last_step_with_fewer_rows_than_micro_batches_of_two_processes(tiny, tmp_path):
    started = start("last_steps", tiny, tmp_path, ranks=2)  # all methods
    assert started.wait() == [0, 0], started.errors[-3000:]


@pytest.mark.parametrize("method", METHODS)
def test_every_optimizer_takes_steps_in_sft(tiny, tmp_path, method):
    bits = flags_of(method).bits
    trainer = tree_trainer(model_of(method, tiny), tmp_path, examples(6), 2, 2, bits=bits, optim="adamw_8bit")
    trainer.train()
    assert trainer.state.global_step == 3
    every_optimizer_takes_steps(trainer)


@pytest.mark.parametrize("method", RL)
def test_every_optimizer_takes_steps_in_rl(tiny, tmp_path, method):
    bits = flags_of(method).bits
    trainer = rl_trainer(
        model_of(method, tiny), tmp_path, method != "full", bits, optim="paged_adamw_8bit", max_steps=3
    )
    trainer.train()
    assert trainer.state.global_step == 3
    every_optimizer_takes_steps(trainer)


def every_optimizer_takes_steps(trainer) -> None:
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for optim in OPTIMIZERS:
        trainer.args.optim, trainer.optimizer = OptimizerNames(optim), None
        optimizer = trainer.create_optimizer()
        before = {name: p.detach().clone() for name, p in trained.items()}
        for _ in range(3):
            for parameter in trained.values():
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        for name, parameter in trained.items():
            assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), (optim, name)


PAIR = "DoRA (--use_dora) does not work on an 8-bit base (--load_in_8bit) on a CPU"


def test_dora_on_8_bits_is_refused_on_a_cpu(files, base, sft_run, tmp_path):
    flags = {"use_lora": True, "load_in_8bit": True, "use_dora": True}
    rl = rl_flags(files, sft_run("full") / "final_checkpoint", tmp_path / "a", **flags)
    for dry_run in (False, True):
        refused("sft.py", PAIR, **sft_flags(files, base, tmp_path / "a", **flags, dry_run=dry_run))
        refused("rl.py", PAIR, **{**rl, "dry_run": dry_run})
    done = run_command("sft.py", **sft_flags(files, base, tmp_path / "a", **flags, dry_run=True, gpu_memory="12GB"))
    assert done.returncode == 0, done.stderr  # for a card that is elsewhere

    # An adapter that was trained so on a GPU.
    trained = tmp_path / "trained"
    shutil.copytree(sft_run("lora") / "final_checkpoint", trained)
    for name in ("adapter_config.json", "minionerec.json"):
        content = json.loads((trained / name).read_text())
        content.get("flags", content).update(flags)
        (trained / name).write_text(json.dumps(content))
    refused("rl.py", PAIR, **rl_flags(files, trained, tmp_path / "a", use_lora=True, load_in_8bit=True))
    refused("evaluate.py", PAIR, **evaluate_flags(files, tmp_path / "a", base_model=trained))
    assert not (tmp_path / "a").exists()


def test_an_orthogonal_start_needs_an_even_rank_and_an_unquantized_base(files, base, tmp_path):
    flags = sft_flags(files, base, tmp_path / "a", init_lora_weights="orthogonal", lora_r=7)
    refused("sft.py", "--init_lora_weights orthogonal: needs an even rank, not --lora_r 7", **flags, use_lora=True)
    for bits, method in ((4, {"use_qlora": True}), (8, {"use_lora": True, "load_in_8bit": True})):
        refused("sft.py", f"--init_lora_weights orthogonal: PEFT has none for a base in {bits} bits", **flags, **method)


def test_a_model_that_does_not_run_in_8_bits_is_not_blamed(tmp_path):
    build("deepseek_v3").save_pretrained(tmp_path)
    model = loading.load_base(str(tmp_path), lora_utils.quantization_config(flags_of("lora on 8 bits")))
    with pytest.raises(InputError, match=r"cannot be run: .*; leave out --load_in_8bit"):
        probe(model)
