import pytest
import torch
from models import ARCHITECTURES, make_model
from plain import EOS, exhaustive, random_sids, sids_of

from minionerec.decoding.beam_search import constrained_beam_search, constrained_sample
from minionerec.decoding.beams import TreeBeams
from minionerec.decoding.trie import Trie


def prompts(rows: int = 3, width: int = 7, shared: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of different lengths, padded on the left, which begin with `shared` equal tokens."""
    torch.manual_seed(1)
    mask = torch.ones(rows, width, dtype=torch.long)
    ids = torch.randint(1, 96, (rows, width))
    for row in range(rows):
        mask[row, :row] = 0
        ids[row, row : row + shared] = ids[0, :shared].clone()
    return ids * mask, mask


@pytest.mark.parametrize("tree", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_all_sids_are_ranked_as_by_exhaustive_scoring(tree, length_penalty):
    model, (ids, mask) = make_model(), prompts()
    sids = random_sids(20, (1, 2, 3))
    trie = Trie(sids, EOS)
    rows, scores = constrained_beam_search(model, ids, mask, trie, 50, length_penalty, tree)
    expected = exhaustive(model, ids, mask, sids, length_penalty)
    assert sids_of(trie, rows) == [[sid for sid, _ in ranking] for ranking in expected]
    torch.testing.assert_close(scores, torch.tensor([[s for _, s in r] for r in expected]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [3, 10])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_equal_those_of_generate_with_a_python_constraint(beams, length_penalty):
    model, (ids, mask) = make_model(), prompts()
    sids = random_sids(60, (3,))
    allowed: dict[tuple[int, ...], set[int]] = {}
    for sid in sids:
        for end, token in enumerate([*sid, EOS]):
            allowed.setdefault(sid[:end], set()).add(token)
    width = ids.shape[1]

    def allowed_tokens(_, sequence):
        # generate also asks for beams that have ended or that nothing leads to; they can only end.
        return list(allowed.get(tuple(sequence[width:].tolist()), {EOS}))

    generated = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=beams, num_return_sequences=beams, max_new_tokens=4,
        prefix_allowed_tokens_fn=allowed_tokens, length_penalty=length_penalty, do_sample=False,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    answers = [tuple(row[:3]) for row in generated.sequences[:, width:].tolist()]
    trie = Trie(sids, EOS)
    rows, scores = constrained_beam_search(model, ids, mask, trie, beams, length_penalty)
    assert [sid for row in sids_of(trie, rows) for sid in row] == answers
    torch.testing.assert_close(scores.flatten(), generated.sequences_scores, atol=1e-4, rtol=1e-4)


ATTENTIONS = [(name, "eager") for name in ARCHITECTURES] + [
    (name, "sdpa")
    for name in ARCHITECTURES
    if name != "gemma2"  # it caps its scores, which sdpa cannot
]


@pytest.mark.parametrize(("architecture", "attention"), ATTENTIONS)
@pytest.mark.parametrize("shared", [0, 6])
def test_shared_cache_equals_copied_caches(architecture, attention, shared):
    model = make_model(architecture, scale=4.0, attn_implementation=attention)
    ids, mask = prompts(width=9, shared=shared)
    trie = Trie(random_sids(60, (1, 2, 3, 4)), EOS)
    rows, scores = constrained_beam_search(model, ids, mask, trie, 8, tree=True)
    plain_rows, plain_scores = constrained_beam_search(model, ids, mask, trie, 8, tree=False)
    torch.testing.assert_close(scores, plain_scores, atol=1e-4, rtol=1e-4)
    assert torch.equal(rows, plain_rows)


@pytest.mark.parametrize(
    ("rows", "shared", "read"),
    [(3, 6, [(1, 6), (3, 3)]), (3, 4, [(1, 4), (3, 5)]), (3, 3, [(3, 9)]), (1, 6, [(1, 9)])],
)
def test_what_all_prompts_begin_with_is_read_once(rows, shared, read):
    """The shortest of three prompts has 7 tokens, of which one is always read with the rest."""
    model, passes = make_model(), []
    ids, mask = prompts(rows, width=9, shared=shared)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    TreeBeams(model, ids, mask)
    assert passes == read


def test_prompts_that_are_equal_are_read_once_but_for_their_last_token():
    model, (ids, mask) = make_model(), prompts(1)
    trie = Trie(random_sids(20, (3,)), EOS)
    single = constrained_beam_search(model, ids, mask, trie, 8)
    for one, many in zip(
        single, constrained_beam_search(model, *(t.expand(4, -1) for t in (ids, mask)), trie, 8), strict=True
    ):
        torch.testing.assert_close(many, one.expand(4, -1), atol=1e-5, rtol=1e-5)


def test_a_window_shorter_than_the_beams_falls_back_to_copies():
    model, (ids, mask) = make_model("mistral", sliding_window=16), prompts()
    trie = Trie(random_sids(20, (3,)), EOS)
    default, _ = constrained_beam_search(model, ids, mask, trie, 8)
    assert torch.equal(default, constrained_beam_search(model, ids, mask, trie, 8, tree=False)[0])


@pytest.mark.parametrize("tree", [True, False])
def test_samples_follow_the_model_within_the_trie(tree):
    model = make_model(scale=3.0)
    sids, temperature, count = random_sids(12, (1, 2, 3)), 0.7, 4000
    trie = Trie(sids, EOS)
    ids, mask = prompts(2)
    torch.manual_seed(2)
    parts = [constrained_sample(model, ids, mask, trie, count // 8, temperature, tree=tree) for _ in range(8)]
    for row, samples in enumerate(sids_of(trie, torch.cat(parts, dim=1))):
        prompt = ids[row][mask[row].bool()]
        for sid in sids:
            path, probability = [*sid, EOS], 1.0
            for depth, token in enumerate(path):
                allowed = sorted({[*s, EOS][depth] for s in sids if list(s[:depth]) == path[:depth]})
                with torch.no_grad():
                    given = torch.cat([prompt, torch.tensor(path[:depth], dtype=torch.long)])
                    logits = model(input_ids=given[None]).logits[0, -1, allowed] / temperature
                probability *= logits.softmax(0)[allowed.index(token)].item()
            error = 4 * (probability * (1 - probability) / count) ** 0.5 + 1e-3
            assert abs(samples.count(sid) / count - probability) < error
