"""Micro-batches that are recomputed, in halves, when memory runs out. No step is lost, and the gradients are those
of whole micro-batches.

A process cannot go back once gradients are averaged over processes while they are computed, as DDP does it. So where
several processes may have to, each adds up its gradients alone, and they are averaged after that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

from minionerec.flags import engine
from minionerec.model import graphs
from minionerec.model.halving import Halving

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer  # what `RetriesMicroBatches` is mixed into
else:
    _Trainer = object

EXAMPLES = "examples"  # in a batch: what it was made of
BUCKET = 25 * 2**20  # bytes of the gradients that are averaged together


class Examples:
    """The examples of a batch. Not a list, into which `pin_memory` and accelerate would look for tensors."""

    def __init__(self, rows: list[dict]):
        self.rows = rows


def keeping_examples(collate: Callable[[list], dict[str, torch.Tensor]]) -> Callable[[list], dict]:
    """A collator whose batches keep their examples, so that they can be split."""
    return lambda examples: {**collate(examples), EXAMPLES: Examples(examples)}


@contextmanager
def averaged_afterwards(trainer: "_Trainer", model: nn.Module) -> Iterator[None]:
    """While open, gradients stay in this process; at the end they are averaged over all processes, as DDP does it. Its
    own averages come while it computes, so these take a little longer."""
    if trainer.args.world_size == 1:
        yield
        return
    with trainer.accelerator.no_sync(model):
        yield
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # In buckets, as DDP does it: an adapter has some hundred small parameters, and each would start two kernels.
    for bucket in _take_tensors([parameter.grad for parameter in trained], BUCKET):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat.div_(trainer.args.world_size))
        torch._foreach_copy_(bucket, _unflatten_dense_tensors(flat, bucket))


def recordings(model: nn.Module) -> graphs.Graphs | None:
    """Those of a model, where there are any."""
    recorded = graphs.of(model)
    return recorded if recorded and any(recorded.passes.values()) else None


class RetriesMicroBatches(_Trainer):
    """A mixin for a Trainer whose batches come from `keeping_examples(collate)`.

    Attributes:
        collate: makes a batch of examples.
        goes_back: whether several processes average their gradients after a step's last micro-batch, so that each can
            compute it again. One process always can.
    """

    collate: Callable[[list], dict[str, torch.Tensor]]
    goes_back = False

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.halving = Halving("micro-batches")
        self._of_step: list[dict] = []  # the micro-batches of this step so far

    def get_batch_samples(self, *args: object, **kwargs: object) -> object:
        """As the Trainer's, which asks for the micro-batches of a step here."""
        self._of_step = []
        return super().get_batch_samples(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As the Trainer's, for a micro-batch in parts that fit. Where one does not, the gradients of the step are
        dropped, and all of its micro-batches so far recomputed."""
        if engine() or not (self.goes_back or self.args.world_size == 1):
            return super().training_step(model, _without_examples(inputs), num_items_in_batch)
        self._of_step.append(inputs)
        if self.accelerator.sync_gradients:
            with averaged_afterwards(self, model):
                return self._retried(model, num_items_in_batch)
        return self._retried(model, num_items_in_batch)

    def _retried(self, *args: object) -> torch.Tensor:
        """The loss of the last micro-batch."""
        to_do = self._of_step[-1:]
        while (losses := self._attempt(to_do, *args)) is None:
            # Recordings hold as much as a micro-batch needs, and no half of one is padded to their shapes.
            if recorded := recordings(self.model):
                recorded.give_up("memory ran out")
            else:
                self.halving.halve()
            self.model.zero_grad()
            to_do = self._of_step
        return losses[-1]

    def _attempt(self, micro_batches: list[dict], *args: object) -> list[torch.Tensor] | None:
        """The losses of micro-batches, None if memory runs out."""
        try:
            return [self._in_parts(inputs, *args) for inputs in micro_batches]
        except torch.OutOfMemoryError:
            most = max(len(inputs[EXAMPLES].rows) for inputs in micro_batches)
            if self.halving.parts >= most and not recordings(self.model):
                raise
        return None

    def _in_parts(self, inputs: dict, model: nn.Module, num_items_in_batch: torch.Tensor | int | None) -> torch.Tensor:
        if self.halving.parts == 1:
            return super().training_step(model, _without_examples(inputs), num_items_in_batch)
        step = super().training_step
        parts = (self.collate(list(part)) for part in self.halving.split(inputs[EXAMPLES].rows))
        return torch.stack([step(model, part, num_items_in_batch) for part in parts]).sum()


def _without_examples(inputs: dict) -> dict:
    return {name: value for name, value in inputs.items() if name != EXAMPLES}
