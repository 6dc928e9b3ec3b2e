"""Optimizer steps and micro-batches of rows that are merged into token trees (minionerec/model/token_trees.py): which
rows are in a step together, and how a step is split into micro-batches of about equal cost.

Dimensions: `n` rows.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from torch.utils.data import Sampler

from minionerec.model.token_trees import Shape, TreeCollator, split, widest

BLOCK = 2048  # rows to compare at a time


class Size(NamedTuple):
    """What the memory of a micro-batch depends on: its nodes, and its response tokens, which may need logits."""

    nodes: int
    responses: int


# --- Which rows share what --------------------------------------------------------------------------------------------


class RangeMinimum:
    """The minimum of any range of `values` [n], in constant time: level k holds the minimum of the 2^k values from each
    place on."""

    def __init__(self, values: np.ndarray):
        self.levels = [values]
        while 2 ** len(self.levels) <= len(values):
            last, half = self.levels[-1], 2 ** (len(self.levels) - 1)
            self.levels.append(np.minimum(last[:-half], last[half:]))

    def __call__(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """The minimum from `first` to `last`, which is included; for many ranges at once."""
        found = np.empty(len(first), dtype=np.int64)
        level_of = np.frexp(last - first + 1)[1] - 1
        for level in np.unique(level_of):
            here = level_of == level
            values = self.levels[level]
            found[here] = np.minimum(values[first[here]], values[last[here] - 2**level + 1])
        return found


class Prefixes:
    """The rows of a dataset in lexicographic order of their token ids, and how many tokens they share: enough to count
    the nodes of any set of rows without reading the tokens again.

    Attributes:
        length: [rows], tokens of a row's input.
        responses: [rows], response tokens of a row.
        order: [rows], the rows in lexicographic order.
        rank: [rows], the place of a row in it.
        shared: [rows], how many tokens the input at a place shares with the one before it; 0 at the first.
    """

    def __init__(self, dataset: datasets.Dataset):
        """Reads all rows: 8 bytes a token while it runs, about 100 bytes a row afterwards."""
        table = dataset.with_format("arrow")[:]
        chunks = table["input_ids"].chunks
        # Big-endian, so that bytes sort as the numbers do.
        tokens = np.concatenate([chunk.flatten().to_numpy().astype(">i4") for chunk in chunks])
        length = np.concatenate([pc.list_value_length(chunk).to_numpy() for chunk in chunks]).astype(np.int64)
        offset = np.concatenate([[0], np.cumsum(length)])
        rows = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), len(length), [None, pa.py_buffer(offset * tokens.itemsize), pa.py_buffer(tokens)]
        )
        self.order = pc.sort_indices(rows).to_numpy().astype(np.int64)
        self.rank = np.empty_like(self.order)
        self.rank[self.order] = np.arange(len(self.order))
        self.length = length - 1
        self.responses = length - table["prompt_length"].to_numpy()
        self.shared = np.zeros(len(length), dtype=np.min_scalar_type(length.max()))
        for start in range(1, len(length), BLOCK):
            row = self.order[start : start + BLOCK]
            before = self.order[start - 1 : start - 1 + len(row)]
            common = np.minimum(self.length[before], self.length[row])
            depth = np.arange(common.max() + 1)
            a, b = (np.minimum(offset[which, None] + depth, len(tokens) - 1) for which in (before, row))
            self.shared[start : start + BLOCK] = ((tokens[a] != tokens[b]) | (depth >= common[:, None])).argmax(axis=1)
        self._least_shared = RangeMinimum(self.shared)

    def __len__(self) -> int:
        return len(self.order)

    def shared_by(self, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """How many tokens the inputs at places `first` < `last` share: the least that neighbours between them do."""
        return self._least_shared(first + 1, last)

    @property
    def longest(self) -> Size:
        """The most nodes and the most response tokens that a row has."""
        return Size(int(self.length.max()), int(self.responses.max()))

    def sorted(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Distinct rows in lexicographic order [n], and how many tokens each shares with the one before it [n]."""
        places = np.sort(self.rank[rows])
        shared = np.zeros(len(places), dtype=np.int64)
        shared[1:] = self.shared_by(places[:-1], places[1:])
        return self.order[places], shared

    def size(self, rows: np.ndarray) -> Size:
        """The distinct beginnings of the inputs of distinct rows, and their response tokens."""
        rows, shared = self.sorted(rows)
        return Size(int((self.length[rows] - shared).sum()), int(self.responses[rows].sum()))

    def groups(self, step_rows: int, most: int, least: float = 0.3) -> np.ndarray:
        """[rows], the group of every row: rows that save most when they are in the same step, such as a user's.

        A beginning that `step_rows` rows or more share (an instruction) is shared in any step. Beyond it, neighbours in
        lexicographic order form a group if they share more than the fraction `least` of the rest of the shorter one.
        Groups of more than `most` rows are split.
        """
        if len(self) == 1:
            return np.zeros(1, dtype=np.int64)
        place = np.arange(len(self))
        # What the rows of a window of `width` share, and the most of the windows that hold a row.
        width = max(min(step_rows, len(self)), 2)
        begins = place[: 1 - width]
        in_window = RangeMinimum(-self._least_shared(begins + 1, begins + width - 1))
        common = -in_window(np.maximum(place - width + 1, 0), np.minimum(place, len(begins) - 1))
        length = self.length[self.order]
        shorter = np.concatenate([length[:1], np.minimum(length[1:], length[:-1])])
        new = self.shared.astype(np.int64) - common <= least * (shorter - common)
        new[0] = True
        new |= (place - np.maximum.accumulate(np.where(new, place, 0))) % most == 0
        return (np.cumsum(new) - 1)[self.rank]

    def parts_needed(self, order: np.ndarray, step_rows: int, most: Size) -> int:
        """Of the steps of `step_rows` consecutive rows of `order`, how many parts no larger than `most` the step that
        needs most must be cut into. No row may be larger."""
        step = np.arange(len(order)) // step_rows
        places = self.rank[order]
        places = places[np.lexsort((places, step))]
        shared = np.zeros(len(order), dtype=np.int64)
        inside = np.flatnonzero(step[1:] == step[:-1]) + 1
        shared[inside] = self.shared_by(places[inside - 1], places[inside])
        length, responses = self.length[self.order[places]], self.responses[self.order[places]]
        nodes, total_responses = np.cumsum(length - shared), np.cumsum(responses)
        # All steps at once, part by part. The first row of a part shares nothing with another.
        at = np.arange(0, len(order), step_rows)
        end = np.minimum(at + step_rows, len(order))
        parts = 0
        while len(at):
            by_nodes = np.searchsorted(nodes, nodes[at] - length[at] + most.nodes, side="right")
            by_responses = total_responses[at] - responses[at] + most.responses
            by_responses = np.searchsorted(total_responses, by_responses, side="right")
            at = np.minimum(np.minimum(by_nodes, by_responses), end)
            at, end = at[at < end], end[at < end]
            parts += 1
        return parts


