"""Rows that begin alike, for token trees, and what a tree of them holds."""

import numpy as np
from hypothesis import strategies as st

from minionerec.training.tree_batches import Size


def examples(count: int, seed: int = 0, most: int = 9) -> list[dict]:
    """Rows over three tokens, many of which begin alike; some twice."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        ids = generator.integers(1, 4, generator.integers(3, most + 1)).tolist()
        rows.append({"input_ids": ids, "prompt_length": int(generator.integers(1, len(ids))), "length": len(ids)})
    return rows


def of_users(users: int, seed: int = 0) -> list[dict]:
    """Rows of an instruction, a user's history up to some item, and the next item, user by user."""
    generator = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        items = generator.integers(3, 90, (generator.integers(2, 7), 3)).tolist()
        for count in range(1, len(items)):
            prompt = [1, 2, 1, *(token for item in items[:count] for token in item), 2]
            ids = [*prompt, *items[count], 1]
            rows.append({"input_ids": ids, "prompt_length": len(prompt), "length": len(ids), "user": user})
    return rows


def inputs_of(rows: list[dict]) -> list[list[int]]:
    """What the model reads: all but the last token, which is only predicted."""
    return [row["input_ids"][:-1] for row in rows]


def beginnings_of(inputs: list[list[int]]) -> set[tuple[int, ...]]:
    return {tuple(ids[:end]) for ids in inputs for end in range(1, len(ids) + 1)}


ids_of_a_row = st.lists(st.integers(1, 3), min_size=2, max_size=9)
batches_of_rows = st.lists(
    st.tuples(ids_of_a_row, st.integers(1, 8)).map(
        lambda row: {"input_ids": row[0], "prompt_length": min(row[1], len(row[0]) - 1)}
    ),
    min_size=1,
    max_size=12,
)


def size_of(rows: list[dict]) -> Size:
    return Size(len(beginnings_of(inputs_of(rows))), sum(len(r["input_ids"]) - r["prompt_length"] for r in rows))
