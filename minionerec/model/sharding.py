"""Reads, overwrites and merges whole weights that FSDP or DeepSpeed ZeRO-3 shards over the processes.

Every function except `local_shard` and `with_sid_rows_merged` is collective: all processes must call it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


def local_shard(parameter: nn.Parameter) -> torch.Tensor:
    """The part of a parameter that this process holds, detached: its shard, or all of it if nothing is sharded."""
    if isinstance(parameter.data, DTensor):
        return parameter.data.to_local()
    return getattr(parameter, "ds_tensor", parameter.data)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], write: bool = False) -> Iterator[None]:
    """While open, parameters that ZeRO-3 shards are whole in every process. With `write`, the values that the first
    process leaves in them are sharded again at the end. FSDP's parameters have `full_tensor` for this."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=0 if write else None):
        yield


def whole_tensors(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Copies of whole parameters, on the CPU."""
    with gathered(parameters.values()):
        whole = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in parameters.items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in whole.items()}


@torch.no_grad()
def overwrite(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Writes whole tensors into the parameters of the same names."""
    with gathered(parameters.values(), write=True):
        for name, parameter in parameters.items():
            value = values[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def with_sid_rows_merged(base: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of a plain model, from that of the PEFT model around `base` of which only SID rows were trained:
    the rows are written into their matrices, in place, and PEFT's parts of the names are removed."""
    for name, module in base.named_modules():
        if isinstance(module, TrainableTokensLayer):
            prefix = f"base_model.model.{name}."
            rows = state.pop(f"{prefix}trainable_tokens_delta.default")
            weight = state[f"{prefix}base_layer.weight"]
            weight[module.token_indices["default"]] = rows.to(weight.dtype)
    return {name.removeprefix("base_model.model.").replace(".base_layer.", "."): t for name, t in state.items()}
