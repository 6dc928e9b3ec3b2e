"""More than one process: the same curve and metrics as one (RL: test_rl.py, evaluation: test_evaluate.py), the same
adapter on every rank, weights that are shared out, and the engines' configurations."""

import json
import os
import subprocess
import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, run_command, sft_flags
from safetensors.torch import load_file

import lora_utils
from minionerec import modeling


def torchrun(*argv: object) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, *map(str, argv)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("method", ["use_lora", "use_qlora"])
def test_two_processes_train_as_one_does(files, base, tmp_path, method):
    more = {method: True, "lora_dropout": 0.0, "micro_batch_size": 4, "learning_rate": 1e-3}
    one = run_command("sft.py", **sft_flags(files, base, tmp_path / "one", **more))
    assert one.returncode == 0, one.stderr[-3000:]
    flags = sft_flags(files, base, tmp_path / "two", **more)
    torchrun("tests/workers.py", "digests", tmp_path, "sft.py", *(f"--{name}={flags[name]}" for name in flags))

    curves = []
    for run in ("one", "two"):
        history = json.loads((tmp_path / run / "metrics.json").read_text())["history"]
        curves.append([entry[key] for entry in history for key in ("loss", "eval_loss") if key in entry])
    assert len(curves[0]) > 10 and curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert (tmp_path / "rank0").read_text() == (tmp_path / "rank1").read_text()
    one, two = (load_file(tmp_path / run / "final_checkpoint" / "adapter_model.safetensors") for run in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-3 if method == "use_qlora" else 1e-5, rtol=1e-3)


def test_weights_that_fsdp_shares_out_train_and_decode_the_same():
    torchrun("tests/workers.py", "fsdp")


@pytest.mark.parametrize("name", ["zero2", "zero3", "fsdp"])
def test_accelerate_takes_the_configurations(name, monkeypatch):
    config = load_config_from_file(str(ROOT / "configs" / f"{name}.yaml"))  # refuses unknown keys
    engine = "FSDP" if name == "fsdp" else "DEEPSPEED"
    assert config.distributed_type.value == engine and config.num_processes == 2
    if engine == "DEEPSPEED":
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_four_bits_are_stored_as_a_type_that_the_engine_can_share_out(base, monkeypatch):
    def storage() -> torch.dtype:
        return lora_utils.quantization_config(use_qlora=True).bnb_4bit_quant_storage

    assert storage() == torch.uint8
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        plain = modeling.load_base(base, lora_utils.quantization_config(use_qlora=True))(input_ids=ids).logits
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    assert storage() == torch.uint8
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert storage() == torch.bfloat16
    with torch.no_grad():
        stored = modeling.load_base(base, lora_utils.quantization_config(use_qlora=True))(input_ids=ids).logits
    assert torch.equal(stored, plain)
    monkeypatch.delenv("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert storage() == torch.bfloat16
