"""Rewards of recommended items: functions over SIDs that return one float per completion.

Completions come group by group: `group_size` consecutive ones belong to the same prompt, best beam first.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from minionerec import sasrec
from minionerec.data.files import Catalogue
from minionerec.errors import InputError


def rule(predicted: Sequence[str], targets: Sequence[str]) -> list[float]:
    """1 for the target, 0 for any other item."""
    return [float(sid == target) for sid, target in zip(predicted, targets, strict=True)]


def rank_penalty(predicted: Sequence[str], targets: Sequence[str], group_size: int) -> list[float]:
    """A penalty for wrong items, larger for higher ranks.

    In a group that contains the target, the item at rank i (from 0) gets -(1 / log2(i + 2)) / S, with S the sum of
    1 / log2(i + 2) over the group, and the target gets 0. In any other group all items get 0. Raises ValueError if the
    number of completions is not a multiple of `group_size`.
    """
    if len(predicted) % group_size:
        raise ValueError(f"{len(predicted)} completions: not a multiple of the group size {group_size}")
    discounts = [1 / math.log2(place + 2) for place in range(group_size)]
    total = math.fsum(discounts)
    rewards = []
    for start in range(0, len(predicted), group_size):
        hits = [predicted[start + i] == targets[start + i] for i in range(group_size)]
        if any(hits):
            rewards += [0.0 if hit else -discount / total for hit, discount in zip(hits, discounts, strict=True)]
        else:
            rewards += [0.0] * group_size
    return rewards


def prefix(predicted: Sequence[str], targets: Sequence[str], levels_of: Mapping[str, Sequence[str]]) -> list[float]:
    """The fraction of SID levels, from the first one on, that are the target's. Only the target gets 1.

    `levels_of`: SID -> its levels, such as the tokens <a_3>, <b_7>, <c_1>; SIDs may have different numbers of them.
    """
    rewards = []
    for sid, target in zip(predicted, targets, strict=True):
        found, wanted = levels_of[sid], levels_of[target]
        equal = [one == other for one, other in zip(found, wanted, strict=False)]
        common = equal.index(False) if False in equal else len(equal)
        rewards.append(common / max(len(found), len(wanted)))
    return rewards


def equal_in_group(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """[B / group_size], whether all completions of a group have the same reward, so that the group teaches nothing.

    The rewards are compared, not their deviation from the mean: the float32 mean of eight times 1/3 is not 1/3. NaN
    stands for no reward and equals any other.

    Args:
        rewards: [B], the sum over all reward functions; a multiple of `group_size`, group by group.
    """
    groups = rewards.view(-1, group_size)
    no_reward = groups.isnan()
    highest = groups.masked_fill(no_reward, -math.inf).amax(dim=1)
    return highest <= groups.masked_fill(no_reward, math.inf).amin(dim=1)


def advantages_of(rewards: torch.Tensor, group_size: int, scale: str = "group") -> torch.Tensor:
    """[B], how far each reward is above the mean of its group, in standard deviations of the group, of all (`batch`),
    or unscaled (`none`); 0 for a completion without a reward, which is NaN."""
    groups = rewards.view(-1, group_size)
    apart = groups - groups.nanmean(dim=1, keepdim=True)
    if scale != "none":
        apart = apart / (deviation(groups if scale == "group" else rewards.view(1, -1)) + 1e-4)
    return apart.nan_to_num(nan=0.0).flatten()


def deviation(values: torch.Tensor) -> torch.Tensor:
    """[n, 1], the standard deviation of each row of values [n, m] that are not NaN; NaN for fewer than two."""
    count = (~values.isnan()).sum(dim=1, keepdim=True)
    variance = (values - values.nanmean(dim=1, keepdim=True)).square().nanmean(dim=1, keepdim=True)
    correction = torch.where(count > 1, count / (count - 1), torch.nan)
    return (variance * correction).sqrt()


def semantic(predicted: Sequence[str], targets: Sequence[str], embeddings: Mapping[str, np.ndarray]) -> list[float]:
    """The cosine similarity of the embeddings of the recommended item and the target. `embeddings`: SID -> [d]."""

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
    """The score that a sequential recommender gives to the item after the history; `rule` for prompts without history.

    `scores(histories, items)` scores each item after the history at the same index.
    """
    rewards = rule(predicted, targets)
    scored = [i for i, history in enumerate(histories) if history]
    values = scores([list(histories[i]) for i in scored], [predicted[i] for i in scored]) if scored else []
    for i, value in zip(scored, values, strict=True):
        rewards[i] = float(value)
    return rewards


def read_embeddings(path: str, sid_of_item: Mapping[str, str]) -> dict[str, np.ndarray]:
    """SID -> embedding [d], from a file whose row i belongs to item id i. If items share a SID, the first one counts.

    Args:
        path: `.npy`, or `.safetensors` with a single tensor; [items, d]. Nothing is unpickled.
        sid_of_item: item id -> SID.

    Raises InputError if the file cannot be read, or if the row of an item is not there, or not finite.
    """
    try:
        if path.endswith(".safetensors"):
            tensors = load_file(path)
            if len(tensors) != 1:
                raise ValueError(f"expected one tensor, found {len(tensors)}")
            matrix = next(iter(tensors.values())).float().numpy()
        else:
            matrix = np.load(path, allow_pickle=False)
            if not isinstance(matrix, np.ndarray):
                raise ValueError("expected an array, found an archive of several")
            with np.errstate(over="ignore"):
                matrix = matrix.astype(np.float32)
        if matrix.ndim != 2:
            raise ValueError(f"expected a matrix [items, d], found shape {list(matrix.shape)}")
    except (OSError, EOFError, ValueError, TypeError, SafetensorError) as error:
        raise InputError(f"--ada_path {path}: cannot be read: {error}") from None
    embeddings: dict[str, np.ndarray] = {}
    for item, sid in sid_of_item.items():
        if not item.isdigit() or int(item) >= len(matrix):
            raise InputError(f"--ada_path {path}: has {len(matrix)} rows, none of them for item {item!r}")
        if not np.isfinite(matrix[int(item)]).all():
            raise InputError(
                f"--ada_path {path}: row {item} has values that are NaN or infinite; embed item {item} again"
            )
        embeddings.setdefault(sid, matrix[int(item)])
    return embeddings


Reward = Callable[..., list[float]]


def rewards_of(functions: Sequence[Reward], columns: Mapping[str, list], count: int, **more: object) -> torch.Tensor:
    """[B, reward functions], NaN where a function gives no reward; on the CPU. Raises ValueError where a function does
    not return `count` rewards.

    Args:
        columns: of the completions, by name; `more` is passed on as well.
    """
    found = [function(**columns, **more) for function in functions]
    values = [[math.nan if reward is None else reward for reward in of_function] for of_function in found]
    rewards = torch.tensor(values, dtype=torch.float32).T.contiguous()
    if len(rewards) != count:
        raise ValueError(f"a reward function returned {len(rewards)} rewards for {count} completions")
    return rewards


def reward_functions(
    weights: Mapping[str, float],
    num_generations: int,
    sid_of: Mapping[tuple[int, ...], str],
    catalogue: Catalogue,
    ada_path: str,
    cf_path: str,
) -> tuple[list[Reward], list[float]]:
    """Reward functions as TRL calls them, with token ids and dataset columns, for one float per completion; and the
    weight of each. TRL logs them by the names of the functions.

    Args:
        weights: of the names of `--reward_type`.
        num_generations: completions of a group.
        sid_of: the SID of every completion.
        ada_path, cf_path: the files that `semantic` and `sasrec` read.

    Raises InputError if those files do not fit the catalogue.
    """

    def named(name: str, reward: Callable[[list[str], list[str], list[list[str]]], list[float]]) -> Reward:
        """`reward` takes the SIDs of completions, targets and histories."""

        def called(completion_ids: list, target: list, history: list | None = None, **_: object) -> list[float]:
            return reward([sid_of[tuple(ids)] for ids in completion_ids], target, history or [[]] * len(target))

        called.__name__ = name
        return called

    def functions(name: str) -> list[Reward]:
        by_rule = named("rule", lambda sids, targets, _: rule(sids, targets))
        by_rank = named("rank_penalty", lambda sids, targets, _: rank_penalty(sids, targets, num_generations))
        if name == "semantic":
            embeddings = read_embeddings(ada_path, {id_: item.sid for id_, item in catalogue.items.items()})
            return [named(name, lambda sids, targets, _: semantic(sids, targets, embeddings))]
        if name == "sasrec":
            scores = _scores_of_all(cf_path, sid_of.values())
            return [
                named("collaborative", lambda sids, targets, histories: collaborative(sids, targets, histories, scores))
            ]
        if name == "prefix":
            return [named(name, lambda sids, targets, _: prefix(sids, targets, catalogue.tokens_of))]
        return {"rule": [by_rule], "ranking": [by_rule, by_rank], "ranking_only": [by_rank]}[name]

    chosen = [(reward, weight) for name, weight in weights.items() for reward in functions(name)]
    return [reward for reward, _ in chosen], [weight for _, weight in chosen]


def _scores_of_all(cf_path: str, sids: Iterable[str]) -> Callable[[list[list[str]], list[str]], list[float]]:
    """The scores of a SASRec model, which must know every SID."""
    recommender = sasrec.load(cf_path)
    lacking = [sid for sid in sids if sid not in recommender.number]
    if lacking:
        raise InputError(f"--cf_path {cf_path}: the model does not know {len(lacking)} SIDs, such as {lacking[0]}")
    return recommender.scores
