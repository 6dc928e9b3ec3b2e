"""What an RL step learns from, in tensors: prompts, completions, what these are worth, and their targets.

Dimensions: `B` completions, `P` prompt tokens, `C` completion tokens, `T` target tokens, `R` prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from minionerec.data.encoding import left_padded, right_padded


class Known(NamedTuple):
    """What the host knows of completions, so that it need not wait for a GPU to read it: the tokens of the prompt of
    each, a number that equal prompts share, and whether any token of it counts; [B] each."""

    length: np.ndarray
    prompt: np.ndarray
    learns: np.ndarray

    @property
    def groups(self) -> list[int]:
        """How many consecutive completions have equal prompts, prompt by prompt."""
        return np.diff(np.flatnonzero(np.diff(self.prompt, prepend=-1, append=-1))).tolist()

    def rows(self, rows: slice | np.ndarray) -> "Known":
        return Known(*(values[rows] for values in self))


@dataclass
class Completed:
    """Prompts with completions, as log-probabilities are computed of them.

    Attributes:
        prompt_ids, prompt_mask: [B, P], padded on the left.
        completion_ids, completion_mask: [B, C], padded on the right; the mask is 0 for completions that do not count.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    known: Known

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.prompt_ids, self.prompt_mask, self.completion_ids, self.completion_mask

    def pick(self, numbers: np.ndarray, place: torch.Tensor) -> "Completed":
        """Some of the completions, by their numbers on the host and on the device."""
        ids, mask, completion_ids, completion_mask = (tensor.index_select(0, place) for tensor in self.tensors)
        return Completed(ids, mask, completion_ids, completion_mask, self.known.rows(numbers))


@dataclass
class Rollouts(Completed):
    """Completions that are scored.

    Attributes:
        advantages: [B]; where the loss is that of lists, the reward itself.
        tokens: how many the completions of all processes have, also those that do not count.
        target_ids, target_mask: [B, T], padded on the right; None where targets are not learned.
        old_logps: [B, C], of the policy that made the completions (nats); None where that is this one.
    """

    advantages: torch.Tensor
    tokens: torch.Tensor
    target_ids: torch.Tensor | None = None
    target_mask: torch.Tensor | None = None
    old_logps: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        prompts: Sequence[np.ndarray],
        completions: Sequence[Sequence[int]],
        targets: Sequence[tuple[int, ...]],
        advantages: torch.Tensor,
        learns: np.ndarray,
        pad_token_id: int,
        learn_targets: bool,
    ) -> "Rollouts":
        """From lists, on the CPU. `learns`: [B], whether a completion counts."""
        ids, mask = right_padded(completions, pad_token_id)
        learned = right_padded(targets, pad_token_id) if learn_targets else ()
        known = Known(np.array(list(map(len, prompts))), _numbered(prompts, targets), learns)
        counts = mask * torch.from_numpy(learns).unsqueeze(1)
        return cls(*left_padded(prompts, pad_token_id), ids, counts, known, advantages, mask.sum(), *learned)

    def to(self, device: torch.device) -> "Rollouts":
        return self._with(lambda tensor: tensor.to(device, non_blocking=True), self.known)

    def rows(self, rows: slice | torch.Tensor) -> "Rollouts":
        """Some of the completions, by a slice or by their numbers on the CPU."""
        on_device = rows if isinstance(rows, slice) else rows.to(self.advantages.device, non_blocking=True)
        known = self.known.rows(rows if isinstance(rows, slice) else rows.numpy())
        return self._with(lambda tensor: tensor[on_device] if tensor.dim() else tensor, known)

    def _with(self, change: Callable[[torch.Tensor], torch.Tensor], known: Known) -> "Rollouts":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: change(value) for name, value in values.items() if isinstance(value, torch.Tensor)}
        return replace(self, **tensors, known=known)

    def with_targets(self) -> tuple[Completed, torch.Tensor, torch.Tensor]:
        """Adds the target of each prompt as one more completion, after the others of that prompt. Returns the B + R
        completions; in which rows of them these B and then the R targets are, [B + R]; and the fraction of the B that
        each prompt has, [R]."""
        assert self.target_ids is not None and self.target_mask is not None
        size = np.array(self.known.groups, dtype=np.int64)
        end, count = size.cumsum(), len(self.completion_ids)
        # Of the completions and then the targets, in the order of the rows that are returned.
        source = np.insert(np.arange(count), end, count + np.arange(len(size)))
        last = end - 1  # the last completion of each prompt
        order, place, of_prompt = (
            torch.from_numpy(numbers).to(self.completion_ids.device, non_blocking=True)
            for numbers in (source, source.argsort(), last)
        )

        def joined(completions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            width = max(completions.shape[1], targets.shape[1])
            parts = (nn.functional.pad(part, (0, width - part.shape[1])) for part in (completions, targets[of_prompt]))
            return torch.cat(list(parts))[order]

        known = self.known
        all_learn = np.append(known.learns, np.ones(len(size), dtype=bool))
        completed = Completed(
            joined(self.prompt_ids, self.prompt_ids),
            joined(self.prompt_mask, self.prompt_mask),
            joined(self.completion_ids, self.target_ids),
            joined(self.completion_mask, self.target_mask),
            Known(
                np.append(known.length, known.length[last])[source],
                np.append(known.prompt, known.prompt[last])[source],
                all_learn[source],
            ),
        )
        return completed, place, (torch.from_numpy(size) / count).to(self.completion_ids.device, non_blocking=True)


def _numbered(prompts: Sequence[np.ndarray], targets: Sequence[tuple[int, ...]]) -> np.ndarray:
    """[B], a number for each prompt with its target, the same for the completions of one: histories may be equal and
    go on differently."""
    numbers: dict[tuple, int] = {}
    pairs = zip(prompts, targets, strict=True)
    return np.array([numbers.setdefault((ids.tobytes(), target), len(numbers)) for ids, target in pairs])
