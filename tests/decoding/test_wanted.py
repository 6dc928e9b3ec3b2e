"""SIDs that are scored together with the beams have the scores of brute force, and change nothing about the beams."""

import random

import pytest
import torch
from architectures import build
from models import make_model
from plain import EOS, exhaustive, fuzz_seeds, prompts, random_sids

from minionerec.data.encoding import left_padded
from minionerec.data.sid_tokens import PAD
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.trie import Trie


def searched(model, ids, mask, trie, beams, wanted, *more) -> None:
    """A search with wanted rows against the same one without them, and against brute force."""
    sids = [tuple(token for token in row if token not in (PAD, EOS)) for row in trie.sequences.tolist()]
    allowed = more[2] if len(more) > 2 else None
    plain_rows, plain_scores = constrained_beam_search(model, ids, mask, trie, beams, *more)
    rows, scores = constrained_beam_search(model, ids, mask, trie, beams, *more, wanted=wanted)
    count = plain_rows.shape[1]
    assert rows.shape == scores.shape == (len(ids), count + wanted.shape[1])
    assert torch.equal(rows[:, :count], plain_rows)
    torch.testing.assert_close(scores[:, :count], plain_scores, atol=1e-4, rtol=1e-4)
    for i, ranking in enumerate(exhaustive(model, ids, mask, sids, more[0] if more else 0.0)):
        score_of = {sids.index(sid): score for sid, score in ranking}
        left = [row for row in wanted[i].tolist() if row != PAD and row not in plain_rows[i].tolist()]
        left = [row for row in left if allowed is None or allowed[i, row]]
        found = dict(zip(rows[i, count:].tolist(), scores[i, count:].tolist(), strict=True))
        found.pop(PAD, None)
        assert list(found) == left
        assert [found[row] for row in left] == pytest.approx([score_of[row] for row in left], abs=1e-4)
        assert (scores[i][rows[i] == PAD] == -torch.inf).all()


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("beams", [1, 5, 60])
def test_wanted_sids_of_any_length_are_scored_exactly(beams, tree):
    model, (ids, mask) = make_model(), prompts()
    trie = Trie(random_sids(60, (1, 2, 3, 4)), EOS)
    wanted = torch.tensor([[0, 7, 59, 31, 30], [PAD] * 5, [12, PAD, 58, PAD, 4]])
    searched(model, ids, mask, trie, beams, wanted, 0.0, tree)


@pytest.mark.parametrize("seed", fuzz_seeds(8))
def test_random_wanted_sids_under_random_constraints(seed):
    chance = random.Random(seed)
    model = build(chance.choice(["qwen2", "llama", "gpt2", "mamba"]))
    sids = random_sids(chance.randint(2, 40), tuple(chance.sample([1, 2, 3, 4], chance.randint(1, 3))), seed)
    ids, mask = left_padded([chance.choices(range(1, 90), k=chance.randint(1, 9)) for _ in range(2)], 0)
    trie = Trie(sids, EOS)
    width = chance.randint(1, len(trie))
    wanted = torch.tensor([chance.sample(range(len(trie)), width) for _ in ids])
    wanted[torch.rand(wanted.shape, generator=torch.Generator().manual_seed(seed)) < 0.2] = PAD
    allowed = torch.rand((2, len(trie)), generator=torch.Generator().manual_seed(seed)) < chance.choice([0.1, 0.7, 2])
    searched(model, ids, mask, trie, chance.choice([1, 3, 40]), wanted, chance.choice([0.0, 1.0]), None, allowed)
