"""The output head, only where it is wanted, and in float32.

Dimensions: `B` rows, `L` tokens, `N` positions, `H` hidden, `V` vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 4096  # rows of a head's weight that are in float32 at a time


@contextmanager
def head_on(model, positions: torch.Tensor) -> Iterator[None]:
    """While open, the output head of `model` sees the hidden states at `positions` [B, L] (bool) alone.

    The logits of a forward are then [N, V] instead of [B, L, V]. What an architecture does to its logits after the
    head (Gemma's soft cap) still happens, since it works element by element.
    """

    def select(_module, args):
        return (args[0][positions], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def float32_head(model) -> Iterator[None]:
    """While open, the output head of `model` returns float32 logits, whatever its weights are stored in and whatever
    autocast is on. Hidden states stay as they are, and no float32 copy of the head is made.

    bfloat16 logits are steps of 0.06 to 0.125 apart where they are 8 to 32: items that differ by less come out equal.
    The head is still called as a module, so that FSDP and ZeRO-3 gather its weight. A quantized head stays as it is.
    """
    head = model.get_output_embeddings()
    layers = [layer for layer in head.modules() if type(layer).forward is nn.Linear.forward]
    layers = [layer for layer in layers if "forward" not in vars(layer)]
    for layer in layers:
        layer.forward = partial(_float32_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _float32_forward(layer: nn.Linear, hidden: torch.Tensor) -> torch.Tensor:
    return float32_linear(hidden, layer.weight, layer.bias)


def float32_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` of hidden [..., H] and weight [V, H], with products, sums and result in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == torch.float32:
            return F.linear(hidden.float(), weight, None if bias is None else bias.float())
        result = _Float32Linear.apply(hidden, weight)
        return result if bias is None else result + bias.float()


class _Float32Linear(torch.autograd.Function):
    """hidden [..., H] times a 16-bit weight [V, H], in float32; saves both as they are."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        rows = hidden.flatten(0, -2)
        if _on_tensor_cores(rows, weight):
            result = torch.mm(rows, weight.T, out_dtype=torch.float32)
        else:
            rows = rows.float()
            result = rows.new_empty(len(rows), len(weight))
            for part in _chunks(weight):
                result[:, part] = rows @ weight[part].float().T
        return result.view(*hidden.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        hidden, weight = ctx.saved_tensors
        gradient, rows = gradient.flatten(0, -2), hidden.flatten(0, -2)
        grad_hidden = grad_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            if _on_tensor_cores(rows, weight):  # sums are in float32 there; what comes out is rounded in any case
                gradient = gradient.to(weight.dtype)
                grad_hidden = (gradient @ weight).view(hidden.shape) if ctx.needs_input_grad[0] else None
                return grad_hidden, gradient.T @ rows if ctx.needs_input_grad[1] else None
            if ctx.needs_input_grad[0]:
                grad_hidden = torch.zeros_like(rows, dtype=torch.float32)
                for part in _chunks(weight):
                    grad_hidden.addmm_(gradient[:, part], weight[part].float())
                grad_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape)
            if ctx.needs_input_grad[1]:
                rows, grad_weight = rows.float(), torch.empty_like(weight)
                for part in _chunks(weight):
                    grad_weight[part] = gradient[:, part].T @ rows
        return grad_hidden, grad_weight


def _on_tensor_cores(rows: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GPU multiplies both as they are stored, with sums in float32."""
    return rows.is_cuda and rows.dtype == weight.dtype


def _chunks(weight: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, len(weight), CHUNK))
