"""Rewards of recommended items. Pure functions over SIDs; every reward is a float, one a completion.

Completions come group by group: `group_size` neighbours answer the same prompt, best beam first.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from minionerec import sasrec
from minionerec.data.files import Catalogue
from minionerec.errors import InputError


def rule(predicted: Sequence[str], targets: Sequence[str]) -> list[float]:
    """1 for the target, 0 for any other item."""
    return [float(sid == target) for sid, target in zip(predicted, targets, strict=True)]


def rank_penalty(predicted: Sequence[str], targets: Sequence[str], group_size: int) -> list[float]:
    """What a wrong item costs by its place: the higher it stands, the more.

    In a group that contains the target, the item at place i (from 0) gets -(1 / log2(i + 2)) / S, with S the sum of
    1 / log2(i + 2) over the group, and the target 0. In any other group all get 0. Raises ValueError where
    `group_size` does not divide the completions.
    """
    if len(predicted) % group_size:
        raise ValueError(f"{len(predicted)} completions are no whole number of groups of {group_size}")
    discounts = [1 / math.log2(place + 2) for place in range(group_size)]
    total = math.fsum(discounts)
    rewards = []
    for start in range(0, len(predicted), group_size):
        hits = [predicted[start + i] == targets[start + i] for i in range(group_size)]
        if any(hits):
            rewards += [0.0 if own else -discount / total for own, discount in zip(hits, discounts, strict=True)]
        else:
            rewards += [0.0] * group_size
    return rewards


def semantic(predicted: Sequence[str], targets: Sequence[str], embeddings: Mapping[str, np.ndarray]) -> list[float]:
    """The cosine of the embeddings of the recommended item and the target. `embeddings`: SID -> vector [d]."""

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        norm = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / norm if norm else 0.0

    return [cosine(embeddings[sid], embeddings[target]) for sid, target in zip(predicted, targets, strict=True)]


def collaborative(
    predicted: Sequence[str],
    targets: Sequence[str],
    histories: Sequence[Sequence[str]],
    scores: Callable[[list[list[str]], list[str]], list[float]],
) -> list[float]:
    """The score a sequential recommender gives the item after the history; `rule` where a prompt has no history.

    `scores(histories, items)` scores each item after the history of the same place.
    """
    rewards = rule(predicted, targets)
    asked = [i for i, history in enumerate(histories) if history]
    values = scores([list(histories[i]) for i in asked], [predicted[i] for i in asked]) if asked else []
    for i, value in zip(asked, values, strict=True):
        rewards[i] = float(value)
    return rewards


def read_embeddings(path: str, sid_of_item: Mapping[str, str]) -> dict[str, np.ndarray]:
    """SID -> embedding [d] from a file whose row i belongs to item id i; the first item of a SID counts.

    Args:
        path: `.npy`, or `.safetensors` with a single tensor; [items, d]. Nothing is unpickled.
        sid_of_item: item id -> SID.

    Raises InputError where the file cannot be read or lacks the row of an item.
    """
    try:
        if path.endswith(".safetensors"):
            tensors = load_file(path)
            if len(tensors) != 1:
                raise ValueError(f"expected one tensor, found {len(tensors)}")
            matrix = next(iter(tensors.values()))
        else:
            matrix = np.load(path, allow_pickle=False)
        if matrix.ndim != 2:
            raise ValueError(f"expected a matrix [items, d], found shape {list(matrix.shape)}")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"--ada_path {path}: cannot be read: {error}") from None
    embeddings: dict[str, np.ndarray] = {}
    for item, sid in sid_of_item.items():
        if not item.isdigit() or int(item) >= len(matrix):
            raise InputError(f"--ada_path {path}: has {len(matrix)} rows and none for item {item!r}")
        embeddings.setdefault(sid, matrix[int(item)].astype(np.float32))
    return embeddings


def reward_functions(
    reward_type: str,
    num_generations: int,
    sid_of: Mapping[tuple[int, ...], str],
    catalogue: Catalogue,
    ada_path: str,
    cf_path: str,
) -> list[Callable[..., list[float]]]:
    """Rewards as TRL calls them: token ids and dataset columns in, a float for every completion out.

    Args:
        reward_type: a name of `--reward_type`.
        num_generations: completions of a group.
        sid_of: the SID of every completion.
        ada_path, cf_path: what `semantic` and `sasrec` read.

    Raises InputError where those files do not fit the catalogue.
    """

    def predicted(completion_ids: list[list[int]]) -> list[str]:
        return [sid_of[tuple(ids)] for ids in completion_ids]

    def rule_reward(completion_ids: list, target: list, **_: object) -> list[float]:
        return rule(predicted(completion_ids), target)

    def rank_reward(completion_ids: list, target: list, **_: object) -> list[float]:
        return rank_penalty(predicted(completion_ids), target, num_generations)

    rule_reward.__name__, rank_reward.__name__ = "rule", "rank_penalty"  # as the logs name them
    if reward_type == "semantic":
        embeddings = read_embeddings(ada_path, {id_: item.sid for id_, item in catalogue.items.items()})

        def semantic_reward(completion_ids: list, target: list, **_: object) -> list[float]:
            return semantic(predicted(completion_ids), target, embeddings)

        semantic_reward.__name__ = "semantic"
        return [semantic_reward]
    if reward_type == "sasrec":
        recommender = sasrec.load(cf_path)
        lacking = [sid for sid in sid_of.values() if sid not in recommender.number]
        if lacking:
            raise InputError(f"--cf_path {cf_path}: the model does not know {len(lacking)} SIDs, such as {lacking[0]}")

        def collaborative_reward(completion_ids: list, target: list, history: list, **_: object) -> list[float]:
            return collaborative(predicted(completion_ids), target, history, recommender.scores)

        collaborative_reward.__name__ = "collaborative"
        return [collaborative_reward]
    return {"rule": [rule_reward], "ranking": [rule_reward, rank_reward], "ranking_only": [rank_reward]}[reward_type]
