"""Runs the passes of a training step on fake tensors, which have shapes but no storage, and takes down what they hold
and do: bytes alive, FLOPs of matmuls, kernels, and bytes that these move."""

import math
import sys
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import masking_utils
from transformers.integrations import moe

from minionerec.dryrun.depth import BEFORE, FORWARD, HEAD, Depth, Piece
from minionerec.model import adapters, fewer_kernels, groups
from minionerec.model.token_trees import edge_losses
from minionerec.training.logprobs import token_logps

# Operators that start no kernel: views, allocations, and what the host reads.
_VIEWS = """
    _local_scalar_dense _record_function_enter_new _record_function_exit _reshape_alias _unsafe_view alias
    as_strided chunk detach diagonal empty empty_like empty_strided expand is_pinned is_same_size item lift_fresh
    lift_fresh_copy narrow new_empty new_empty_strided numel permute reshape resize_ scalar_tensor select set_ size
    slice split split_with_sizes squeeze squeeze_ stride sym_numel sym_size sym_storage_offset sym_stride t t_
    transpose transpose_ unbind unfold unsqueeze unsqueeze_ view view_as
"""
NO_KERNEL = frozenset(_VIEWS.split())
_FLOPS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}  # by operator
_PICKS = {"embedding", "index_select", "index", "gather"}  # read no more of their input than they write
# What is one kernel on a GPU, and on a CPU several operators.
_ONE_KERNEL = {
    function.__code__
    for function in (fewer_kernels.norm_forward, fewer_kernels.norm_backward, groups.product, groups.add_product)
}


@dataclass
class Step:
    """What a training step is made of.

    Attributes:
        rows, tokens: shape of the largest micro-batch, padding included.
        response_tokens: its positions that the output head runs on.
        shared: the rows hold token trees, such as several completions after one prompt, under a mask of [tokens,
            tokens] for each.
        accumulate: whether gradients of an earlier micro-batch are there already.
        rewarded: the loss is RL's, on log-probabilities.
        trees: the loss is SFT's on token trees.
    """

    rows: int
    tokens: int
    response_tokens: int
    shared: bool = False
    accumulate: bool = True
    rewarded: bool = False
    trees: bool = False

    @property
    def micro_batches(self) -> int:
        """How many are run to find the peak."""
        return 2 if self.accumulate else 1


@dataclass(frozen=True)
class Work:
    """What a device has to do: floating-point operations of matmuls, bytes that kernels read and write, and kernels
    that the host starts."""

    flops: float = 0
    moved: float = 0
    kernels: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.moved + other.moved, self.kernels + other.kernels)

    def times(self, passes: float, size: float = 1.0) -> "Work":
        """The work of so many passes, `size` times as large each. A larger pass starts no more kernels."""
        return Work(self.flops * passes * size, self.moved * passes * size, self.kernels * passes)


@dataclass(frozen=True)
class Measured:
    """What the passes of a step hold and do, for the full depth of a model.

    Attributes:
        peak: bytes, gradients included.
        kept: bytes that the first forward pass keeps up to the output head.
        of_loss: bytes that the head and the loss add.
        layers, head: work of a micro-batch, both passes.
        forward: what of `layers` is the forward pass.
    """

    peak: int
    kept: int
    of_loss: int
    layers: Work
    head: Work
    forward: Work


