"""What a device computes in, and which card of several a process uses."""

import os

import pytest
import torch
from accelerate import PartialState
from helpers import logged, sft_flags

import lora_utils
import sft
from minionerec.flags import AdapterFlags
from minionerec.model import device


@pytest.fixture
def cards(monkeypatch):
    """`cards(capability, count)`: as many GPUs, as far as anyone asks without using them."""

    def plug_in(capability: int, count: int = 1) -> None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (capability, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)

    return plug_in


@pytest.mark.parametrize(("capability", "dtype"), [(7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)])
def test_a_card_that_emulates_bfloat16_computes_in_float16(cards, capability, dtype):
    cards(capability)
    assert device.compute_dtype() == device.compute_dtype(quantized=True) == dtype
    assert lora_utils.quantization_config(AdapterFlags(use_qlora=True)).bnb_4bit_compute_dtype == dtype
    half = device.mixed_precision(False)
    assert half == {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
    assert device.master_dtype() == torch.float32


def test_a_cpu_computes_in_float32_and_with_bitsandbytes_in_bfloat16():
    assert device.compute_dtype() == torch.float32 and device.compute_dtype(quantized=True) == torch.bfloat16
    assert device.mixed_precision(False) == {"bf16": False, "fp16": False}


def test_a_cpu_computes_in_bfloat16_where_it_is_asked_to(files, base, tmp_path, monkeypatch):
    sft.train(**sft_flags(files, base, tmp_path / "float32", use_lora=True))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert device.compute_dtype() == torch.bfloat16 and device.master_dtype() == torch.float32
    sft.train(**sft_flags(files, base, tmp_path / "bfloat16", use_lora=True))
    exact, rounded = (logged(tmp_path / name, "eval_loss") for name in ("float32", "bfloat16"))
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.01)


@pytest.fixture
def state():
    """`device.process_state` of a process that has no state yet."""
    PartialState._reset_state()
    yield device.process_state
    PartialState._reset_state()


@pytest.mark.parametrize(("capability", "count"), [(8, 1), (8, 4), (7, 1), (7, 2)])
def test_a_command_says_what_it_makes_of_the_cards(cards, state, capsys, capability, count):
    cards(capability, count)
    found = state()
    assert found.num_processes == 1 and found.device.type == "cuda"
    said = capsys.readouterr().out.splitlines()
    one_of_several = (
        f"{count} GPUs are visible and this process uses one, cuda:0; to use all of them, start the command "
    )
    expected = [f"{one_of_several}with torchrun --nproc_per_node {count}"] if count > 1 else []
    emulated = "Tesla T4 only emulates bfloat16: computing in float16, with scaled gradients in training"
    assert said == expected + ([emulated] if capability < 8 else [])


def test_a_command_without_cards_says_nothing(state, capsys):
    assert state().device.type == "cpu" and capsys.readouterr().out == ""


def test_each_process_has_its_own_card(cards, monkeypatch):
    cards(8, 4)
    assert device.local_device() == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.local_device() == torch.device("cuda", 3)


def test_a_process_that_sees_one_card_uses_it(cards, monkeypatch):
    """As launchers that set CUDA_VISIBLE_DEVICES for each process have it."""
    cards(8, 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert device.local_device() == torch.device("cuda", 0)
    # accelerate, DDP and DeepSpeed index devices by LOCAL_RANK: DDP(device_ids=[3]) and barrier(device_ids=[3]) fail.
    seen = []
    monkeypatch.setattr(
        "accelerate.PartialState", lambda cpu, timeout: seen.append(os.environ["LOCAL_RANK"]) or FakeState()
    )
    device.process_state()
    assert seen == ["0"]


class FakeState:
    num_processes = 4

    def wait_for_everyone(self) -> None:
        """As accelerate's, in the only process there is."""


def test_one_variable_turns_the_paths_of_a_gpu_off(monkeypatch):
    assert device.starts_kernels(torch.device("cuda")) and not device.starts_kernels(torch.device("cpu"))
    monkeypatch.setenv("MINIONEREC_FEWER_KERNELS", "0")
    assert not device.starts_kernels(torch.device("cuda"))
