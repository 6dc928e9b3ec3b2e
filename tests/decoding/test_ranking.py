from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from minionerec.decoding import ranking
from minionerec.decoding.trie import Trie


@pytest.mark.parametrize("processes", [1, 2])
def test_the_longest_prompts_are_ranked_first(monkeypatch, processes):
    """Each process as often as the others; rankings come back in the order of the prompts."""
    prompts = [[1] * length for length in (3, 9, 1, 7, 2, 8, 5, 4, 6)]
    trie = Trie([[1, 2], [1, 3], [2, 3]], 0)
    widths: dict[int, list[int]] = {}
    found = []

    def search(model, input_ids, attention_mask, trie, num_beams, length_penalty, allowed, wanted):
        widths.setdefault(state.process_index, []).append(input_ids.shape[1])
        first = attention_mask.sum(dim=1, keepdim=True) % 3  # a ranking that names its prompt
        return torch.cat([first, (first + 1) % 3], dim=1), torch.zeros(len(first), 2)

    monkeypatch.setattr(ranking, "constrained_beam_search", search)
    monkeypatch.setattr(ranking, "PartialState", lambda: state)
    monkeypatch.setattr(ranking, "probe", lambda *_: SimpleNamespace(padding=True))
    monkeypatch.setattr(ranking, "gather_object", lambda own: own if own == [True] else found.extend(own) or found)
    for index in reversed(range(processes)):
        state = SimpleNamespace(process_index=index, num_processes=processes, is_main_process=False)
        with pytest.raises(KeyError) if index else nullcontext():  # the others' rankings are not there yet
            ranked = ranking.score_prompts(SimpleNamespace(device="cpu"), trie, prompts, 0, 2, batch_size=2)
    assert widths == {1: {0: [9, 7, 5, 3, 1]}, 2: {0: [9, 5, 1], 1: [7, 3, 1]}}[processes]
    expected = [[len(prompt) % 3, (len(prompt) + 1) % 3] for prompt in prompts]
    assert ranked == [[(int(trie.source[row]), 0.0) for row in rows] for rows in expected]
