"""The low-rank update of a LoRA layer, saving its input and [..., r] for the backward pass and nothing else."""

import torch
import torch.nn.functional as F
from peft.tuners import lora


class _LowRankUpdate(torch.autograd.Function):
    """dropout(x) A^T B^T * scale for x [..., in], A [r, in], B [out, r], saving x itself and [..., r].

    Autograd would save a converted and a dropped copy of x beside the dropout's mask. Here the mask is drawn again in
    the backward pass from `seed`, and x is what the neighbouring projections save too.
    """

    @staticmethod
    def forward(ctx, x, a, b, scale: float, dropout: float, seed: int, dtype: torch.dtype):
        ctx.dropout, ctx.seed, ctx.dtype = dropout, seed, dtype
        ctx.scale = scale / _kept_share(dropout)
        dropped = x.to(dtype)
        if dropout:
            dropped = dropped * _kept(x.shape, dropout, seed, x.device)
        low = F.linear(dropped, a.to(dtype))
        ctx.save_for_backward(x, a, b, low)
        return F.linear(low, b.to(dtype)).mul_(ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        x, a, b, low = ctx.saved_tensors
        dropped = x.to(ctx.dtype)
        if ctx.dropout:
            kept = _kept(x.shape, ctx.dropout, ctx.seed, x.device)
            dropped = dropped * kept
        gradient = gradient.to(ctx.dtype).flatten(0, -2) * ctx.scale
        of_b = gradient.T @ low.flatten(0, -2)
        of_low = gradient @ b.to(ctx.dtype)
        of_a = of_low.T @ dropped.flatten(0, -2)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (of_low @ a.to(ctx.dtype)).view(x.shape)
            of_x = (of_x.mul_(kept) if ctx.dropout else of_x).to(x.dtype)
        return of_x, of_a.to(a.dtype), of_b.to(b.dtype), None, None, None, None


def _kept_share(dropout: float) -> float:
    """1 - dropout as `_kept` has it, in 65,536ths."""
    return 1 - round(dropout * 65536) / 65536


def _draw_seed() -> int:
    """A number of torch's own random state, which gradient checkpointing restores."""
    return int(torch.randint(2**62, ()))


def _kept(shape: torch.Size, dropout: float, seed: int, device: torch.device) -> torch.Tensor:
    """A dropout mask (bool), the same for the same seed. Each random number decides four elements by 16 bits each,
    which a CPU draws several times as fast as one by one."""
    generator = torch.Generator(device).manual_seed(seed)
    count = shape.numel()
    numbers = torch.empty(-(-count // 4), dtype=torch.int64, device=device)
    bits = numbers.random_(-(2**63), None, generator=generator).view(torch.int16)[:count]
    return (bits >= round(dropout * 65536) - 32768).view(shape)


class _LeanForward:
    """PEFT's LoRA layer over a linear layer, whatever stores its weight, with the update above. What PEFT does in other
    ways (DoRA, mixed batches, merged adapters) stays PEFT's."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters or self.merged or self.lora_variant or kwargs.get("adapter_names") is not None:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        for adapter in self.active_adapters:
            if adapter not in self.lora_A:
                continue
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            dropout = getattr(self.lora_dropout[adapter], "p", 0.0) if self.training else 0.0
            seed = _draw_seed() if dropout else 0
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else a.dtype
            update = _LowRankUpdate.apply(x, a, b, self.scaling[adapter], dropout, seed, dtype)
            result = result + update.to(result.dtype)
        return result


def _lean(kind: type) -> type:
    # The name by which PEFT finds the layer of a target parameter again, for another adapter.
    return type("ParamWrapper", (_LeanForward, kind), {"parameter_name": "weight"})


LEAN_LAYERS = {kind: _lean(kind) for kind in (lora.Linear, lora.Linear4bit, lora.Linear8bitLt, lora.ParamWrapper)}
