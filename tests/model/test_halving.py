"""What runs out of memory is computed in halves."""

import pytest
import torch
from models import make_model
from plain import EOS, SIDS

from minionerec.decoding import ranking
from minionerec.decoding.ranking import score_prompts
from minionerec.decoding.trie import Trie
from minionerec.model.halving import Halving


def test_a_batch_of_prompts_that_does_not_fit_is_ranked_in_halves(monkeypatch, capsys):
    model, trie = make_model("qwen2"), Trie(SIDS, EOS)
    prompts = [[5, 7, i + 1] for i in range(7)]
    whole = score_prompts(model, trie, prompts, 0, 3, 4)
    search, sizes = ranking.constrained_beam_search, []

    def small(model, ids, *args, **kwargs):
        sizes.append(len(ids))
        if len(ids) > 1:
            raise torch.OutOfMemoryError
        return search(model, ids, *args, **kwargs)

    monkeypatch.setattr(ranking, "constrained_beam_search", small)
    halving = Halving("batches of prompts")
    parts = score_prompts(model, trie, prompts, 0, 3, 4, halving=halving)
    assert sizes == [4, 2, *[1] * 7] and halving.parts == 4
    for one, other in zip(whole, parts, strict=True):
        assert [row for row, _ in one] == [row for row, _ in other]
        assert [score for _, score in one] == pytest.approx([score for _, score in other], abs=1e-5)
    assert capsys.readouterr().out.count("out of memory: batches of prompts are computed in ") == 2


def test_parts_hold_all_rows_in_order():
    halving = Halving("rows")
    for halving.parts in (1, 2, 4, 8):
        for count in range(12):
            parts = halving.split(range(count))
            assert [row for part in parts for row in part] == list(range(count))
            assert 1 <= len(parts) <= halving.parts
