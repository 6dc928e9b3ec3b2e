"""Beam search under a mask of allowed SIDs equals beam search in a trie of the allowed SIDs only, and brute force."""

import random

import numpy as np
import pytest
import torch
from architectures import build
from models import make_model
from plain import EOS, exhaustive, fuzz_seeds, prompts, random_sids, sids_of

from minionerec.data.encoding import left_padded
from minionerec.data.sid_tokens import PAD
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.probe import probe
from minionerec.decoding.ranking import score_prompts
from minionerec.decoding.trie import Trie

SIDS = random_sids(60, (1, 2, 3, 4))


def masks(trie: Trie, allowed: list[list[int]]) -> torch.Tensor:
    """[B, S] in the order of the trie, from indices into the list it was built from."""
    chosen = torch.zeros(len(allowed), len(trie), dtype=torch.bool)
    for row, indices in zip(chosen, allowed, strict=True):
        row[torch.from_numpy(np.isin(trie.source, indices))] = True
    return chosen


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
@pytest.mark.parametrize("beams", [1, 3, 10, 60])
def test_masked_beams_are_those_of_a_trie_of_what_is_allowed(beams, length_penalty, tree):
    """Each prompt of a batch with a mask of its own: some SIDs, one, all but one."""
    model, (ids, mask) = make_model(), prompts()
    trie = Trie(SIDS, EOS)
    allowed = [[*range(0, 60, 3)], [41], [i for i in range(60) if i != 7]]
    rows, scores = constrained_beam_search(
        model, ids, mask, trie, beams, length_penalty, tree, allowed=masks(trie, allowed)
    )
    assert rows.shape == scores.shape == (3, beams)
    for i, indices in enumerate(allowed):
        alone = Trie([SIDS[index] for index in indices], EOS)
        expected, expected_scores = constrained_beam_search(
            model, ids[i : i + 1], mask[i : i + 1], alone, beams, length_penalty, tree
        )
        count = min(beams, len(indices))
        assert sids_of(trie, rows[i : i + 1, :count]) == sids_of(alone, expected)
        torch.testing.assert_close(scores[i, :count], expected_scores[0], atol=1e-4, rtol=1e-4)
        assert (rows[i, count:] == PAD).all() and (scores[i, count:] == -torch.inf).all()


def test_masked_beams_equal_brute_force_over_all_sids():
    model, (ids, mask) = make_model(), prompts()
    trie = Trie(SIDS, EOS)
    chance = np.random.default_rng(3)
    allowed = [sorted(chance.choice(60, size, replace=False).tolist()) for size in (40, 12, 5)]
    rows, scores = constrained_beam_search(model, ids, mask, trie, 60, allowed=masks(trie, allowed))
    for i, ranking in enumerate(exhaustive(model, ids, mask, SIDS)):
        wanted = [(sid, score) for sid, score in ranking if SIDS.index(sid) in allowed[i]]
        assert sids_of(trie, rows[i : i + 1, : len(wanted)])[0] == [sid for sid, _ in wanted]
        found = scores[i, : len(wanted)]
        torch.testing.assert_close(found, torch.tensor([score for _, score in wanted]), atol=1e-4, rtol=1e-4)


def test_there_are_k_beams_wherever_k_are_allowed():
    """Also where the model prefers every subtree with nothing allowed, and no beam is spare."""
    model, (ids, mask) = make_model(), prompts()
    trie = Trie(SIDS, EOS)
    for count in (1, 2, 5, 20):
        ranking = exhaustive(model, ids[:1], mask[:1], SIDS)[0]
        worst = [SIDS.index(sid) for sid, _ in ranking[-count:]]
        for beams in (1, count, count + 3):
            rows, _ = constrained_beam_search(model, ids[:1], mask[:1], trie, beams, allowed=masks(trie, [worst]))
            found = [trie.source[row] for row in rows[0].tolist() if row != PAD]
            assert len(found) == len(set(found)) == min(beams, count) and set(found) <= set(worst)


def searched_by_hand(model, prompt: list[int], sids: list[tuple[int, ...]], beams: int, length_penalty: float):
    """The same beam search with lists, without a trie, a cache or padding: (SID, score), best first."""
    running, ended = [((), 0.0)], []
    for depth in range(max(map(len, sids), default=-1) + 1):
        longer = []
        for path, score in running:
            with torch.no_grad():
                logps = model(input_ids=torch.tensor([[*prompt, *path]])).logits[0, -1].float().log_softmax(-1)
            for token in {[*sid, EOS][depth] for sid in sids if sid[:depth] == path and len(sid) >= depth}:
                longer.append(((*path, token), score + logps[token].item()))
        of_sids = [(path[:-1], score / (depth + 1) ** length_penalty) for path, score in longer if path[-1] == EOS]
        ended = sorted(ended + of_sids, key=lambda pair: -pair[1])[:beams]
        running = sorted((pair for pair in longer if pair[0][-1] != EOS), key=lambda pair: -pair[1])[:beams]
    return ended


