"""Optimizer steps and micro-batches of rows that are computed one by one; `tree_batches` has those of token trees."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler):
    """A random order of the examples, in which those of an optimizer step are sorted, the longest first.

    A step's gradient does not depend on how its examples are split into micro-batches, but its padding and time do.
    The micro-batch that needs the most memory comes first. The order follows from the seed and the epoch only, so a
    resumed run gets the same steps.

    Args:
        lengths: tokens of every example.
        step_rows: examples of an optimizer step, over all processes.
        seed: of the order, which is different in every epoch.
        group_by_length: sort the examples of up to 50 steps together, but at most a quarter of all: the examples of a
            step then have similar lengths. The longest example comes first of all.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, step_rows: int, seed: int, group_by_length: bool = False):
        self.lengths, self.seed = np.asarray(lengths), seed
        steps = min(50, len(self.lengths) // (4 * step_rows)) if group_by_length else 1
        self.sorted_rows, self.group_by_length = step_rows * max(steps, 1), group_by_length
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self))
        if self.group_by_length:
            longest = int(self.lengths[order].argmax())
            order[[0, longest]] = order[[longest, 0]]
        place = np.arange(len(order)) // self.sorted_rows
        yield from order[np.lexsort((-self.lengths[order], place))].tolist()


class RowBatches(Sampler):
    """The micro-batches of one process, as lists of rows, where every row is computed by itself.

    Consecutive ones go to the processes in turn. Every process has as many, because all must make the same number of
    passes; the last ones of an epoch may be empty. accelerate would fill them with rows from the start of the epoch,
    which would then train twice.

    Args:
        sampler: the order of the rows, the same in every process.
        micro_rows: rows of a micro-batch.
        process: the index of this process.
    """

    def __init__(self, sampler: Sampler, micro_rows: int, processes: int = 1, process: int = 0):
        self.sampler, self.micro_rows, self.processes, self.process = sampler, micro_rows, processes, process

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.sampler) / self.micro_rows) / self.processes)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(self.sampler)
        for start in range(0, len(order), self.micro_rows * self.processes):
            own = start + self.process * self.micro_rows
            yield order[own : own + self.micro_rows]
