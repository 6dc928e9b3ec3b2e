"""Measures a deep model by a few of its layers.

Decoder layers of one kind have the same shapes and do the same work, so a model of 80 layers is measured with the first
two layers of each kind and the last one. Each measured layer stands for some layers of the full depth: its parameters
are counted that often, and memory over a training step is put together from the pieces that were measured.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import Protocol, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig

BEFORE, FORWARD, HEAD, BACKWARD = "before the layers", "forward", "head and loss", "backward"
T = TypeVar("T")


@dataclass
class Piece:
    """A piece of a training step: a layer forward or backward (`place`, among those measured), or what stands around
    the layers. The bytes alive grow by `growth` from its start to its end, and by `peak` at most in between; around the
    layers, `freed` of them were made by the layer at each place. `flops` is the work of its matmuls."""

    phase: str
    place: int = -1
    growth: int = 0
    peak: int = 0
    flops: int = 0
    kernels: int = 0
    moved: int = 0
    freed: Counter[int] = field(default_factory=Counter)

    def add(self, size: int) -> None:
        self.growth += size
        self.peak = max(self.peak, self.growth)

    def free(self, size: int, made_in: "Piece") -> None:
        self.growth -= size
        if self.phase in (BEFORE, HEAD) and made_in.phase in (FORWARD, BACKWARD):
            self.freed[made_in.place] += size


class Pieces(Protocol):
    """What takes down the pieces of a step as it runs."""

    pieces: list[Piece]

    def start(self, phase: str, place: int = -1) -> None:
        """Starts another piece."""


def on_few_layers(measure: Callable[[bool], T]) -> T:
    """`measure(True)`, on few layers; where that fails `measure(False)`, on all: a layer may look for others by their
    number."""
    try:
        return measure(True)
    except Exception:
        return measure(False)


class Depth:
    """The decoder layers of `model`, of which it keeps few, in place. `order` has for every layer of the full depth the
    place among those kept of the one that stands for it. `shortens=False` keeps all of them, unwatched."""

    def __init__(self, model: nn.Module, shortens: bool = True):
        self.layers: list[nn.Module] = []
        self.order: list[int] = []
        name = _stack(model)
        if name is None or not shortens:
            return
        stack = list(model.get_submodule(name))
        parameters = [id(p) for layer in stack for p in layer.parameters()]
        if len(parameters) > len(set(parameters)):  # shared between layers
            return
        kept, self.order = _representatives(model, stack)
        self.layers = [stack[i] for i in kept]
        model.set_submodule(name, nn.ModuleList(self.layers))
        for config in _configs(model):
            _keep(config, len(stack), kept)

    def times(self, model: nn.Module) -> dict[int, int]:
        """How many parameters of the full depth each parameter of `model` stands for, by id."""
        times = {id(p): 1 for p in model.parameters()}
        for place, layer in enumerate(self.layers):
            times |= {id(p): self.order.count(place) for p in layer.parameters()}
        return times

    @contextmanager
    def watch(self, alive: Pieces) -> Iterator[None]:
        """While open, a layer that starts forward or backward starts a piece of `alive`; one that is recomputed, by
        gradient checkpointing, is part of its backward piece."""

        def hooks(place: int):
            def before(_module: nn.Module, _args: tuple) -> None:
                if alive.pieces[-1].phase in (BEFORE, FORWARD):
                    alive.start(FORWARD, place)

            def after(_module: nn.Module, _args: tuple, output: torch.Tensor | tuple) -> None:
                hidden = output if isinstance(output, torch.Tensor) else output[0]
                if alive.pieces[-1].phase == FORWARD and hidden.requires_grad:
                    hidden.register_hook(lambda _: alive.start(BACKWARD, place))

            return before, after

        handles = []
        for place, layer in enumerate(self.layers):
            before, after = hooks(place)
            handles += [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def full(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces of the full depth from those of the layers that were measured."""
        result: list[Piece] = []
        for phase, pieces_of_phase in groupby(pieces, lambda piece: piece.phase):
            run = list(pieces_of_phase)
            if phase in (FORWARD, BACKWARD):
                by_place = {piece.place: piece for piece in run}
                if not len(run) == len(by_place) == len(self.layers):
                    raise ValueError(f"not every layer ran {phase} once: {[piece.place for piece in run]}")
                run = [by_place[place] for place in (self.order if phase == FORWARD else reversed(self.order))]
            else:  # the end of autocast frees the weights that it converted for every layer
                run = [
                    replace(p, growth=p.growth - sum(n * (self.order.count(i) - 1) for i, n in p.freed.items()))
                    for p in run
                ]
            result += run
        return result


def _stack(model: nn.Module) -> str | None:
    """The name of the module list of the decoder layers, None where there is none."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    }
    return max(stacks, key=lambda name: sum(p.numel() for p in stacks[name].parameters()), default=None)


def _configs(model: nn.Module) -> list:
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())


def _of_each_layer(config: PreTrainedConfig, count: int) -> dict[str, list]:
    """What a configuration says of every layer, such as its kind of attention; not a list of all their numbers."""
    return {
        name: list(values)
        for name, values in vars(config).items()
        if isinstance(values, (list, tuple)) and len(values) == count and list(values) != list(range(count))
    }


def _keep(config: PreTrainedConfig, count: int, kept: list[int]) -> None:
    """Makes a configuration of `count` layers one of those that are kept."""
    for name, values in _of_each_layer(config, count).items():
        setattr(config, name, [values[i] for i in kept])
    if getattr(config, "num_hidden_layers", None) == count:
        config.num_hidden_layers = len(kept)


def _representatives(model: nn.Module, stack: list[nn.Module]) -> tuple[list[int], list[int]]:
    """The layers to keep, and for every layer the place among them of the one that stands for it.

    The first of a kind, whose backward frees what its kind shares, such as a mask, and the last layer stand for
    themselves; the second of a kind stands for all others of it.
    """
    last = len(stack) - 1
    said = [values for config in _configs(model) for values in _of_each_layer(config, len(stack)).values()]
    stands_for: dict[tuple, list[int]] = {}
    own: list[int] = []
    for i, layer in enumerate(stack):
        of_kind = stands_for.setdefault((_kind(layer), *(repr(values[i]) for values in said)), [])
        if i < last and len(of_kind) < 2:
            of_kind.append(i)
        own.append(i if i == last else of_kind[-1])
    kept = sorted(set(own))
    return kept, [kept.index(i) for i in own]


def _kind(layer: nn.Module) -> str:
    """What tells a layer from others: its modules, with their settings, and the shapes of its tensors."""
    modules = [
        (name, type(module).__name__, {k: v for k, v in vars(module).items() if _is_setting(k, v)})
        for name, module in layer.named_modules()
    ]
    tensors = [(n, t.shape, t.dtype) for n, t in chain(layer.named_parameters(), layer.named_buffers())]
    return repr((modules, tensors))


def _is_setting(name: str, value: object) -> bool:
    """Whether an attribute of a module is a setting; its place in the stack is none."""
    is_place = isinstance(value, int) and not isinstance(value, bool) and ("layer" in name or "idx" in name)
    return isinstance(value, (bool, int, str)) and not is_place
