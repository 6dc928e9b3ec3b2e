"""Passes of a model that a GPU records and starts again at once, as CUDA graphs.

Below 3B, what takes the time on a GPU is that Python starts some thousand kernels one by one. A pass whose inputs have
the shapes of an earlier one starts the same kernels on other numbers. So it is recorded when its shapes come for the
second time, with its backward pass, and from then on copied inputs and one start of the graph take its place. The
first pass of a shape, and every pass that cannot be recorded, is computed as ever: the eager twin, whose values the
recording must give before it is used.

What is recorded may not read a value on the host, whose branch would be taken for ever; nor keep a number of the host
that changes, such as a seed. Anything that goes wrong turns recording off for the model, with one printed line.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import bitsandbytes
import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode

from minionerec.model import device

MOST_PASSES = 48  # recordings of one model; each keeps some MB of kernel arguments
TOLERANCE = 0.05  # nats that a recording may be from the eager pass, in 16 bits

Function = Callable[..., tuple[torch.Tensor, ...]]


class Recording(Protocol):
    """What a device started while `record` was open, which `replay` starts again."""

    def record(self) -> AbstractContextManager[None]: ...

    def replay(self) -> None: ...


class _CudaRecording:
    """`pool`: the memory that recordings share."""

    def __init__(self, pool: tuple[int, int] | None):
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    @contextmanager
    def record(self) -> Iterator[None]:
        # After an error, `torch.cuda.graph` would leave its own stream current. Other threads, such as that which pins
        # memory, may go on meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local"),
        ):
            yield

    def replay(self) -> None:
        self.graph.replay()


RECORDINGS: dict[str, Callable[[tuple[int, int] | None], Recording]] = {"cuda": _CudaRecording}

# Operators for which the host waits: their result is a value on it, or their shape depends on values.
READS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}
READS |= {"bincount", "repeat_interleave"}


def indexes_by_mask(name: str, args: tuple) -> bool:
    """Whether an operator indexes by a boolean mask, whose elements the host counts first."""
    if name not in ("index", "index_put", "index_put_", "_index_put_impl_"):
        return False
    return any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1] or ())


class NoReads(TorchDispatchMode):
    """While open, an operator for which the host waits for device `where`, or that copies between the two, raises
    RuntimeError. A recording that meets one is invalid, and PyTorch's allocator does not get over that: up to 2.12 it
    takes the recording for unfinished, and asserts when memory is freed; later it keeps the memory of the pass."""

    def __init__(self, where: torch.device):
        super().__init__()
        self.kind = where.type

    def __torch_dispatch__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = function.overloadpacket.__name__  # type: ignore[attr-defined]
        kwargs = kwargs or {}
        reads = (name in READS and not kwargs.get("output_size")) or indexes_by_mask(name, args)
        kinds = {given.device.type for given in args if isinstance(given, torch.Tensor)}
        if kwargs.get("device") is not None:
            kinds.add(torch.device(kwargs["device"]).type)
        if reads and self.kind in kinds:
            raise RuntimeError(f"{name}: the host reads a value")
        if name in ("_to_copy", "copy_") and self.kind in kinds and len(kinds) > 1:
            raise RuntimeError(f"{name}: a copy between host and device")
        return function(*args, **kwargs)


# --- What a pass asks -------------------------------------------------------------------------------------------------

_in_pass = _recording = False


def in_pass() -> bool:
    """Whether a pass is computed that may be recorded, now or when it comes again."""
    return _in_pass


def recording() -> bool:
    """Whether a pass is being recorded, or tried right before that."""
    return _recording


@contextmanager
def _within(now: bool) -> Iterator[None]:
    global _in_pass, _recording
    before = _in_pass, _recording
    _in_pass, _recording = True, now
    try:
        yield
    finally:
        _in_pass, _recording = before


# --- A recorded pass --------------------------------------------------------------------------------------------------


class _Pass:
    """A function of tensors as a recording, with its backward pass where gradients are wanted; these are added into the
    `grad` of the parameters."""

    def __init__(self, owner: "Graphs", function: Function, inputs: tuple[torch.Tensor, ...]):
        self.owner = owner
        self.inputs = [tensor.clone() for tensor in inputs]
        self.watched = [*owner.model.parameters(), *owner.model.buffers()]
        self.addresses = [tensor.data_ptr() for tensor in self.watched]
        self.forward = owner.new_recording()
        self.backward: Recording | None = None
        self.learns: list[nn.Parameter] = []
        # Also makes what is made once, such as converted weights and what was tried, which no recording may hold.
        with owner.same_random_numbers(), _within(True):
            with NoReads(owner.model.device):
                outputs = function(*self.inputs)
            self.wanted = [tensor.requires_grad for tensor in outputs]
            self.given = [torch.zeros_like(tensor) for tensor in outputs if tensor.requires_grad]
            expected = [tensor.detach() for tensor in outputs]
            norms = self._gradient_norms(lambda: self._compute_gradients(outputs))
            outputs = ()  # its graph would hold nodes of this stream, which no recording may enter
        torch.clear_autocast_cache()  # a recording converts weights itself
        with owner.same_random_numbers(), _within(True):
            with self.forward.record():
                outputs = function(*self.inputs)
            self.outputs = [tensor.detach() for tensor in outputs]
            if self.given:
                self.backward = backward = owner.new_recording()
                with backward.record():
                    self._compute_gradients(outputs)
        torch.clear_autocast_cache()
        with owner.same_random_numbers():
            self.forward.replay()
        for found, wanted in zip(self.outputs, expected, strict=True):
            if found.is_floating_point() and not torch.allclose(found, wanted, atol=TOLERANCE, rtol=TOLERANCE):
                raise RuntimeError("the recording of a pass gives other values")
        if self.backward is not None:
            found = self._gradient_norms(self.backward.replay)
            largest = norms.nan_to_num().max().clamp(min=1e-30)
            if not torch.allclose(found / largest, norms / largest, atol=TOLERANCE, rtol=TOLERANCE, equal_nan=True):
                raise RuntimeError("the recording of a backward pass gives other gradients")

    def _gradient_norms(self, compute: Callable[[], None]) -> torch.Tensor:
        """The norm of what a backward pass adds to each trained parameter where the gradient of every output is 1.
        Leaves the gradients of a step that is on its way as they are."""
        if not self.given:
            return torch.zeros(0)
        trained = [parameter for parameter in self.owner.model.parameters() if parameter.requires_grad]
        places = [self.owner.gradient_of(parameter) for parameter in trained]
        held = [place for place, parameter in zip(places, trained, strict=True) if parameter.grad is place]
        kept = [place.clone() for place in held]
        torch._foreach_zero_(places)
        for gradient in self.given:
            gradient.fill_(1)
        compute()
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(places)])
        for gradient in self.given:
            gradient.zero_()
        if held:
            torch._foreach_copy_(held, kept)
        return norms

    def _compute_gradients(self, outputs: tuple[torch.Tensor, ...]) -> None:
        """The backward pass, into the place for gradients that recordings have."""
        if not self.given:
            return
        trained = [parameter for parameter in self.owner.model.parameters() if parameter.requires_grad]
        before = [parameter.grad for parameter in trained]
        versions = []
        for parameter in trained:
            parameter.grad = gradient = self.owner.gradient_of(parameter)
            versions.append(gradient._version)
        try:
            # Autocast, in which the pass may be, would round sums of gradients to 16 bits; a Trainer leaves it first.
            with torch.autocast(self.owner.model.device.type, enabled=False):
                torch.autograd.backward([tensor for tensor in outputs if tensor.requires_grad], self.given)
            now = [self.owner.gradient_of(parameter)._version for parameter in trained]
            self.learns = [p for p, old, new in zip(trained, versions, now, strict=True) if new > old]
        finally:
            for parameter, of in zip(trained, before, strict=True):
                parameter.grad = of

    def moved(self) -> bool:
        """Whether a tensor of the model is elsewhere now than when it was recorded."""
        return any(tensor.data_ptr() != at for tensor, at in zip(self.watched, self.addresses, strict=True))

    def __call__(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        torch._foreach_copy_(self.inputs, inputs)
        if self.backward is not None:
            return _Replayed.apply(self.owner.trigger, self)
        self.forward.replay()
        return tuple(tensor.clone() for tensor in self.outputs)

    def add_gradients(self, given: tuple[torch.Tensor | None, ...]) -> None:
        """Replays the backward pass, for the gradients of the outputs."""
        wanted = [gradient for gradient, of in zip(given, self.wanted, strict=True) if of]
        for own, gradient in zip(self.given, wanted, strict=True):
            if gradient is None:
                own.zero_()
            else:
                own.copy_(gradient)
        fresh = [self.owner.gradient_of(parameter) for parameter in self.learns if parameter.grad is None]
        if fresh:
            torch._foreach_zero_(fresh)
        for parameter in self.learns:
            own = self.owner.gradient_of(parameter)
            if parameter.grad is not None and parameter.grad is not own:
                own.copy_(parameter.grad)
            parameter.grad = own
        assert self.backward is not None
        self.backward.replay()


class _Token:
    """Lives as long as a backward pass may come."""


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, _trigger: torch.Tensor, of: _Pass) -> tuple[torch.Tensor, ...]:
        ctx.of, ctx.token = of, _Token()
        of.owner.waits_for = weakref.ref(ctx.token)
        of.forward.replay()
        outputs = tuple(tensor.clone() for tensor in of.outputs)
        ctx.mark_non_differentiable(*(out for out, wanted in zip(outputs, of.wanted, strict=True) if not wanted))
        return outputs

    @staticmethod
    def backward(ctx: FunctionCtx, *given: torch.Tensor | None) -> tuple[None, None]:
        if ctx.token is None:
            raise RuntimeError("a recorded pass has one backward pass")
        ctx.of.add_gradients(given)
        ctx.of.owner.waits_for, ctx.token = None, None
        return None, None


# --- All passes of a model --------------------------------------------------------------------------------------------


class Graphs:
    """The recorded passes of a model, in evaluation and training.

    Attributes:
        on: whether passes are recorded.
        waits_for: what dies with the pass whose backward pass is yet to come. Until then no other pass is replayed,
            because all share their memory.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None] = print):
        self.model, self.base, self.say, self.on = model, _base_of(model), say, True
        self.passes: dict[tuple, _Pass | None] = {}
        self.waits_for: Callable[[], object] | None = None
        self.trigger = torch.zeros((), device=model.device, requires_grad=True)
        self._gradients: dict[nn.Parameter, torch.Tensor] = {}
        self._adapted = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
        self._pool: tuple[int, int] | None = None
        self._grown = 0.0  # GB that recordings have taken

    def __deepcopy__(self, memo: dict) -> "Graphs":
        return self  # `of` makes those of the copy

    def same_random_numbers(self) -> AbstractContextManager[None]:
        """While open, random numbers are drawn that will be drawn again."""
        where = self.model.device
        return torch.random.fork_rng([where] if where.type == "cuda" else [])

    def new_recording(self) -> Recording:
        kind = self.model.device.type
        if self._pool is None and kind == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        return RECORDINGS[kind](self._pool)

    def gradient_of(self, parameter: nn.Parameter) -> torch.Tensor:
        """The place in which recordings add up the gradient of a parameter."""
        if parameter not in self._gradients:
            self._gradients[parameter] = torch.zeros_like(parameter)
        return self._gradients[parameter]

    def possible(self) -> bool:
        """Whether passes are recorded here, with gradients or without as torch is set: not with those that other
        processes add to."""
        return self.on and not (torch.is_grad_enabled() and dist.is_available() and dist.is_initialized())

    def __call__(self, name: tuple, function: Function, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`function(*inputs)`, recorded or replayed where that is possible. `name` stands for everything that it
        depends on besides the inputs, the weights, and which adapter is active in which mode."""
        busy = self.waits_for is not None and self.waits_for() is not None
        if not self.possible() or busy or _in_pass:
            return function(*inputs)
        key = (*name, self._mode(), *((tensor.shape, tensor.dtype) for tensor in inputs))
        known = self.passes.get(key)
        # Before the first pass: one that is recomputed outside of it would not keep the same tensors.
        if key not in self.passes and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            self.give_up("activations are recomputed")
            return function(*inputs)
        if known is None or known.moved():
            again = key in self.passes and sum(of is not None for of in self.passes.values()) < MOST_PASSES
            known = self._recorded(key, function, inputs) if again else None
        if known is None:
            self.passes.setdefault(key, None)
            with _within(False):
                return function(*inputs)
        return known(inputs)

    def _mode(self) -> tuple:
        kind, adapted = self.model.device.type, self._adapted
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        adapter = None if adapted is None else (adapted.disable_adapters, *adapted.active_adapters)
        return torch.is_grad_enabled(), self.model.training, autocast, adapter

    def _recorded(self, key: tuple, function: Function, inputs: tuple[torch.Tensor, ...]) -> _Pass | None:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        try:
            self.passes[key] = _Pass(self, function, inputs)
            torch.cuda.empty_cache()
            self._grown += (torch.cuda.memory_reserved() - before) / 1e9
            # What is computed as ever must fit, too, and may not use the memory of recordings.
            if self._grown > device.unreserved_gb():
                raise RuntimeError(f"recordings take {self._grown:.1f} GB, and less is left")
        except Exception as error:  # whatever a kernel or an architecture raises
            self.give_up(f"{type(error).__name__}: {error}".splitlines()[0][:200])
        return self.passes.get(key)

    def release(self) -> None:
        """Drops all recordings, for their memory. A pass that comes again is recorded anew."""
        self.passes.clear()
        self._gradients.clear()
        self._grown = 0.0
        torch.cuda.empty_cache()

    def give_up(self, why: str) -> None:
        self.on = False
        self.release()
        self.say(f"passes are not recorded as CUDA graphs, but computed kernel by kernel: {why}")


def record(model: nn.Module, on: bool, say: Callable[[str], None] = print) -> None:
    """Lets passes of a model be recorded, if `on`, on a device that has recordings. Weights that are sharded, or are
    not on one device, exclude it, and layers that read values on the host: those of LLM.int8."""
    base = _base_of(model)
    where = base.device
    if any(isinstance(m, bitsandbytes.nn.Linear8bitLt) or _is_elsewhere(m, where) for m in model.modules()):
        return
    if on and where.type in RECORDINGS and device.starts_kernels(where) and not device.weights_are_sharded():
        vars(base)["_graphs"] = Graphs(model, say)


def _is_elsewhere(module: nn.Module, where: torch.device) -> bool:
    """Whether a module looks up rows that are kept on another device, such as an untied embedding in 8 bits."""
    packed = getattr(module, "packed", None)
    return isinstance(packed, torch.Tensor) and packed.device.type != where.type


def of(model: nn.Module) -> Graphs | None:
    """The recordings of a model, None where its passes are not recorded."""
    base = _base_of(model)
    graphs = vars(base).get("_graphs")
    if graphs is not None and graphs.base is not base:
        graphs = vars(base)["_graphs"] = Graphs(model, graphs.say)
    return graphs if graphs is not None and graphs.on else None


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def size_above(size: int, step: int = 1) -> int:
    """The next of few sizes: four between a power of two and the next, at most a quarter larger; a multiple of `step`
    above it."""
    step = max(2 ** (size.bit_length() - 3) if size > 3 else 1, step)
    return -(-size // step) * step
