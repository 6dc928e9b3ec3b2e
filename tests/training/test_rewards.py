import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as torch_save_file

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


@pytest.mark.parametrize("size", range(2, 33))
def test_a_group_of_equal_rewards_is_seen_whatever_they_are(size):
    """The mean of equal fractions differs from them by rounding, and so does a sum of several weighted rewards."""
    values = [k / n for n in range(1, 12) for k in range(-n, n + 1)]
    equal = torch.tensor(values).repeat_interleave(size)
    assert rewards.equal_in_group(equal, size).all()
    parts = torch.stack([equal, equal.flip(0), torch.full_like(equal, 1 / 3)], dim=1)
    for weights in ([0.7, 0.3, 0.1], [1 / 3, 1e-3, 77.7], [1.0, 1.0, 1.0]):
        assert rewards.equal_in_group((parts * torch.tensor(weights)).nansum(dim=1), size).all()
    other = equal.clone()
    other[1::size] = torch.nextafter(other[1::size], torch.tensor(9.0))
    assert not rewards.equal_in_group(other, size).any()
    other[1::size] = math.nan  # no reward
    assert rewards.equal_in_group(other, size).all() and rewards.equal_in_group(other * math.nan, size).all()


def test_equal_items_have_equal_rewards_of_every_kind():
    """Items of a group that are equally far from the target: with as many levels, and with the same embedding."""
    levels_of = {sid: list(sid) for sid in ("abc", "axc", "ayz", "azb", "aqqqqq")}
    chance = np.random.default_rng(0)
    wanted, other = chance.normal(size=(2, 33)).astype(np.float32)
    embeddings = {sid: (wanted if sid == "abc" else other).copy() for sid in levels_of}
    group, targets = ["axc", "ayz", "azb"], ["abc"] * 3
    found = [
        rewards.rule(group, targets),
        rewards.rank_penalty(group, targets, 3),
        rewards.prefix(group, targets, levels_of),
        rewards.semantic(group, targets, embeddings),
        rewards.collaborative(group, targets, [["x"]] * 3, lambda _, items: [1 / 7] * len(items)),
    ]
    weights = torch.tensor([0.7, 0.2, 1 / 3, 1.1, 0.9])
    assert rewards.equal_in_group((torch.tensor(found).T * weights).sum(dim=1), 3).all()
    longer = rewards.prefix(["axc", "aqqqqq"], ["abc", "abc"], levels_of)
    assert not rewards.equal_in_group(torch.tensor(longer), 2).any()


def test_embeddings_are_read_by_item_id(tmp_path):
    matrix = np.arange(6, dtype=np.float64).reshape(3, 2)
    np.save(tmp_path / "e.npy", matrix)
    save_file({"e": matrix}, tmp_path / "e.safetensors")
    for name in ("e.npy", "e.safetensors"):
        embeddings = rewards.read_embeddings(str(tmp_path / name), {"2": "s", "0": "t", "1": "s"})
        assert {sid: vector.tolist() for sid, vector in embeddings.items()} == {"s": [4.0, 5.0], "t": [0.0, 1.0]}
    with pytest.raises(InputError, match="3 rows, none of them for item '3'"):
        rewards.read_embeddings(str(tmp_path / "e.npy"), {"3": "s"})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_embeddings_that_are_not_finite_are_refused(tmp_path, value):
    """Their rewards would be NaN, which teach nothing."""
    matrix = np.ones((3, 2))
    matrix[1, 1] = value
    np.save(tmp_path / "e.npy", matrix)
    save_file({"e": matrix}, tmp_path / "e.safetensors")
    for name in ("e.npy", "e.safetensors"):
        path = str(tmp_path / name)
        assert set(rewards.read_embeddings(path, {"0": "s", "2": "t"})) == {"s", "t"}  # no item has that row
        with pytest.raises(InputError, match=f"{name}: row 1 has values that are NaN or infinite; embed item 1 again"):
            rewards.read_embeddings(path, {"0": "s", "1": "t"})


def test_embeddings_of_any_number_type_are_read_and_no_others(tmp_path):
    torch_save_file({"e": torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)}, tmp_path / "e.safetensors")
    assert rewards.read_embeddings(str(tmp_path / "e.safetensors"), {"0": "s"})["s"].tolist() == [1.5, -2.0]
    path = tmp_path / "e.npy"
    np.save(path, np.array([["a", "b"]]))
    texts = path.read_bytes()
    np.savez(tmp_path / "e.npz", np.ones((1, 2)))
    for content in (texts, b"", b"text", (tmp_path / "e.npz").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"e\.npy: cannot be read: "):
            rewards.read_embeddings(str(path), {"0": "s"})


def test_embeddings_are_never_unpickled(tmp_path):
    # A real pickle, since a reader that unpickles would fail on any other bytes too, and the test would pass. Writing
    # one executes nothing, and the reader under test must refuse it.
    np.save(tmp_path / "e.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="cannot be read"):
        rewards.read_embeddings(str(tmp_path / "e.npy"), {"0": "s"})
