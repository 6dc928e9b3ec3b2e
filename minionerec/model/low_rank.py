"""The low-rank update of a LoRA layer, which keeps less for the backward pass than autograd would.

What a layer keeps, in bytes, for T tokens with I input and O output features in 16 bits, at rank r with dropout:

| tensor | autograd (PEFT) | here |
|---|---|---|
| the input x | - | 2 T I, once for all layers that read the same x |
| dropout(x) | 2 T I | - |
| dropout mask | T I (4 T I on a CPU) | -, made again from its seed |
| dropout(x) A^T | 2 T r | 2 T r |
| 16-bit copies of A and B | 2 r (I + O) | -, converted again |

For example, a decoder layer of the shape of Qwen2.5-7B with T = 2,048 tokens: q, k, v, o, gate and up have I = 3,584,
down has I = 18,944. Autograd keeps 3 bytes x 2,048 tokens x (6 x 3,584 + 18,944) features = 249 MB. Here q, k and v
share one input, gate and up another: 2 bytes x 2,048 x (3 x 3,584 + 18,944) = 122 MB. In 28 layers that is 3.6 GB less.
"""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn
from torch.autograd.function import FunctionCtx

from minionerec.model.groups import Group, draw_seed, scaled_product

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as _Layer  # what `_LeanForward` is mixed into
else:
    _Layer = object


class _LowRankUpdate(torch.autograd.Function):
    """base(x) + dropout(x) A^T B^T * scale for x [..., I], A [r, I], B [O, r]; saves x, A, B and dropout(x) A^T.

    `result` [..., O] is base(x), or None where base is a matmul with a frozen `weight` [O, I] and `bias` [O] or None,
    which is made here. The last matmul adds the update to it, in place if nothing else holds it, and scales it; the
    backward pass scales only what has the size of an adapter, and adds both parts of the gradient of x in a matmul. So
    no pass over [..., O] or [..., I] is made for a sum or a scale.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        result: torch.Tensor | None,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropout: float,
        seed: int,
        dtype: torch.dtype,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        ctx.dropout, ctx.seed, ctx.dtype = dropout, seed, dtype
        ctx.scale = scale / _kept_fraction(dropout)
        dropped = x.to(dtype)
        in_place = False
        if result is None:
            assert weight is not None  # one of them is given
            out = of_base = F.linear(dropped.flatten(0, -2), weight.to(dtype), None if bias is None else bias.to(dtype))
        elif result.grad_fn and result.dtype == dtype and result.is_contiguous() and not result._is_view():
            in_place = True  # fresh from the base layer
            ctx.mark_dirty(result)
            out = of_base = result.flatten(0, -2)
        else:
            of_base = result.to(dtype).flatten(0, -2)
            out = torch.empty(of_base.shape, dtype=dtype, device=of_base.device)
        if dropout:
            dropped = _dropout_mask(dropped, dropout, seed).mul_(dropped)
        low = F.linear(dropped.flatten(0, -2), a.to(dtype))
        ctx.save_for_backward(x, a, b, low, weight)
        torch.addmm(of_base, low, b.to(dtype).T, alpha=ctx.scale, out=out)
        if in_place:
            return result
        # Not a view for autograd: a model may change its layer's result in place, as Llama 4 does.
        updated = torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]])
        return updated.to(dtype if result is None else result.dtype)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, low, weight = ctx.saved_tensors
        dropped = x.to(ctx.dtype)
        mask = _dropout_mask(dropped, ctx.dropout, ctx.seed) if ctx.dropout else None
        flat = gradient.to(ctx.dtype).flatten(0, -2)
        grad_b = scaled_product(flat.T, low, ctx.scale)
        grad_low = scaled_product(flat, b.to(ctx.dtype), ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = grad_low @ a.to(ctx.dtype)
            if mask is not None:
                grad_x.mul_(mask.flatten(0, -2))
            if weight is not None:
                torch.addmm(grad_x, flat, weight.to(ctx.dtype), out=grad_x)
            grad_x = grad_x.view(x.shape).to(x.dtype)
        if mask is not None:
            dropped = mask.mul_(dropped)
        grad_a = grad_low.T @ dropped.flatten(0, -2)
        grad_result = gradient if ctx.needs_input_grad[0] else None
        return grad_result, grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), *[None] * 6


def _kept_fraction(dropout: float) -> float:
    """1 - dropout, rounded to a multiple of 1/65,536 as `_dropout_mask` rounds it."""
    return 1 - round(dropout * 65536) / 65536


def _dropout_mask(like: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """1 for the elements to keep and 0 for the others, shaped `like` a tensor, the same for the same seed. A random
    number of 64 bits gives four elements 16 bits each, which on a CPU is several times as fast as a number per element,
    as is a product of two tensors of one type."""
    generator = torch.Generator(like.device).manual_seed(seed)
    count = like.numel()
    numbers = torch.empty(math.ceil(count / 4), dtype=torch.int64, device=like.device)
    bits = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    mask = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return torch.ge(bits.view(like.shape), round(dropout * 65536) - 32768, out=mask)


class _LeanForward(_Layer):
    """PEFT's LoRA layer around a linear layer, in any storage, with the update above. What the update does not cover
    (DoRA, mixed batches, merged adapters) is left to PEFT.

    Attributes:
        group: the layers that are computed with this one, if any.
    """

    group: Group | None = None

    def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        if self.group is not None and not args and not kwargs and self.group.suits(self, x):
            return self.group.output(self, x)
        if self.disable_adapters or self.merged or self.lora_variant or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        base, device = self.base_layer, x.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        result = None
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            if self.lora_B[adapter].bias is not None:
                return super().forward(x, *args, **kwargs)
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            dropout = getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0
            seed = draw_seed() if dropout else 0
            dtype = autocast or a.dtype
            matmul: tuple = ()
            if result is None and _is_frozen_matmul(base) and (autocast or base.weight.dtype == x.dtype == dtype):
                matmul = base.weight, base.bias
            elif result is None:
                result = base(x, *args, **kwargs)
            result = _LowRankUpdate.apply(result, x, a, b, self.scaling[adapter], dropout, seed, dtype, *matmul)
        return base(x, *args, **kwargs) if result is None else result


def _is_frozen_matmul(layer: nn.Module) -> bool:
    """Whether calling `layer` is a matmul with a weight that is not trained, and nothing else."""
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # accelerate's `device_map` replaces it
        and not (layer._forward_hooks or layer._forward_pre_hooks)  # ZeRO-3 gathers the weight in one
        and not layer.weight.requires_grad
    )


def _lean(kind: type) -> type:
    # PEFT finds the layer of a target parameter by this name when it adds another adapter.
    return type("ParamWrapper", (_LeanForward, kind), {"parameter_name": "weight"})


LEAN_LAYERS = {kind: _lean(kind) for kind in (lora.Linear, lora.Linear4bit, lora.Linear8bitLt, lora.ParamWrapper)}
