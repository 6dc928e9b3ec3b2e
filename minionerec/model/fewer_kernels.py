"""RMS norms and rotary embeddings in few kernels, for a GPU, where starting kernels is what takes the time.

A norm of transformers is eight kernels forward and about as many backward; torch has one for each. A rotary embedding
of queries and keys is ten and about twenty; here three and three for each of the two. Architectures differ in both
(an epsilon inside or outside, a weight around 0 or 1, heads of which a part is rotated), so each is tried on random
numbers, and replaced only where values and gradients are equal.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.autograd.function import FunctionCtx

from minionerec.model import device

# --- Norms ------------------------------------------------------------------------------------------------------------


def norm_forward(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., H] divided by the root of its mean square, times the weight [H]; and 1 / root, [..., 1]."""
    return torch.ops.aten._fused_rms_norm(x, weight.shape, weight, eps)


def norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of x and the weight, where they are wanted."""
    if x.is_cuda:
        return torch.ops.aten._fused_rms_norm_backward(gradient, x, weight.shape, root, weight, wanted)
    normal, gradient = x.float() * root, gradient.float()
    scaled = gradient * weight
    of_x = root * (scaled - normal * (scaled * normal).mean(dim=-1, keepdim=True))
    return of_x.to(x.dtype), (gradient * normal).flatten(0, -2).sum(dim=0).to(weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        result, root = norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, root)
        return result

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:2])
        return *norm_backward(gradient.contiguous(), x, root, weight, wanted), None


def _fused_norm(norm: nn.Module, x: torch.Tensor, shift: float, eps: float) -> torch.Tensor:
    """The norm of x with the weight + shift, in the type of x."""
    weight = norm.weight
    if not weight.requires_grad:
        key = weight.data_ptr(), weight._version, x.dtype
        if norm.__dict__.get("_of_weight") != key:
            norm.__dict__.update(_of_weight=key, _shift=shift, _prepared=(weight.detach() + shift).to(x.dtype))
        weight = norm.__dict__["_prepared"]
    else:
        weight = (weight + shift if shift else weight).to(x.dtype)
    return _Norm.apply(x, weight, eps)


@torch.no_grad()
def refresh_frozen_norms(model: nn.Module) -> None:
    """Converts the weights of norms again, in place, after code that wrote into `parameter.data`, which leaves no
    trace."""
    for norm in model.modules():
        if "_prepared" in vars(norm):
            norm._prepared.copy_(norm.weight + norm._shift)


@cache
def _fused(kind: type, shift: float, eps: str) -> type:
    """A class of norms with the forward pass above; `eps` is the name of the attribute."""

    def forward(self: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return _fused_norm(self, hidden_states, shift, getattr(self, eps))

    return type(kind.__name__, (kind,), {"forward": forward})


def _replacement(norm: nn.Module) -> type | None:
    """The class that gives what a norm gives, which is tried in float32; None where none does."""
    eps = next((name for name, value in vars(norm).items() if "eps" in name and isinstance(value, float)), None)
    weights = list(norm.parameters())
    takes = list(inspect.signature(type(norm).forward).parameters)  # some take a gate, too
    if (
        len(takes) != 2
        or eps is None
        or len(weights) != 1
        or weights[0] is not norm._parameters.get("weight")
        or weights[0].dim() != 1
    ):
        return None
    plain = copy.deepcopy(norm).float()
    size = len(weights[0])
    plain.weight.data.add_(0.1 * _random(size).to(plain.weight.device))
    # In the second row, the epsilon counts.
    x = _random(2, size) * torch.tensor([[1.0], [getattr(norm, eps) ** 0.5]])
    kind: type = type(norm)
    for shift in (0.0, 1.0):
        other = copy.deepcopy(plain)
        other.__class__ = fused = _fused(kind, shift, eps)
        if _equal(plain, other, [x.to(plain.weight.device)]):
            return fused
    return None


# --- Rotary embeddings ------------------------------------------------------------------------------------------------


class _Rotary(torch.autograd.Function):
    """x [B, heads, T, D] rotated; `cos` is [B, 1, T, D] and `signed` the sines, whose first half has the other sign."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, signed)
        return torch.addcmul(x * cos, torch.roll(x, x.shape[-1] // 2, -1), signed)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _turned_back(gradient, *ctx.saved_tensors), None, None


class _RotaryOfBoth(torch.autograd.Function):
    """The same for queries and keys whose heads are next to each other in memory, as `groups` makes them: rotated
    together. Their gradients come apart."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(cos, signed)
        return tuple(_alone(part) for part in _rotated_together(q, k, cos, signed))

    @staticmethod
    def backward(ctx: FunctionCtx, of_q: torch.Tensor, of_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, signed = ctx.saved_tensors
        return *(_turned_back(gradient, cos, signed) for gradient in (of_q, of_k)), None, None


def _turned_back(gradient: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor) -> torch.Tensor:
    """Rotated by the angle with the other sign."""
    rolled = torch.roll(gradient, gradient.shape[-1] // 2, -1)
    return torch.addcmul(gradient * cos, rolled, signed, value=-1)


def _adjacent(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the heads of k follow those of q in memory."""
    heads, width = q.shape[1], q.shape[-1]
    return (
        q.stride() == k.stride()
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and q.stride(1) == width
        and q.stride(3) == 1
        and k.storage_offset() == q.storage_offset() + heads * width
        and q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    )


def _rotated_together(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, signed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    both = q.as_strided((q.shape[0], q.shape[1] + k.shape[1], *q.shape[2:]), q.stride())
    rotated = torch.addcmul(both * cos, torch.roll(both, both.shape[-1] // 2, -1), signed)
    return rotated[:, : q.shape[1]], rotated[:, q.shape[1] :]


def _alone(part: torch.Tensor) -> torch.Tensor:
    """The same memory, but for autograd no view."""
    result = torch.empty(0, dtype=part.dtype, device=part.device)
    return result.set_(part.untyped_storage(), part.storage_offset(), part.shape, part.stride())


class _Signed:
    """The sines of the last pass, which all its layers share, with the sign of the first half changed."""

    def __init__(self) -> None:
        self.sin = self.result = torch.empty(0)

    def __call__(self, sin: torch.Tensor) -> torch.Tensor:
        """[B, 1, T, D] of sin [B, T, D]."""
        if self.sin is not sin:
            first, second = sin.unsqueeze(1).chunk(2, dim=-1)
            self.sin, self.result = sin, torch.cat([-first, second], dim=-1)
        return self.result


def rotation(original: Callable) -> Callable:
    """`apply_rotary_pos_emb` of most architectures, for queries and keys [B, heads, T, D] and cos and sin [B, T, D]
    whose halves are equal; anything else, and on a CPU, is left to the `original`."""
    signed = _Signed()

    def apply_rotary_pos_emb(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        fits = not args and not kwargs and cos.dim() == 3 and cos.shape[-1] == q.shape[-1] and cos.dtype == q.dtype
        if not fits or not device.starts_kernels(q.device):
            return original(q, k, cos, sin, *args, **kwargs)
        of_sin, of_cos = signed(sin), cos.unsqueeze(1)
        if _adjacent(q, k):
            together = _RotaryOfBoth.apply if torch.is_grad_enabled() else _rotated_together
            return together(q, k, of_cos, of_sin)
        return _Rotary.apply(q, of_cos, of_sin), _Rotary.apply(k, of_cos, of_sin)

    apply_rotary_pos_emb.replaces = original  # type: ignore[attr-defined]
    return apply_rotary_pos_emb


def _rotates_plainly(original: Callable) -> bool:
    """Whether the function above gives what that of an architecture does, which is tried."""
    angle = _random(2, 3, 4)
    cos, sin = (torch.cat([of, of], dim=-1) for of in (angle.cos(), angle.sin()))
    inputs = [_random(2, 4, 3, 8), _random(2, 2, 3, 8)]

    def joined(function: Callable) -> Callable:
        return lambda q, k: torch.cat(function(q, k, cos, sin), dim=1)

    def ours(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple:
        return tuple(_Rotary.apply(x, cos.unsqueeze(1), _Signed()(sin)) for x in (q, k))

    return _equal(joined(original), joined(ours), inputs)


# --- In a model -------------------------------------------------------------------------------------------------------


def use_fewer_kernels(model: nn.Module) -> None:
    """Replaces the norms and the rotary embedding of a model by those above, in place, on a GPU."""
    if not device.starts_kernels(model.device) or device.weights_are_sharded():
        return
    tried: dict[tuple, type | None] = {}
    for norm in [module for module in model.modules() if "norm" in type(module).__name__.lower()]:
        key = type(norm), tuple(p.shape for p in norm.parameters()), repr(norm)
        if key not in tried:
            tried[key] = _replacement(norm)
        if tried[key] is not None:
            norm.__class__ = tried[key]
    for name in {type(module).__module__ for module in model.modules()}:
        original = getattr(sys.modules[name], "apply_rotary_pos_emb", None)
        if original is not None and not hasattr(original, "replaces") and _rotates_plainly(original):
            sys.modules[name].apply_rotary_pos_emb = rotation(original)  # type: ignore[attr-defined]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _equal(one: Callable, other: Callable, inputs: list[torch.Tensor]) -> bool:
    """Whether two functions of float32 tensors have equal values and gradients, also of their weights, up to
    rounding."""
    found = []
    try:
        for function in (one, other):
            given = [tensor.detach().clone().requires_grad_() for tensor in inputs]
            weights = list(function.parameters()) if isinstance(function, nn.Module) else []
            with torch.enable_grad():
                result = function(*given)
                factors = torch.linspace(-1, 1, result.numel(), device=result.device).view_as(result)
                wanted = [*given, *(weight.requires_grad_() for weight in weights)]
                gradients = torch.autograd.grad((result * factors).sum(), wanted)
            found.append([result.detach(), *gradients])
    except Exception:  # another signature, or no gradient
        return False
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*found, strict=True))
