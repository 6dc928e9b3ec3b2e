"""Completions and their targets as a step learns from them."""

import numpy as np
import pytest
import torch
from plain import Copies

from minionerec.model.packed_rows import shared_rows
from minionerec.training.logprobs import logps_in_passes
from minionerec.training.rollouts import Rollouts


@pytest.fixture
def rollouts() -> Rollouts:
    """Two completions of a prompt, one of the same prompt with another target, one of a shorter prompt."""
    prompt, shorter = np.array([5, 6]), np.array([7])
    learns = np.array([True, False, True, True])
    targets = [(8,), (8,), (9, 9), (9, 9)]
    completions = [[1], [2, 3], [4], [5]]
    return Rollouts.build([prompt] * 3 + [shorter], completions, targets, torch.arange(4.0), learns, 0, True)


def test_equal_prompts_with_other_targets_are_other_groups(rollouts):
    assert rollouts.known.groups == [2, 1, 1] and rollouts.known.length.tolist() == [2, 2, 2, 1]
    assert rollouts.completion_mask.tolist() == [[1, 0], [0, 0], [1, 0], [1, 0]]
    assert rollouts.tokens == 5  # also those that do not count
    part = rollouts.rows(torch.tensor([3, 0]))
    assert part.completion_ids.tolist() == [[5, 0], [1, 0]] and part.advantages.tolist() == [3, 0]
    assert part.known.groups == [1, 1] and part.tokens == 5


def test_a_target_comes_after_the_completions_of_its_prompt(rollouts):
    completed, place, share = rollouts.with_targets()
    assert completed.completion_ids.tolist() == [[1, 0], [2, 3], [8, 0], [4, 0], [9, 9], [5, 0], [9, 9]]
    assert completed.prompt_ids.tolist() == [[5, 6]] * 5 + [[0, 7]] * 2
    assert completed.known.groups == [3, 2, 2] and completed.known.learns.tolist() == [True, False, *[True] * 5]
    assert place.tolist() == [0, 1, 3, 5, 2, 4, 6] and share.tolist() == [0.5, 0.25, 0.25]


def test_the_host_does_not_wait_for_copies(rollouts):
    """Of the completions themselves, nor of which of them count, are targets, and share a prompt."""

    def of_pass(part):
        return 2 * (part.completion_ids.float(),)

    with Copies() as copies:
        there = rollouts.to(torch.device("meta"))
        there.rows(torch.tensor([3, 0]))
        there.with_targets()
        logps_in_passes(of_pass, there, 4, 0)
        with pytest.raises(AttributeError):  # a model, for the mask
            shared_rows(None, *there.tensors, [3, 1])
    assert len(copies.go_on) > 8 and all(copies.go_on)
