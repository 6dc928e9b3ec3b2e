"""The device of this process, whether weights are sharded, and the precisions that follow from both."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from minionerec.flags import engine

if TYPE_CHECKING:
    from accelerate import PartialState


def local_device() -> torch.device:
    """The device of this process: its own GPU in a distributed run, else the first visible GPU, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def process_state(timeout: int = 1800) -> "PartialState":
    """accelerate's `PartialState` of this process, on `local_device`; a process waits `timeout` seconds for the others.
    Prints a line if only one of several GPUs is used, and one if the GPU does not compute in bfloat16."""
    from accelerate import PartialState

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards == 1 and "LOCAL_RANK" in os.environ:
        # The launcher shows each process only its own GPU, and engines number the visible ones.
        os.environ["LOCAL_RANK"] = "0"
    state = PartialState(cpu=not cards, timeout=timedelta(seconds=timeout))
    if state.num_processes > 1:
        state.wait_for_everyone()  # one that ended now, for bad input, would break off the others' connecting
    if cards > 1 and state.num_processes == 1:
        state.print(
            f"{cards} GPUs are visible and this process uses one, {local_device()}; to use all of them, start the "
            f"command with torchrun --nproc_per_node {cards}"
        )
    if cards and compute_dtype() == torch.float16:
        name = torch.cuda.get_device_name(local_device())
        state.print(f"{name} only emulates bfloat16: computing in float16, with scaled gradients in training")
    return state


_counts_for_gpu = False


@contextmanager
def counting_for_gpu() -> Iterator[None]:
    """While open, every device counts as one that starts kernels: a dry run on a CPU finds out what a GPU would do."""
    global _counts_for_gpu
    _counts_for_gpu = True
    try:
        yield
    finally:
        _counts_for_gpu = False


def starts_kernels(where: torch.device) -> bool:
    """Whether work on a device is started kernel by kernel, so that few large operators are faster than many small
    ones: on a GPU. `MINIONEREC_FEWER_KERNELS=0` in the environment says no: plain operators, in plain sizes."""
    return (where.type == "cuda" or _counts_for_gpu) and os.environ.get("MINIONEREC_FEWER_KERNELS") != "0"


def free_memory_gb() -> float:
    """What is free on this process's GPU, in GB; 0 on a CPU."""
    if not torch.cuda.is_available():
        return 0.0
    where = local_device()
    kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)  # by PyTorch, which uses it first
    return (torch.cuda.mem_get_info(where)[0] + kept) / 1e9


def unreserved_gb() -> float:
    """As `free_memory_gb`, without what PyTorch keeps."""
    return torch.cuda.mem_get_info(local_device())[0] / 1e9 if torch.cuda.is_available() else 0.0


def weights_are_sharded() -> bool:
    """Whether `accelerate launch` runs this process under FSDP or DeepSpeed ZeRO-3."""
    return engine() in ("FSDP", "ZeRO-3")


def compute_dtype(quantized: bool = False) -> torch.dtype:
    """The precision of matmuls on this process's device; decided only here.

    A GPU with native bfloat16 (compute capability 8 and newer, or ROCm) uses bfloat16; an older one, which would
    emulate it, float16. A CPU uses float32, or bfloat16 if bitsandbytes stores the base or accelerate's variable asks
    for it.
    """
    if not torch.cuda.is_available():
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"
        return torch.bfloat16 if quantized or asked else torch.float32
    native = torch.version.hip or torch.cuda.get_device_capability(local_device())[0] >= 8
    return torch.bfloat16 if native else torch.float16


def mixed_precision(quantized: bool) -> dict[str, bool]:
    """The arguments that make a Trainer use autocast to `compute_dtype`; with float16 it also scales the gradients."""
    dtype = compute_dtype(quantized)
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}


def master_dtype() -> torch.dtype:
    """The precision of the weights in full fine-tuning, whatever the engine: float32, because for most weights an
    optimizer step is smaller than half a bfloat16 step."""
    return torch.float32