@pytest.mark.parametrize("seed", fuzz_seeds(16))
def test_random_searches_equal_one_by_hand(seed):
    """Tries of any shape, a set of allowed SIDs for every prompt, fewer and more beams than those; brute force where
    no beam is lost."""
    chance = random.Random(seed)
    architecture = chance.choice(["qwen2", "qwen2", "llama", "gemma2", "gpt2", "lfm2", "mpt", "mamba", "rwkv"])
    model = build(architecture)
    sids = random_sids(chance.randint(1, 40), tuple(chance.sample([1, 2, 3, 4, 5], chance.randint(1, 3))), seed)
    lists = [chance.choices(range(1, 90), k=chance.randint(1, 9)) for _ in range(chance.randint(1, 3))]
    beams, length_penalty = chance.choice([1, 2, 4, 9, 60]), chance.choice([0.0, 0.0, 1.0, 0.5])
    trie = Trie(sids, EOS)
    allowed = [
        chance.sample(range(len(sids)), chance.choice([0, 1, len(sids), chance.randint(0, len(sids))])) for _ in lists
    ]
    free = chance.random() < 0.3
    if free:
        allowed = [range(len(sids))] * len(lists)
    ids, mask = left_padded(lists, 0)
    tree = chance.choice([None, True, False]) if architecture in ("qwen2", "llama") else None
    chosen = None if free else masks(trie, allowed)
    rows, scores = constrained_beam_search(model, ids, mask, trie, beams, length_penalty, tree, chosen)
    assert rows.shape == scores.shape == (len(lists), min(beams, len(sids)))
    for i, (prompt, indices) in enumerate(zip(lists, allowed, strict=True)):
        expected = searched_by_hand(model, prompt, [sids[index] for index in indices], beams, length_penalty)
        assert sids_of(trie, rows[i : i + 1, : len(expected)])[0] == [sid for sid, _ in expected]
        assert scores[i, : len(expected)].tolist() == pytest.approx([score for _, score in expected], abs=1e-4)
        assert (rows[i, len(expected) :] == PAD).all() and (scores[i, len(expected) :] == -torch.inf).all()
        if beams >= len(sids) and indices:
            every = exhaustive(model, torch.tensor([prompt]), torch.ones(1, len(prompt)), sids, length_penalty)[0]
            assert [sid for sid, _ in expected] == [sid for sid, _ in every if sids.index(sid) in indices]


def test_nothing_allowed_gives_nothing():
    model, (ids, mask) = make_model(), prompts()
    trie = Trie(SIDS, EOS)
    rows, scores = constrained_beam_search(model, ids, mask, trie, 4, allowed=masks(trie, [[], [3], []]))
    assert (rows[[0, 2]] == PAD).all() and (scores[[0, 2]] == -torch.inf).all()
    assert trie.source[rows[1, 0]] == 3


@pytest.mark.parametrize("architecture", ["qwen2", "rwkv"])
def test_masks_follow_their_prompts_through_batches(architecture):
    """Of prompts sorted by length; one at a time where a model allows no padding."""
    model = build(architecture)
    assert probe(model).padding == (architecture == "qwen2")
    trie = Trie(SIDS, EOS)
    lists = [list(range(1, 1 + length)) for length in (5, 31, 12, 8)]
    chosen = [np.isin(np.arange(60), indices) for indices in ([1, 2, 3], [*range(50)], [59], [4])]
    allowed = [chosen[0], None, chosen[2], chosen[3]]
    rows = [None if mask is None else mask[trie.source] for mask in allowed]
    found = score_prompts(model, trie, lists, 0, 10, 3, allowed=rows.__getitem__)
    for i, (prompt, ranking) in enumerate(zip(lists, found, strict=True)):
        alone = score_prompts(model, trie, [prompt], 0, 60, 1)[0]
        kept = [(index, score) for index, score in alone if allowed[i] is None or allowed[i][index]]
        if allowed[i] is None:
            assert len(ranking) == 10
            continue
        assert [index for index, _ in ranking] == [index for index, _ in kept[:10]]
        assert [score for _, score in ranking] == pytest.approx([score for _, score in kept[:10]], abs=1e-4)