def _cut(prefixes: Prefixes, rows: np.ndarray, parts: int, most: Size) -> list[np.ndarray]:
    """Distinct rows in lexicographic order in `parts` parts, or one for each row, the largest of which is as small a
    fraction of `most` as possible."""
    rows, shared = prefixes.sorted(rows)
    nodes, responses = prefixes.length[rows] - shared, prefixes.responses[rows]
    # As shares of `most`, in whole numbers.
    cost = np.stack([nodes * most.responses, responses * most.nodes])
    extra = np.stack([shared * most.responses, np.zeros_like(shared)])
    return np.split(rows, split(cost, extra, min(parts, len(rows)))[1:-1])


def evaluation_batches(prefixes: Prefixes, most: Size) -> list[list[int]]:
    """All rows in lexicographic order, in which neighbours share most, in batches no larger than `most` or the longest
    row."""
    most = Size(*map(max, most, prefixes.longest))
    parts = prefixes.parts_needed(prefixes.order, len(prefixes), most)
    return [part.tolist() for part in _cut(prefixes, prefixes.order, parts, most)]


# --- The order of the rows, and micro-batches -------------------------------------------------------------------------


class GroupSampler(Sampler):
    """The rows group by group, with the groups in a random order that is different in every epoch.

    Args:
        groups: [rows], the group of every row.
        seed: of the order, which follows from it and the epoch only.
    """

    def __init__(self, groups: np.ndarray, seed: int):
        self.groups, self.seed, self.epoch = groups, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        place = np.random.default_rng((self.seed, self.epoch)).permutation(self.groups.max() + 1)
        yield from np.argsort(place[self.groups], kind="stable").tolist()


