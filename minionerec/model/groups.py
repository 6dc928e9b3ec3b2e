"""Adapted layers that read the same input, computed together: on a GPU, starting kernels is what takes the time.

The layers q, k and v of an attention block read one tensor, gate and up of an MLP another. Which do is not in any
configuration, so the model is watched once. A group has one matmul with the weights of its layers, one below another,
and one update, whose second factor is block-diagonal:

    out [T, O1 + O2] = x [W1; W2]^T + (dropout(x) [A1; A2]^T) diag(B1, B2)^T * scale

The factors are converted to the type of the matmuls when they have changed, not in every layer, and their gradients are
float32 sums, which the backward pass adds to `.grad` where there is one: `torch.autograd.grad` then returns None for
them. Parameters, names and files stay PEFT's; a layer that does not fit a group is computed by itself
(`minionerec.model.low_rank`), and so is every layer on a CPU. One dropout mask serves a group.

Dimensions: `T` tokens, `I` features in, `O` out of all layers of a group, `R` the sum of their ranks.
"""

from collections.abc import Callable, Sequence

import bitsandbytes
import torch
import torch.distributed as dist
import torch.nn.functional as F
from bitsandbytes.functional import QuantState
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.optim.optimizer import register_optimizer_step_post_hook

from minionerec.model import device, graphs

# Elements of an input up to which its dropout mask is kept, a byte each. A larger one takes longer to read than a
# kernel to start: its mask is made again in the backward pass. A recording cannot do that, so it keeps larger ones,
# too: those of 8 rows of 512 tokens at the shape of Qwen2.5-0.5B, a micro-batch that is still bound by the host.
KEPT_MASK, KEPT_IN_GRAPHS = 2**21, 2**25
# Values of a group in 4 bits up to which their scales are kept in float32, a 16th of a byte each, so that one kernel
# dequantizes them. A larger group takes longer to dequantize than kernels to start.
KEPT_SCALES = 2**24