class Alive(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, for as long as anything holds them, and the work.
    Storages of `before` do not count, since their views take no new memory."""

    def __init__(self, before: Iterable[torch.Tensor]):
        super().__init__()
        self.pieces = [Piece(BEFORE)]
        self.before = [tensor.untyped_storage() for tensor in before]
        self.known: dict[int, object] = {id(storage): None for storage in self.before}
        self._seeds: list[torch.Tensor] = []
        self._one: FrameType | None = None

    def __torch_dispatch__(
        self, function: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        kwargs = kwargs or {}
        # The host draws the seed of a dropout mask, and reads it. A fake tensor has no value to read.
        of_seed = any(args[0] is seed for seed in self._seeds) if self._seeds else False
        if of_seed and function is torch.ops.aten._local_scalar_dense.default:
            self._seeds.clear()
            return 0
        result = function(*args, **kwargs)
        if of_seed or (function is torch.ops.aten.randint.default and not result.dim()):
            self._seeds.append(result)
            return result
        self._take_down(function, args, kwargs, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._watch(tensor.untyped_storage())
        return result

    def _take_down(self, function: OpOverload, args: tuple, kwargs: dict, result: object) -> None:
        """Adds the work of an operator to the piece that runs."""
        piece, name = self.pieces[-1], function.overloadpacket.__name__
        if function.overloadpacket in _FLOPS:
            piece.flops += _FLOPS[function.overloadpacket](*args, **kwargs, out_val=result)
        if name in NO_KERNEL or function.namespace == "prim":
            return
        frame = _of_one_kernel()
        piece.kernels += frame is None or frame is not self._one
        self._one = frame
        tensors = {
            id(t): t for t in tree_leaves((() if name in _PICKS else args, result)) if isinstance(t, torch.Tensor)
        }
        piece.moved += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self.known:
            return
        # Allocators hand out blocks of 512 bytes.
        size = math.ceil(storage.nbytes() / 512) * 512
        made_in = self.pieces[-1]

        def gone(_: object) -> None:
            del self.known[key]
            self.pieces[-1].free(size, made_in)

        self.known[key] = weakref.ref(storage, gone)
        made_in.add(size)

    def start(self, phase: str, place: int = -1) -> None:
        """Starts another piece of the step: a layer, or what runs around the layers."""
        self.pieces.append(Piece(phase, place))


def _of_one_kernel() -> FrameType | None:
    """The frame of a function whose operators are one kernel on a GPU, if one of them runs."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(40):
        if frame is None or frame.f_code in _ONE_KERNEL:
            return frame
        frame = frame.f_back
    return None


@contextmanager
def _without_values() -> Iterator[None]:
    """While open, transformers does not ask for what fake tensors lack: whether positions are those of packed rows, and
    grouped matmuls of experts in other types than bfloat16."""
    packed, multiply = masking_utils.find_packed_sequence_indices, moe._grouped_mm
    masking_utils.find_packed_sequence_indices = lambda _: None
    moe._grouped_mm = _of_one_expert
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices, moe._grouped_mm = packed, multiply


def _of_one_expert(x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """All rows [S, I] times the first of the weights [E, I, O]: costs what each row times its own expert costs."""
    with torch.autocast("cpu", enabled=False):
        return x.to(weight.dtype) @ weight[0]


def _without_storage(model: nn.Module) -> None:
    """Gives a model on the meta device fake parameters and buffers, in place; call it under FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                if id(tensor) not in made:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    made[id(tensor)] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                module._parameters[name] = made[id(tensor)]
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


def measure(
    model: nn.Module, step: Step, dtype: torch.dtype, depth: Depth, cache_enabled: bool, joined: bool = False
) -> Measured:
    """Runs the passes of a step.

    Args:
        model: on the meta device, with the layers that `depth` has kept; it gets fake tensors.
        dtype: what matmuls compute in.
        cache_enabled: whether autocast keeps the 16-bit copies that it makes of weights.
        joined: compute adapted layers that read the same input together, as a GPU does.
    """
    model.train()
    with _without_values(), FakeTensorMode(allow_non_fake_inputs=True):
        _without_storage(model)
        if joined and isinstance(model, PeftModel):
            adapters.join_layers(model)
        ids = torch.zeros(step.rows, step.tokens, dtype=torch.long)
        inputs = {"input_ids": ids}
        if step.shared:
            inputs["attention_mask"] = torch.zeros(step.rows, 1, step.tokens, step.tokens, dtype=dtype)
            inputs["position_ids"] = ids
        alive = Alive([*model.parameters(), *model.buffers(), *inputs.values()])
        watch = model.get_output_embeddings().register_forward_pre_hook(lambda *_: alive.start(HEAD))
        with alive, depth.watch(alive):
            for micro_batch in range(step.micro_batches):
                if micro_batch:
                    alive.start(BEFORE)
                with torch.autocast("cpu", torch.bfloat16, dtype == torch.bfloat16, cache_enabled):
                    logits = _logits(model, inputs, step.response_tokens)
                    first = ids.new_zeros(len(logits))
                    loss = _loss(logits, first, step)
                    of_loss = alive.pieces[-1].growth
                alive.start(HEAD)  # autocast's copies of all layers are gone, and what follows starts from there
                loss.backward()
                del logits, loss
        watch.remove()
    return _together(depth.full(alive.pieces), of_loss, step.micro_batches)


def _together(pieces: list[Piece], of_loss: int, micro_batches: int) -> Measured:
    """What the pieces of a step are together."""
    peak = kept = at = 0
    work = {"layers": Work(), "head": Work(), "forward": Work()}
    for piece in pieces:
        own = Work(piece.flops, piece.moved, piece.kernels)
        work["head" if piece.phase == HEAD else "layers"] += own
        if piece.phase in (BEFORE, FORWARD):
            work["forward"] += own
        kept = kept or at * (piece.phase == HEAD)
        peak = max(peak, at + piece.peak)
        at += piece.growth
    each = {
        name: Work(of.flops // micro_batches, of.moved // micro_batches, of.kernels // micro_batches)
        for name, of in work.items()
    }
    return Measured(peak, kept, of_loss, **each)


def _loss(logits: torch.Tensor, targets: torch.Tensor, step: Step) -> torch.Tensor:
    if step.rewarded:
        return token_logps(logits.float() / 1.0, targets, targets, targets.bool())[0].sum()
    if step.trees:
        return edge_losses(logits, targets, targets).sum()
    return F.cross_entropy(logits.float(), targets)


def _logits(model: nn.Module, inputs: dict[str, torch.Tensor], count: int) -> torch.Tensor:
    """The logits of `count` positions. How many a mask picks depends on its values."""

    def first(_module: nn.Module, args: tuple) -> tuple:
        return (args[0].flatten(0, -2)[:count], *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(first)
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        handle.remove()
