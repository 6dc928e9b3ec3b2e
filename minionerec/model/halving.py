"""Continues when memory runs out: what did not fit is recomputed in halves."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from minionerec import world

T = TypeVar("T")
R = TypeVar("R")


class Halving:
    """Computes batches in as many parts as they need to fit in memory: one, until there is an out-of-memory error.

    Each process has its own, since none needs another one for a part. Where all take part in every forward pass
    (sharded weights), a batch must not be split.

    Args:
        what: is split, for the line that says so, such as `batches of an evaluation`.
    """

    def __init__(self, what: str):
        self.what, self.parts = what, 1

    def split(self, rows: Sequence[T]) -> list[Sequence[T]]:
        """Rows in the parts that fit; at least one, which may be empty."""
        size = max(-(-len(rows) // self.parts), 1)
        return [rows[start : start + size] for start in range(0, max(len(rows), 1), size)]

    def __call__(self, compute: Callable[[Sequence[T]], R], rows: Sequence[T]) -> list[R]:
        """The results of `compute` for parts of the rows, in order. Raises torch.OutOfMemoryError where one row does
        not fit."""
        while (found := self._attempt(compute, rows)) is None:
            self.halve()
        return found

    def _attempt(self, compute: Callable[[Sequence[T]], R], rows: Sequence[T]) -> list[R] | None:
        """None if a part does not fit. The error, which holds the tensors of the attempt, is gone then."""
        try:
            return [compute(part) for part in self.split(rows)]
        except torch.OutOfMemoryError:
            if self.parts >= len(rows):
                raise
        return None

    def halve(self) -> None:
        """Makes the parts half as large, with a line that says so, and frees what the failed attempt has left."""
        self.parts *= 2
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        process = f"process {world.rank()}: " if world.rank() else ""
        print(f"\n{process}out of memory: {self.what} are computed in {self.parts} parts from here on", flush=True)