class _Together:
    """Layers that read one input.

    Attributes:
        layers: in the order in which they are called.
        sizes: the output features of each.
    """

    def __init__(self, layers: Sequence[nn.Module], sizes: list[int]):
        self.layers, self.sizes = list(layers), sizes
        self.weight: torch.Tensor | None = None  # what the weights of the layers are parts of
        self.bias: torch.Tensor | None = None
        self.in_parts = True
        # The input, its state, and the outputs that are not yet taken.
        self.pending: tuple[torch.Tensor, tuple[int, bool, str | None], list[torch.Tensor | None]] | None = None

    def output(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """The output [..., O of the layer] for x [..., I]. The first layer that is called computes those of all."""
        pending, place = self.pending, self.layers.index(layer)
        state = 0 if x.is_inference() else x._version, torch.is_grad_enabled(), self.adapter()
        if pending is None or pending[0] is not x or pending[1] != state or pending[2][place] is None:
            pending = self.pending = (x, state, list(self._outputs(x)))
        found, pending[2][place] = pending[2][place], None
        if not any(of is not None for of in pending[2]):
            self.pending = None
        return found

    def adapter(self) -> str | None:
        """The adapter that is active in all layers, None where none is."""
        return None

    def _outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        raise NotImplementedError

    def _joined(self, bases: list[nn.Module]) -> bool:
        """Whether the weights of the layers are still parts of the common one; merging an adapter replaces them."""
        if self.weight is None:
            return False
        at = self.weight.data_ptr()
        for base in bases:
            if base.weight.data_ptr() != at and (self.in_parts or base is bases[0]):
                return False
            at += base.weight.numel() * base.weight.element_size() if self.in_parts else 0
        at = 0 if self.bias is None else self.bias.data_ptr()
        for base in bases if self.bias is not None else ():
            if base.bias.data_ptr() != at:
                return False
            at += base.bias.numel() * base.bias.element_size()
        return True

    def _join(self, bases: list[nn.Module]) -> None:
        """Makes the weights and biases of the layers parts of one, which takes no more memory."""
        self.weight = _in_one([base.weight for base in bases])
        if bases[0].bias is not None:
            self.bias = _in_one([base.bias for base in bases])


def _in_one(parameters: list[nn.Parameter]) -> torch.Tensor:
    """The rows of several parameters in one tensor, of which they become parts."""
    whole = parameters[0].detach()
    if len(parameters) > 1:
        whole = torch.cat([parameter.detach() for parameter in parameters])
        parts = whole.split([len(parameter) for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.data = part
    return whole


class Group(_Together):
    """Adapted layers with one input, of one rank, scale and dropout."""

    def __init__(self, owner: "Groups", layers: Sequence[nn.Module]):
        super().__init__(layers, [layer.get_base_layer().out_features for layer in layers])
        self.owner = owner
        self._alike: dict[str, tuple[nn.Module, bool]] = {}  # by adapter, the first layer's A and whether it fits
        self.scales: torch.Tensor | None = None  # of a weight in 4 bits

    def adapter(self) -> str | None:
        first = self.layers[0]
        return None if first.disable_adapters else first.active_adapters[0]

    def suits(self, layer: nn.Module, x: torch.Tensor) -> bool:
        """Whether a call of a layer with x can be one of the group's."""
        if layer.merged or not x.numel():
            return False
        if layer not in self.layers:  # a replica of `nn.DataParallel`
            return False
        if not layer.disable_adapters:
            active, first = layer.active_adapters, self.layers[0]
            if len(active) != 1 or active != first.active_adapters or not self.fits(active[0]):
                return False
            if layer.scaling[active[0]] != first.scaling[active[0]]:
                return False
        dtype, stored = self.dtype(x), self.stored_in
        return dtype == stored and (dtype == x.dtype or torch.is_autocast_enabled(x.device.type))

    def fits(self, adapter: str) -> bool:
        """Whether all layers have an adapter of one rank and dropout, and nothing but its two factors."""
        if adapter not in self.layers[0].lora_A:
            return False
        factor = self.layers[0].lora_A[adapter]
        known = self._alike.get(adapter)
        if known is None or known[0] is not factor:  # one that was deleted may come again with another shape
            shapes = set()
            for layer in self.layers:
                plain = adapter in layer.lora_A and adapter not in layer.lora_variant
                dropout = getattr(layer.lora_dropout[adapter], "p", 0.0) if plain else None
                shapes.add((layer.r[adapter], dropout) if plain and layer.lora_B[adapter].bias is None else None)
            known = self._alike[adapter] = factor, len(shapes) == 1 and None not in shapes
        return known[1]

    def dtype(self, x: torch.Tensor) -> torch.dtype:
        """What the matmuls are in."""
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return self.factor_dtype if torch.is_grad_enabled() else self.stored_in

    @property
    def factor_dtype(self) -> torch.dtype:
        return next(iter(self.layers[0].lora_A.values())).weight.dtype

    @property
    def stored_in(self) -> torch.dtype:
        weight = self.layers[0].get_base_layer().weight
        state = getattr(weight, "quant_state", None)
        return weight.dtype if state is None else state.dtype

    def _outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        name, dtype = self.adapter(), self.dtype(x)
        factors = None if name is None else self.owner.factors(name, dtype, self)
        first = self.layers[0]
        dropout = getattr(first.lora_dropout[name], "p", 0.0) if name is not None and first.training else 0.0
        if torch.is_grad_enabled():
            parameters = () if factors is None else (*factors.first, *factors.second)
            return _Grouped.apply(x, self, factors, dropout, dtype, *parameters)
        with torch.autocast(x.device.type, enabled=False):
            out, *_ = _forward(x.to(dtype).flatten(0, -2), self, factors, dropout)
        return _columns(out, x.shape[:-1], self.sizes)

    def weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[O, I] and [O] or None, of all layers."""
        bases = [layer.get_base_layer() for layer in self.layers]
        if not self._joined(bases):
            self._join(bases)
        if not isinstance(bases[0], bitsandbytes.nn.Linear4bit):
            return self.weight, self.bias
        shape, state = (sum(self.sizes), bases[0].in_features), bases[0].weight.quant_state
        if self.scales is not None:
            dequantize = torch.ops.bitsandbytes.dequantize_4bit.default
            weight = dequantize(self.weight, self.scales, state.blocksize, state.quant_type, shape, dtype)
        else:
            weight = torch.empty(shape, dtype=dtype, device=bases[0].weight.device)
            for base, part in zip(bases, weight.split(self.sizes), strict=True):
                dequantize_into(part, base.weight)
        return weight, None if self.bias is None else self.bias.to(dtype)

    def _join(self, bases: list[nn.Module]) -> None:
        found = (getattr(base.weight, "quant_state", None) for base in bases)
        states: list[QuantState] = [state for state in found if state is not None]  # none of a base in 16 bits
        self.scales, self.in_parts = None, True
        if states:
            kinds = {(of.blocksize, of.quant_type, of.shape.numel() % of.blocksize) for of in states}
            small = sum(of.shape.numel() for of in states) <= KEPT_SCALES
            self.in_parts = small and len(kinds) == 1 and not kinds.pop()[2]
        if self.in_parts:
            self.scales = torch.cat([_scales(of) for of in states]) if states else None
            super()._join(bases)
            return
        super()._join(bases[:1])  # each is dequantized by itself
        if bases[0].bias is not None:
            self.bias = _in_one([base.bias for base in bases])


def _scales(state: QuantState) -> torch.Tensor:
    """The largest absolute value of every block of a weight in 4 bits, in float32; they are stored in 8 bits."""
    if not state.nested:
        return state.absmax.float()
    return (bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset).float()


def dequantize_into(out: torch.Tensor, weight: torch.Tensor) -> None:
    """Writes the values of a weight in 4 bits."""
    state = weight.quant_state
    if out.is_cuda:
        bitsandbytes.functional.dequantize_4bit(weight.data, state, out=out)
    else:
        out.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, state))


class Factors:
    """The factors of one adapter in one group: the parameters, and what stands for them in matmuls.

    Attributes:
        first, second: the parameters A [r, I] and B [O, r] of every layer.
        scale: of the update.
        a, b: [R, I] and, block-diagonal, [O, R].
    """

    def __init__(self, group: Group, name: str, dtype: torch.dtype):
        layers = group.layers
        self.first = [layer.lora_A[name].weight for layer in layers]
        self.second = [layer.lora_B[name].weight for layer in layers]
        self.scale, self.rank = float(layers[0].scaling[name]), len(self.first[0])
        like = {"dtype": dtype, "device": self.first[0].device}
        total = self.rank * len(layers)
        self.a = torch.empty(total, self.first[0].shape[1], **like)
        self.b = torch.zeros(sum(group.sizes), total, **like)

    def copies(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of `a` and `b`, and the parameters that they are copies of."""
        pairs = list(zip(self.a.split(self.rank), self.first, strict=True))
        row = 0
        for i, factor in enumerate(self.second):
            part = self.b[row : row + len(factor), i * self.rank : (i + 1) * self.rank]
            pairs.append((part, factor))
            row += len(factor)
        return pairs


_optimizer_steps = 0  # that any optimizer of this process has made


def _count(*_: object) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count)


class Groups:
    """All groups of a model, whose factors are converted together."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self._known: dict[tuple[str, torch.dtype], tuple[dict[Group, Factors], tuple]] = {}

    def factors(self, name: str, dtype: torch.dtype, group: Group) -> Factors:
        """Those of an adapter in a group, as the parameters are now.

        The first group of a pass sees to it for all. In training they are converted when an optimizer has made a step,
        or nothing has a gradient yet; elsewhere in every pass, because code that writes into `parameter.data` leaves no
        trace. (A fused optimizer leaves none in the versions of the parameters.) A recorded pass converts them itself.
        """
        every, before = self._known.get((name, dtype), ({}, None))
        if group not in every or group is next(iter(every)):
            fitting = [of for of in self.groups if of.fits(name)]
            changed = list(every) != fitting or any(
                p is not layer.lora_A[name].weight
                for of, factors in every.items()
                for p, layer in zip(factors.first, of.layers, strict=True)
            )
            if changed:
                every = {of: Factors(of, name, dtype) for of in fitting}
            for of, factors in every.items():
                factors.scale = float(of.layers[0].scaling[name])
            parameters = [p for factors in every.values() for p in (*factors.first, *factors.second)]
            state = _optimizer_steps, *((p._version, p.data_ptr()) for p in parameters)
            learning = torch.is_grad_enabled() and group.layers[0].training and every[group].first[0].grad is not None
            if changed or state != before or not learning or graphs.recording():
                self._convert(list(every.values()))
            self._known[name, dtype] = every, state
        return every[group]

    @staticmethod
    @torch.no_grad()
    def _convert(every: list[Factors]) -> None:
        pairs = [pair for factors in every for pair in factors.copies()]
        for dense in (True, False):  # a list with one part that is not dense would be copied one by one
            chosen = [pair for pair in pairs if pair[0].is_contiguous() == dense]
            if chosen:
                torch._foreach_copy_([part for part, _ in chosen], [parameter for _, parameter in chosen])


def _forward(
    flat: torch.Tensor, group: Group, factors: Factors | None, dropout: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int | None]:
    """The outputs [T, O] of all layers for x [T, I]; and what the backward pass needs: x, with the mask applied if that
    is kept; the mask [T, I]; dropout(x) A^T * scale [T, R]; the seed of a mask that is made again."""
    out = F.linear(flat, *group.weights(flat.dtype))
    if factors is None:
        return out, flat, None, None, None
    kept, dropped, mask, seed = flat, flat, None, None
    if dropout and flat.numel() <= (KEPT_IN_GRAPHS if graphs.in_pass() else KEPT_MASK):
        kept, mask = torch.native_dropout(flat, dropout, True)
        dropped = kept
    elif dropout:
        seed = draw_seed()
        dropped = redrawn(flat, dropout, seed).mul_(flat)
    low = scaled_product(dropped, factors.a.T, factors.scale)
    out.addmm_(low, factors.b.T)
    return out, kept, mask, low, seed


def _columns(out: torch.Tensor, leading: torch.Size, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """The columns of out [T, O] of every layer, [..., O of the layer], as views."""
    return out.view(*leading, -1).split(sizes, dim=-1)


class _Grouped(torch.autograd.Function):
    """The outputs of a group for x [..., I]: [..., O of the layer], one a layer."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: torch.Tensor,
        group: Group,
        factors: Factors | None,
        dropout: float,
        dtype: torch.dtype,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.group, ctx.factors, ctx.shape, ctx.given = group, factors, x.shape, x.dtype
        ctx.dropout, ctx.dtype = dropout, dtype
        with torch.autocast(x.device.type, enabled=False):
            flat = x.to(dtype).flatten(0, -2)
            out, dropped, mask, low, ctx.seed = _forward(flat, group, factors, dropout)
        if factors is not None:
            ctx.save_for_backward(dropped, mask, low, *parameters)
        return _parts(out, x.shape[:-1], group.sizes)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group, factors = ctx.group, ctx.factors
        flat = [gradient.to(ctx.dtype).flatten(0, -2) for gradient in gradients]
        gradient = torch.cat(flat, dim=1) if len(flat) > 1 else flat[0].contiguous()
        weight, _ = group.weights(ctx.dtype)
        if factors is None:
            grad_x = gradient @ weight if ctx.needs_input_grad[0] else None
            return None if grad_x is None else grad_x.view(ctx.shape).to(ctx.given), *[None] * 4
        dropped, mask, low, *_ = ctx.saved_tensors  # raises if an optimizer has moved the parameters
        drawn = redrawn(dropped, ctx.dropout, ctx.seed) if ctx.seed is not None else None
        grad_low = scaled_product(gradient, factors.b, factors.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_low, factors.a)
            if mask is not None:
                grad_x = torch.ops.aten.native_dropout_backward(grad_x, mask, 1 / (1 - ctx.dropout))
            elif drawn is not None:
                grad_x.mul_(drawn)
            grad_x = grad_x.addmm_(gradient, weight).view(ctx.shape).to(ctx.given)
        if drawn is not None:
            dropped = drawn.mul_(dropped)
        of_first = _deliver_first(factors, grad_low, dropped)
        columns, ranks = gradient.split(group.sizes, dim=1), low.split(factors.rank, dim=1)
        of_second = [_deliver(*of) for of in zip(factors.second, columns, ranks, strict=True)]
        return grad_x, *[None] * 4, *of_first, *of_second


def _parts(out: torch.Tensor, leading: torch.Size, sizes: list[int]) -> tuple[torch.Tensor, ...]:
    """As `_columns`, but none is a view for autograd, since a model may change its layer's result in place, as Llama 4
    does."""
    strides: list[int] = []
    step = out.shape[1]
    for size in reversed(leading):
        strides.insert(0, step)
        step *= size
    parts, offset = [], out.storage_offset()
    for size in sizes:
        part = torch.empty(0, dtype=out.dtype, device=out.device)
        parts.append(part.set_(out.untyped_storage(), offset, (*leading, size), (*strides, 1)))
        offset += size
    return tuple(parts)


def scaled_product(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """The matmul of two matrices times a number, in one kernel."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


# --- Gradients of the factors -----------------------------------------------------------------------------------------


def _deliver(parameter: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor | None:
    """The gradient left^T right of a parameter; None where it has been added to the one that is there already."""
    if not _takes_sums(parameter):
        return product(left.T, right, parameter.dtype)
    add_product(parameter.grad, left.T, right)
    return None


def _deliver_first(factors: Factors, grad_low: torch.Tensor, dropped: torch.Tensor) -> list[torch.Tensor | None]:
    """The gradients of all A, which are rows of one matrix [R, I]."""
    parameters, rank = factors.first, factors.rank
    if all(map(_takes_sums, parameters)):
        grads = [parameter.grad for parameter in parameters]
        size = grads[0].numel() * grads[0].element_size()
        adjacent = all(grad.data_ptr() == grads[0].data_ptr() + i * size for i, grad in enumerate(grads))
        if adjacent and len({grad.untyped_storage().data_ptr() for grad in grads}) == 1:
            whole = grads[0].as_strided(factors.a.shape, (factors.a.shape[1], 1))
            add_product(whole, grad_low.T, dropped)
            return [None] * len(parameters)
        parts = grad_low.split(rank, dim=1)
        return [_deliver(p, part, dropped) for p, part in zip(parameters, parts, strict=True)]
    return list(product(grad_low.T, dropped, parameters[0].dtype).split(rank))


def _takes_sums(parameter: torch.Tensor) -> bool:
    """Whether a parameter has a gradient to which this process alone adds; else autograd does, whose hooks tell the
    other processes."""
    alone = not (dist.is_available() and dist.is_initialized())
    return alone and parameter.grad is not None and parameter.grad.is_contiguous()


def product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The matmul of two matrices of 16 bits, as a sum in `dtype`, where the device has a kernel for it."""
    if left.is_cuda and left.dtype != dtype:
        return torch.mm(left, right, out_dtype=dtype)
    return torch.mm(left, right).to(dtype)


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Adds the matmul of two matrices to `total`, in place."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif _adds_in_its_kernel(left.device, left.dtype, total.dtype):
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(product(left, right, total.dtype))


_tried: dict[tuple, bool] = {}


def _adds_in_its_kernel(where: torch.device, dtype: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a device multiplies in one type and adds in another in one kernel, which is tried once."""
    key = where, dtype, wanted
    if key not in _tried:
        one, total = torch.ones(16, 16, dtype=dtype, device=where), torch.ones(16, 16, dtype=wanted, device=where)
        try:
            torch.ops.aten.addmm.dtype_out(total, one, one, wanted, out=total)
            _tried[key] = bool((total == 17).all())
        except RuntimeError:
            _tried[key] = False
    return _tried[key]


# --- Masks that are made again ----------------------------------------------------------------------------------------


def draw_seed() -> int:
    """A random number from torch's global state, which gradient checkpointing restores before it recomputes. Raises
    RuntimeError in a pass that is recorded, which would keep this one."""
    if graphs.recording():
        raise RuntimeError("the mask of a dropout follows from a number of the host")
    return int(torch.randint(2**62, ()))


_generators: dict[torch.device, torch.Generator] = {}


def redrawn(like: torch.Tensor, dropout: float, seed: int) -> torch.Tensor:
    """1 / (1 - dropout) for the elements to keep and 0 for the others, shaped `like` a tensor, the same for the same
    seed."""
    generator = _generators.setdefault(like.device, torch.Generator(like.device)).manual_seed(seed)
    return torch.empty_like(like).bernoulli_(1 - dropout, generator=generator).mul_(1 / (1 - dropout))


# --- Layers without an adapter ----------------------------------------------------------------------------------------


class _FrozenGroup(_Together):
    """Linear layers with one input, in a model of which nothing trains."""

    def _outputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not self._joined(self.layers):
            self._join(self.layers)
        out = F.linear(x.flatten(0, -2), self.weight, self.bias)
        return _columns(out, x.shape[:-1], self.sizes)


class JoinedLinear(nn.Linear):
    """A linear layer that is computed with others where no gradient is wanted."""

    group: _FrozenGroup

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or x.dtype != self.weight.dtype or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return self.group.output(self, x)


def join_frozen_layers(model: nn.Module) -> None:
    """Lets a GPU compute the linear layers of a whole model with one input together, where nothing trains."""
    if not device.starts_kernels(model.device) or device.weights_are_sharded():
        return
    head = model.get_output_embeddings()
    layers = [
        module
        for module in model.modules()
        if type(module) is nn.Linear and module is not head and not (module._forward_hooks or module._forward_pre_hooks)
    ]

    def shape(layer: nn.Module) -> tuple:
        return layer.in_features, layer.bias is None, layer.weight.dtype, layer.weight.device

    for together in _watched(model, layers, shape):
        if len(together) > 1:
            group = _FrozenGroup(together, [layer.out_features for layer in together])
            group._join(together)
            for layer in together:
                layer.__class__, layer.group = JoinedLinear, group


# --- Which layers -----------------------------------------------------------------------------------------------------


def group_layers(model: nn.Module, layers: list[nn.Module]) -> None:
    """Puts lean layers with one input into groups, on a GPU. The model is watched in a pass over two tokens; where that
    fails, and for layers that are called more than once, each layer is computed by itself.

    Args:
        model: a causal LM with adapters.
        layers: those of `low_rank`.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    candidates = [layer for layer in layers if _can_join(layer)]
    if not candidates or not device.starts_kernels(base.device) or device.weights_are_sharded():
        return
    owner = Groups()
    for together in _watched(base, candidates, _shape):
        group = Group(owner, together)
        owner.groups.append(group)
        for layer in together:
            layer.group = group


def _can_join(layer: nn.Module) -> bool:
    base = layer.get_base_layer()
    plain = type(base) is nn.Linear or isinstance(base, bitsandbytes.nn.Linear4bit)
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    return (
        plain and not hooked and not base.weight.requires_grad and not layer.lora_variant and "group" not in vars(layer)
    )


def _watched(base: nn.Module, layers: list[nn.Module], shape: Callable[[nn.Module], tuple]) -> list[list[nn.Module]]:
    """The layers by what they read and by their `shape`, in the order in which they are called."""
    calls: list[tuple[torch.Tensor, nn.Module]] = []
    handles = [layer.register_forward_pre_hook(lambda layer, args: calls.append((args[0], layer))) for layer in layers]
    training = base.training
    try:
        with torch.no_grad():
            base.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=base.device), use_cache=False)
    except Exception:  # whatever an architecture raises for two tokens without a meaning
        return []
    finally:
        base.train(training)
        for handle in handles:
            handle.remove()
    called: dict[int, int] = {}
    for _, layer in calls:
        called[id(layer)] = called.get(id(layer), 0) + 1
    groups: list[list[nn.Module]] = []
    last: tuple[torch.Tensor, tuple] | None = None
    for x, layer in calls:
        if called[id(layer)] > 1:
            last = None
        elif last is not None and last[0] is x and last[1] == shape(layer):
            groups[-1].append(layer)
        else:
            groups.append([layer])
            last = x, shape(layer)
    return groups


def _shape(layer: nn.Module) -> tuple:
    """What layers of a group have in common."""
    base, (name, *_) = layer.get_base_layer(), layer.lora_A
    dropout = getattr(layer.lora_dropout[name], "p", 0.0)
    kind = type(base), base.weight.dtype, base.in_features, base.bias is None, base.weight.device
    return *kind, layer.r[name], layer.scaling[name], dropout
