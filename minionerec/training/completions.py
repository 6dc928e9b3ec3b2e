"""The completions of prompts in RL: SIDs of the catalogue, searched or sampled, chosen among, with the target.

Dimensions: `D` tokens of the longest SID with its end-of-sequence token.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from minionerec.data.encoding import left_padded
from minionerec.decoding.beam_search import constrained_beam_search, constrained_sample
from minionerec.decoding.trie import Trie

Tokens = tuple[int, ...]


def choose(completions: Sequence[Tokens], target: Tokens, count: int) -> list[Tokens]:
    """`count` of the completions of a prompt, for `dynamic_sampling`: the target if it is among them, and the most
    frequent others, in the order they came. Completions repeat only if there are too few different ones."""
    frequency = Counter(completions)
    first = {completion: i for i, completion in reversed(list(enumerate(completions)))}
    ranked = sorted(frequency, key=lambda c: (c != target, -frequency[c], first[c]))
    kept = sorted(ranked[:count], key=first.__getitem__)
    return (kept * count)[:count] if len(kept) < count else kept


@dataclass(frozen=True)
class Completions:
    """How prompts are completed.

    Attributes:
        trie, tokens: the catalogue, and the tokens of each of its rows.
        size: completions of a prompt.
        beam_search: the best SIDs by beam search; False samples them at `temperature`.
        add_gt: the last completion is the target.
        dynamic_sampling: make half as many again; keep the target, if it is among them, and the most frequent others.
        seed: of the samples.
    """

    trie: Trie
    tokens: Sequence[Tokens]
    size: int
    beam_search: bool
    add_gt: bool
    dynamic_sampling: bool
    temperature: float
    seed: int
    pad_token_id: int

    def __call__(
        self, model: nn.Module, prompts: Sequence[np.ndarray], targets: Sequence[Tokens], rows: Sequence[int], step: int
    ) -> list[list[int]]:
        """The tokens of `size` completions for each prompt, prompt by prompt.

        Args:
            model: in evaluation mode; its device must be the trie's.
            prompts, targets: token ids.
            rows, step: of the prompts and of the run, from which samples follow.
        """
        completions: list[list[int]] = []
        for numbers, target in zip(self._find(model, prompts, rows, step), targets, strict=True):
            group = [self.tokens[number] for number in numbers]
            if self.dynamic_sampling:
                group = choose(group, target, self.size)
            if self.add_gt:
                group = [*group[:-1], target]
            completions += map(list, group)
        return completions

    def _find(self, model: nn.Module, prompts: Sequence[np.ndarray], rows: Sequence[int], step: int) -> list[list[int]]:
        """Rows of the trie for each prompt, from which its completions are chosen."""
        device = self.trie.token.device
        ids, mask = (tensor.to(device, non_blocking=True) for tensor in left_padded(prompts, self.pad_token_id))
        count = self.size * 3 // 2 if self.dynamic_sampling else self.size
        if self.beam_search:
            found, _ = constrained_beam_search(model, ids, mask, self.trie, count)
        else:
            draws = self._draws(rows, step, count)
            found = constrained_sample(model, ids, mask, self.trie, count, self.temperature, draws=draws)
        return found.tolist()

    def _draws(self, rows: Sequence[int], step: int, count: int) -> torch.Tensor:
        """The numbers that `count` completions of each prompt are sampled with, [prompts, count, D]. They follow from
        the seed, the step and the prompt's row, so that any number of processes samples the same."""
        shape = count, self.trie.depth
        return torch.from_numpy(np.stack([np.random.default_rng((self.seed, step, r)).random(shape) for r in rows]))
