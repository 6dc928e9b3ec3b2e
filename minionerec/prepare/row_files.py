"""Writes the rows of the splits as `csv` writes Python's lists, but many at a time: each item's text is made once, and
Arrow joins them.

Dimensions: `n` rows, `m` entries of their histories together.
"""

import os
import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

COLUMNS = ("user_id", "history_item_title", "item_title", "history_item_id", "item_id", "history_item_sid", "item_sid")
CHUNK = 1 << 22  # bytes of rows that are joined at a time, about
TEXT = pa.large_string()  # whose texts may have more than 2 GB together
_SPECIAL = re.compile('[,"\r\n]')


def write_rows(
    paths: Sequence[str],
    batches: Iterable[np.ndarray],
    users: Sequence[str],
    sids: Sequence[str],
    titles: Sequence[str],
) -> None:
    """Streams the rows of `cleaning.in_time_order` to the files of their splits, which are `paths` by number."""
    user_cells, ids = _cells(users), list(map(str, range(len(titles))))
    columns = [  # of the history and of the target
        (_Lists(list(map(repr, titles))), _cells(titles)),
        (_Lists(ids), _cells(ids)),
        (_Lists(list(map(repr, sids))), _cells(sids)),
    ]
    with ExitStack() as stack:
        files = []
        for path in paths:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            files.append(stack.enter_context(open(path, "wb")))
            files[-1].write(f"{','.join(COLUMNS)}\n".encode())
        size = 1 + sum(lists.size for lists, _ in columns)  # of an item in a history
        for batch in batches:
            most = max(1, CHUNK // (size * batch["history"].shape[1]))
            for start in range(0, len(batch), most):
                part = batch[start : start + most]
                for number, file in enumerate(files):
                    rows = part[part["split"] == number]
                    if len(rows):
                        file.write(_lines(rows, user_cells, columns))


def _lines(rows: np.ndarray, users: pa.Array, columns: "Sequence[tuple[_Lists, pa.Array]]") -> memoryview:
    """The lines [n] of rows, as UTF-8."""
    there = rows["history"] >= 0
    past, sizes = rows["history"][there], there.sum(axis=1)
    cells = [users.take(pa.array(rows["user"]))]
    for lists, targets in columns:
        cells += [lists.of(past, sizes), targets.take(pa.array(rows["item"]))]
    lines = _joined([_joined(cells, ","), "\n"])
    return memoryview(lines.buffers()[2])[: pc.sum(pc.binary_length(lines)).as_py()]


class _Lists:
    """Cells with lists of items, each of which is written as one of `texts`."""

    def __init__(self, texts: Sequence[str]):
        self.parts = pa.array([text.replace('"', '""') for text in texts], TEXT)
        self.size = sum(map(len, texts)) // max(1, len(texts))  # of an item, on average
        self.special = np.fromiter((bool(_SPECIAL.search(text)) for text in texts), bool, len(texts))

    def of(self, items: np.ndarray, sizes: np.ndarray) -> pa.Array:
        """The cells of lists of `items` [m], `sizes` [n] of them each. Those with a comma, a quote or a line break are
        quoted."""
        ends = np.cumsum(sizes)
        starts = pa.array(np.r_[0, ends], pa.int32())
        lists = pa.ListArray.from_arrays(starts, self.parts.take(pa.array(items)))
        quoted = pa.array((sizes > 1) | self.special[items[ends - 1]])
        quote = pc.if_else(quoted, pa.scalar('"', TEXT), pa.scalar("", TEXT))
        return _joined([quote, "[", pc.binary_join(lists, pa.scalar(", ", TEXT)), "]", quote])


def _joined(columns: Sequence[pa.Array | str], between: str = "") -> pa.Array:
    """The texts of the columns, row by row."""
    values = [pa.scalar(column, TEXT) if isinstance(column, str) else column for column in columns]
    return pc.binary_join_element_wise(*values, pa.scalar(between, TEXT))


def _cells(texts: Iterable[str]) -> pa.Array:
    """Cells with a text each."""
    quoted = ('"' + text.replace('"', '""') + '"' if _SPECIAL.search(text) else text for text in texts)
    return pa.array(quoted, TEXT)
