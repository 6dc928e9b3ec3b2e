"""Reads, overwrites and merges whole weights that FSDP or DeepSpeed's ZeRO shards over the processes.

Every function except `local_shard` and `with_sid_rows_merged` is collective: all processes must call it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from deepspeed.runtime.base_optimizer import ZeROOptimizer


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


def whole_tensors(parameters: dict[str, nn.Parameter], keep: bool = True) -> dict[str, torch.Tensor]:
    """Copies of whole parameters, on the CPU; none in a process that only helps, without `keep`."""
    whole = {}
    for name, parameter in parameters.items():
        with gathered([parameter]):
            tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if keep:
                whole[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return whole


@torch.no_grad()
def overwrite(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Writes whole tensors into the parameters of the same names."""
    for name, parameter in parameters.items():
        with gathered([parameter], write=True):
            value = values[name].to(parameter.device)
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


class OwnedWeights:
    """The trained weights that this process keeps in float32 and steps: all of them, FSDP's shards, or DeepSpeed's
    partitions, from which the weights that passes use are copied.

    Args:
        model: whose `named` parameters train.
        wrapped: the same model as accelerate prepared it, with DeepSpeed's optimizer.
    """

    def __init__(self, model: nn.Module, wrapped: nn.Module | None = None):
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.zero: ZeROOptimizer | None = getattr(wrapped, "optimizer", None)
        self.sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        if self.zero is None:
            self.tensors = [local_shard(parameter) for parameter in self.named.values()]
        elif hasattr(self.zero, "single_partition_of_fp32_groups"):  # ZeRO-1 and ZeRO-2
            self.tensors = [partition.data for partition in self.zero.single_partition_of_fp32_groups]
        else:
            self.tensors = [partition.data for partition in self.zero.fp32_partitioned_groups_flat]

    def spread(self) -> None:
        """Makes the weights that passes use those of `tensors`, which have changed."""
        for module in self.sharded:
            module.reshard()  # what it has gathered is out of date
        if self.zero is None:
            return
        if hasattr(self.zero, "update_lp_params"):
            self.zero.update_lp_params()
        else:
            self.zero.checkpoint_event_prologue()
            for group in range(len(self.zero.fp32_partitioned_groups_flat)):
                self.zero._reassign_or_swap_out_partitioned_parameters(group)
            self.zero.checkpoint_event_epilogue()

    def overwrite(self, values: dict[str, torch.Tensor]) -> None:
        """Writes whole tensors into the weights, by name."""
        overwrite(self.named, values)
        if self.zero is not None:
            self.zero._restore_from_bit16_weights()


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