class TreeBatches(Sampler):
    """The micro-batches of one process, as lists of rows. Those of an optimizer step cost about the same.

    Every process makes `accumulation` micro-batches per step, so that all make the same number of passes. It is the
    smallest number that keeps each micro-batch, in every epoch, below the nodes of (micro_rows + 1) / 2 rows of the
    longest length and the response tokens of `micro_rows` rows, and at most the number of micro-batches of `micro_rows`
    separate rows. If the last step has few rows, some micro-batches are empty.

    Args:
        prefixes: of all rows.
        sampler: their order, the same in every process; every `step_rows` consecutive ones form an optimizer step.
        epochs: how many there will be.
        micro_rows, step_rows: rows of a micro-batch and of a step without trees; `step_rows` is a multiple of
            `micro_rows` times `processes`.
        process: the index of this process.
    """

    def __init__(
        self,
        prefixes: Prefixes,
        sampler: Sampler,
        epochs: int,
        micro_rows: int,
        step_rows: int,
        processes: int = 1,
        process: int = 0,
    ):
        self.prefixes, self.sampler, self.step_rows = prefixes, sampler, step_rows
        self.processes, self.process = processes, process
        # A random step of separate rows has micro-batches of half the nodes of the largest on average, too. With all of
        # its responses the peak was 2% above that of separate rows.
        longest = prefixes.longest
        self.most = Size((micro_rows + 1) * longest.nodes // 2, (3 * micro_rows + 1) // 4 * longest.responses)
        parts = 0
        for epoch in reversed(range(epochs)):  # which leaves the sampler at the first one
            self.set_epoch(epoch)
            parts = max(parts, prefixes.parts_needed(np.array(list(sampler)), step_rows, self.most))
        self.accumulation, plain = math.ceil(parts / processes), step_rows // (micro_rows * processes)
        if self.accumulation > plain:  # these fit as many separate rows, and no less
            self.accumulation, self.most = plain, Size(*(micro_rows * size for size in longest))

    def set_epoch(self, epoch: int) -> None:
        self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return math.ceil(len(self.prefixes) / self.step_rows) * self.accumulation

    def steps(self) -> Iterator[list[np.ndarray]]:
        """The micro-batches of every step, of all processes in turn."""
        order, prefixes = np.array(list(self.sampler)), self.prefixes
        parts = self.accumulation * self.processes
        for start in range(0, len(order), self.step_rows):
            filled = _cut(prefixes, order[start : start + self.step_rows], parts, self.most)
            yield filled + [order[:0]] * (parts - len(filled))

    def __iter__(self) -> Iterator[list[int]]:
        for parts in self.steps():
            yield from (part.tolist() for part in parts[self.process :: self.processes])

    def survey(self, steps: int = 100) -> tuple[float, float, np.ndarray]:
        """Of the first steps: the tokens and the nodes of one on average, and the rows of the largest micro-batch."""
        parts = [part for parts in islice(self.steps(), steps) for part in parts]
        surveyed = len(parts) / (self.accumulation * self.processes)
        sizes = [self.prefixes.size(part) for part in parts]
        tokens = sum(int(self.prefixes.length[part].sum()) for part in parts)
        filled = [max(s.nodes / self.most.nodes, s.responses / self.most.responses) for s in sizes]
        return tokens / surveyed, sum(size.nodes for size in sizes) / surveyed, parts[int(np.argmax(filled))]

    def few_shapes(self, collator: TreeCollator, most: int = 4) -> tuple[list[Shape], float]:
        """At most so many shapes, the smallest first, one of which nearly every micro-batch fits, and by what fraction
        padding to them adds to its nodes. The collator makes equally many tensor rows from here on."""
        parts = list(islice((part for parts in self.steps() for part in parts if len(part)), 256))
        average = sum(self.prefixes.size(part).nodes for part in parts) / len(parts)
        collator.parts = tensor_rows = max(round(average / max(collator.width, self.prefixes.longest.nodes)), 1)
        sizes = np.empty((len(parts), 2), dtype=np.int64)  # nodes of a tensor row, and response tokens
        for i, part in enumerate(parts):
            rows, shared = self.prefixes.sorted(part)
            length = self.prefixes.length[rows]
            nodes = widest(length, shared, collator.tensor_rows(length, shared))
            sizes[i] = nodes, self.prefixes.responses[part].sum()
        sizes = -(-sizes // (collator.multiple, 8)) * (collator.multiple, 8)

        # The two that cost least to make one, again and again. A response token may need a row of logits.
        price = np.array([tensor_rows, 1])
        shapes, count = np.unique(sizes, axis=0, return_counts=True)
        while len(shapes) > most:
            joined = np.maximum(shapes[:, None], shapes)
            added = (
                (joined @ price) * (count[:, None] + count) - (shapes @ price * count)[:, None] - shapes @ price * count
            )
            added[np.tril_indices(len(shapes))] = added.max() + 1
            i, j = np.unravel_index(added.argmin(), added.shape)
            shapes[i], count[i] = joined[i, j], count[i] + count[j]
            shapes, count = np.delete(shapes, j, axis=0), np.delete(count, j)
        shapes = shapes[np.argsort(shapes @ price, kind="stable")]
        fits = (shapes >= sizes[:, None]).all(axis=2).argmax(axis=1)
        more = float(shapes[fits, 0].sum() / sizes[:, 0].sum()) - 1
        return [Shape(tensor_rows, *of) for of in shapes.tolist()], more

    def summary(self) -> str:
        """One line: what a step computes."""
        rows = min(self.step_rows, len(self.prefixes))
        tokens, nodes, _ = self.survey(steps=20)
        return f"token trees: a step of {rows:,} rows has {tokens:,.0f} tokens, and computes {nodes:,.0f} of them"
