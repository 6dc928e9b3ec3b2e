import math

import numpy as np
import pytest
from safetensors.numpy import save_file

from minionerec.errors import InputError
from minionerec.training import rewards


def test_rule_rewards_the_target():
    assert rewards.rule(["a", "b", "a"], ["a", "a", "b"]) == [1.0, 0.0, 0.0]


def test_rank_penalty_falls_with_the_place_of_a_wrong_item():
    total = 1 + 1 / math.log2(3) + 1 / 2
    first, second, third = rewards.rank_penalty(["x", "t", "y"], ["t"] * 3, 3)
    assert first == pytest.approx(-1 / total)
    assert second == 0
    assert third == pytest.approx(-0.5 / total)
    # Only groups with the target are told apart, each by its own target.
    values = rewards.rank_penalty(["x", "y", "t", "z"], ["t", "t", "t", "t"], 2)
    total = 1 + 1 / math.log2(3)
    assert values == pytest.approx([0, 0, 0, -1 / math.log2(3) / total])
    with pytest.raises(ValueError, match="not a multiple of the group size"):
        rewards.rank_penalty(["a"] * 3, ["a"] * 3, 2)


@pytest.mark.parametrize("levels", [1, 2, 3, 4, 5, 6])
def test_prefix_is_the_fraction_of_leading_levels(levels):
    target = "".join(f"<{i}>" for i in range(levels))
    levels_of = {target: [f"<{i}>" for i in range(levels)]}
    for common in range(levels):  # equal up to a level, other from there on, but for the last
        codes = [f"<{i}>" if i < common or (i == levels - 1 > common) else f"<x{i}>" for i in range(levels)]
        levels_of[f"{common}"] = codes
    found = rewards.prefix([*map(str, range(levels)), target], [target] * (levels + 1), levels_of)
    assert found == pytest.approx([common / levels for common in range(levels + 1)])


def test_prefix_of_sids_of_different_lengths():
    levels_of = {"ab": ["a", "b"], "abc": ["a", "b", "c"], "x": ["x"]}
    assert rewards.prefix(["ab", "abc", "x"], ["abc", "ab", "abc"], levels_of) == pytest.approx([2 / 3, 2 / 3, 0])


def test_levels_count_by_their_weights(monkeypatch):
    monkeypatch.setattr(rewards, "LEVEL_WEIGHTS", (1.0, 3.0))
    levels_of = {"abc": ["a", "b", "c"], "ab!": ["a", "b", "!"], "a!!": ["a", "!", "!"]}
    assert rewards.prefix(["ab!", "a!!"], ["abc", "abc"], levels_of) == pytest.approx([4 / 7, 1 / 7])


def test_semantic_is_the_cosine():
    embeddings = {"a": np.array([1.0, 0.0]), "b": np.array([3.0, 4.0]), "zero": np.zeros(2)}
    assert rewards.semantic(["a", "b", "zero"], ["a", "a", "b"], embeddings) == pytest.approx([1.0, 0.6, 0.0])


def test_collaborative_asks_only_for_rows_with_a_history():
    asked = []

    def scores(histories, items):
        asked.extend(zip(histories, items, strict=True))
        return [0.25] * len(items)

    values = rewards.collaborative(["a", "b", "b"], ["a", "a", "b"], [["x"], ["y", "z"], []], scores)
    assert values == [0.25, 0.25, 1.0]
    assert asked == [(["x"], "a"), (["y", "z"], "b")]


def test_embeddings_are_read_by_item_id(tmp_path):
    matrix = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "e.npy", matrix)
    save_file({"e": matrix}, tmp_path / "e.safetensors")
    for name in ("e.npy", "e.safetensors"):
        embeddings = rewards.read_embeddings(str(tmp_path / name), {"2": "s", "0": "t", "1": "s"})
        assert {sid: vector.tolist() for sid, vector in embeddings.items()} == {"s": [4.0, 5.0], "t": [0.0, 1.0]}
    with pytest.raises(InputError, match="3 rows, none of them for item '3'"):
        rewards.read_embeddings(str(tmp_path / "e.npy"), {"3": "s"})


def test_embeddings_are_never_unpickled(tmp_path):
    # A real pickle, since a reader that unpickles would fail on any other bytes too, and the test would pass. Writing
    # one executes nothing, and the reader under test must refuse it.
    np.save(tmp_path / "e.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        rewards.read_embeddings(str(tmp_path / "e.npy"), {"0": "s"})
