"""Runs the output head only on the positions that are needed, and in float32.

Dimensions: `B` rows, `L` tokens, `N` positions, `H` hidden, `V` vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import FunctionCtx

CHUNK = 4096  # rows of the head's weight that are converted to float32 at a time


@contextmanager
def head_on(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    """While open, the output head of `model` gets only the hidden states at `positions` [N], which count through the
    flattened rows [B, L]. (By a mask of booleans, the host would wait for a GPU to count them.)

    A forward pass then returns logits [N, V] instead of [B, L, V]. What an architecture does to the logits after its
    head (Gemma's soft cap) still works, because it is elementwise.
    """

    def select(
        _module: nn.Module, args: tuple[torch.Tensor, *tuple[object, ...]]
    ) -> tuple[torch.Tensor, *tuple[object, ...]]:
        return (args[0].flatten(0, -2).index_select(0, positions), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def float32_head(model: nn.Module) -> Iterator[None]:
    """While open, the output head of `model` computes float32 logits, for any type of its weights and under any
    autocast. Hidden states keep their type, and the head is not copied to float32.

    bfloat16 logits between 8 and 32 have steps of 0.06 to 0.125, so items whose scores differ by less get equal scores.
    The head is still called as a module, so FSDP and ZeRO-3 gather its weight. A quantized head is left unchanged.
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
    """`F.linear` of hidden [..., H] and weight [V, H]: a matmul with float32 accumulation and a float32 result."""
    with torch.autocast(hidden.device.type, enabled=False):
        if weight.dtype == torch.float32:
            return F.linear(hidden.float(), weight, None if bias is None else bias.float())
        result = _Float32Linear.apply(hidden, weight)
        return result if bias is None else result + bias.float()


class _Float32Linear(torch.autograd.Function):
    """hidden [..., H] times a 16-bit weight [V, H], in float32; saves both in their own types."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight)
        flat = hidden.flatten(0, -2)
        if _on_tensor_cores(flat, weight):
            result = torch.mm(flat, weight.T, out_dtype=torch.float32)
        else:
            exact = hidden.dtype == weight.dtype == torch.bfloat16
            flat = flat.float()
            result = flat.new_empty(len(flat), len(weight))
            with _bfloat16_products() if exact else nullcontext():
                for part in _chunks(weight):
                    torch.mm(flat, weight[part].float().T, out=result[:, part])
        return result.view(*hidden.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        hidden, weight = ctx.saved_tensors
        gradient, flat = gradient.flatten(0, -2), hidden.flatten(0, -2)
        grad_hidden = grad_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            # Tensor cores accumulate in float32. The gradients are returned in 16 bits in any case.
            if _on_tensor_cores(flat, weight):
                gradient = gradient.to(weight.dtype)
                grad_hidden = (gradient @ weight).view(hidden.shape) if ctx.needs_input_grad[0] else None
                return grad_hidden, gradient.T @ flat if ctx.needs_input_grad[1] else None
            if ctx.needs_input_grad[0]:
                grad_hidden = torch.zeros_like(flat, dtype=torch.float32)
                for part in _chunks(weight):
                    grad_hidden.addmm_(gradient[:, part], weight[part].float())
                grad_hidden = grad_hidden.to(hidden.dtype).view(hidden.shape)
            if ctx.needs_input_grad[1]:
                flat, grad_weight = flat.float(), torch.empty_like(weight)
                for part in _chunks(weight):
                    grad_weight[part] = gradient[:, part].T @ flat
        return grad_hidden, grad_weight


@contextmanager
def _bfloat16_products() -> Iterator[None]:
    """While open, a CPU with instructions for bfloat16 may take them for float32 matrices, in under half the time. It
    rounds the factors to bfloat16, which changes nothing where they are such values, and adds up in float32."""
    matmul = torch.backends.mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _on_tensor_cores(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a GPU multiplies both without conversion, accumulating in float32."""
    return hidden.is_cuda and hidden.dtype == weight.dtype


def _chunks(weight: torch.Tensor) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, len(weight), CHUNK))
