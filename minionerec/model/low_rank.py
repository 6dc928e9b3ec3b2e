"""The low-rank update of a LoRA layer, which keeps less for the backward pass than autograd would.

What a layer keeps, in bytes, for T tokens with I input and O output features in 16 bits, at rank r with dropout:

| tensor | autograd (PEFT) | here |
|---|---|---|
| the input x | - | 2 T I, once for all layers that read the same x |
| dropout(x) | 2 T I | - |
| dropout mask | T I (4 T I on a CPU) | -, drawn again from its seed |
| dropout(x) A^T | 2 T r | 2 T r |
| 16-bit copies of A and B | 2 r (I + O) | -, converted again |

For example, a decoder layer of the shape of Qwen2.5-7B with T = 2,048 tokens: q, k, v, o, gate and up have I = 3,584,
down has I = 18,944. Autograd keeps 3 bytes x 2,048 tokens x (6 x 3,584 + 18,944) features = 249 MB. Here q, k and v
share one input, gate and up another: 2 bytes x 2,048 x (3 x 3,584 + 18,944) = 122 MB. In 28 layers that is 3.6 GB less.
"""

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from peft.tuners import lora

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as _Layer  # what `_LeanForward` is mixed into
else:
    _Layer = object


class _LowRankUpdate(torch.autograd.Function):
    """result + dropout(x) A^T B^T * scale for the base layer's result [..., O], x [..., I], A [r, I], B [O, r]; saves
    x, A, B and dropout(x) A^T [..., r].

    The last matmul makes the sum and scales it, and the backward pass scales only what has the size of an adapter: no
    pass over [..., O] is made for either.
    """

    @staticmethod
    def forward(
        ctx: Any,
        result: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        dropout: float,
        seed: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.dropout, ctx.seed, ctx.dtype = dropout, seed, dtype
        ctx.scale = scale / _kept_fraction(dropout)
        dropped = x.to(dtype)
        if dropout:
            dropped = dropped * _dropout_mask(x.shape, dropout, seed, x.device)
        low = F.linear(dropped, a.to(dtype))
        ctx.save_for_backward(x, a, b, low)
        updated = torch.empty_like(result, dtype=dtype, memory_format=torch.contiguous_format)
        pair = low.flatten(0, -2), b.to(dtype).T
        torch.addmm(result.to(dtype).flatten(0, -2), *pair, alpha=ctx.scale, out=updated.flatten(0, -2))
        return updated.to(result.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, a, b, low = ctx.saved_tensors
        dropped = x.to(ctx.dtype)
        if ctx.dropout:
            mask = _dropout_mask(x.shape, ctx.dropout, ctx.seed, x.device)
            dropped = dropped * mask
        flat = gradient.to(ctx.dtype).flatten(0, -2)
        grad_b = (flat.T @ low.flatten(0, -2)).mul_(ctx.scale)
        grad_low = (flat @ b.to(ctx.dtype)).mul_(ctx.scale)
        grad_a = grad_low.T @ dropped.flatten(0, -2)
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (grad_low @ a.to(ctx.dtype)).view(x.shape)
            grad_x = (grad_x.mul_(mask) if ctx.dropout else grad_x).to(x.dtype)
        grad_result = gradient if ctx.needs_input_grad[0] else None
        return grad_result, grad_x, grad_a.to(a.dtype), grad_b.to(b.dtype), None, None, None, None


def _kept_fraction(dropout: float) -> float:
    """1 - dropout, rounded to a multiple of 1/65,536 as `_dropout_mask` rounds it."""
    return 1 - round(dropout * 65536) / 65536


def _draw_seed() -> int:
    """A random number from torch's global state, which gradient checkpointing restores before it recomputes."""
    return int(torch.randint(2**62, ()))


def _dropout_mask(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> torch.Tensor:
    """A mask (bool) of the elements to keep, the same for the same seed. A random number of 64 bits gives four elements
    16 bits each, which on a CPU is several times as fast as a number per element."""
    generator = torch.Generator(device).manual_seed(seed)
    count = shape.numel()
    numbers = torch.empty(math.ceil(count / 4), dtype=torch.int64, device=device)
    bits = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    return (bits >= round(dropout * 65536) - 32768).view(shape)


class _LeanForward(_Layer):
    """PEFT's LoRA layer around a linear layer, in any storage, with the update above. What the update does not cover
    (DoRA, mixed batches, merged adapters) is left to PEFT."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.lora_variant or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            dropout = getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0
            seed = _draw_seed() if dropout else 0
            device = x.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype
            result = _LowRankUpdate.apply(result, x, a, b, self.scaling[adapter], dropout, seed, dtype)
        return result


def _lean(kind: type) -> type:
    # PEFT finds the layer of a target parameter by this name when it adds another adapter.
    return type("ParamWrapper", (_LeanForward, kind), {"parameter_name": "weight"})


LEAN_LAYERS = {kind: _lean(kind) for kind in (lora.Linear, lora.Linear4bit, lora.Linear8bitLt, lora.ParamWrapper)}
