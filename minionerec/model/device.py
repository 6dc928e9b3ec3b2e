"""The device of this process, how it shares a model with others, and the precisions that follow from both."""

import os

import torch


def local_device() -> torch.device:
    """The device of this process: its own GPU in a distributed run, else the first visible one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("cpu")


def process_state():
    """accelerate's `PartialState` of this process, on `local_device`. Says in one line each what a user may not expect
    of the GPUs: only one of several is used, or bfloat16 is not."""
    from accelerate import PartialState

    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if cards == 1 and "LOCAL_RANK" in os.environ:
        os.environ["LOCAL_RANK"] = "0"  # a launcher shows each process only its own GPU; engines count visible ones
    state = PartialState(cpu=not cards)
    if cards > 1 and state.num_processes == 1:
        state.print(
            f"{cards} GPUs are visible and this process uses one, {local_device()}; to use all of them, start the "
            f"command with torchrun --nproc_per_node {cards}"
        )
    if cards and compute_dtype() == torch.float16:
        name = torch.cuda.get_device_name(local_device())
        state.print(f"{name} only emulates bfloat16: computing in float16, in training with scaled gradients")
    return state


def shares_weights_out() -> bool:
    """Whether `accelerate launch` runs this process under FSDP or DeepSpeed ZeRO-3."""
    return (
        os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        or os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    )


def compute_dtype(quantized: bool = False) -> torch.dtype:
    """What this process's device multiplies matrices in, the only place that decides it: bfloat16 on a GPU that has it
    (compute capability 8 or ROCm), float16 on an older one, which would emulate it; on a CPU float32, and bfloat16
    where bitsandbytes stores the base."""
    if not torch.cuda.is_available():
        return torch.bfloat16 if quantized else torch.float32
    native = torch.version.hip or torch.cuda.get_device_capability(local_device())[0] >= 8
    return torch.bfloat16 if native else torch.float16


def mixed_precision(quantized: bool) -> dict[str, bool]:
    """The arguments of a Trainer for autocast to `compute_dtype`; with float16 it scales the gradients."""
    dtype = compute_dtype(quantized)
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}


def master_dtype() -> torch.dtype:
    """Of the weights of a model that trains in full: float32, since an optimizer step is smaller than half a bfloat16
    step of most weights. DeepSpeed keeps its own float32 copy of what it is given."""
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return compute_dtype() if deepspeed else torch.float32
