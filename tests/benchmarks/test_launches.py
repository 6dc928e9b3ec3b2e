"""How many kernels a GPU would start, and how often the host would wait for it: no more than these."""

import pytest
import torch
from models import make_model
from plain import EOS, prompts, random_sids
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import counting
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.trie import Trie
from minionerec.model.groups import join_frozen_layers


@pytest.fixture(autouse=True)
def on_gpu():
    torch.manual_seed(0)
    with counting.as_on_gpu():
        yield


@pytest.mark.parametrize(("method", "most"), [("full", 125), ("lora", 75), ("qlora", 83)])
def test_sft_starts_few_kernels_and_reads_little(method, most):
    few, many = (counting.count_sft(method, layers, users=16) for layers in (1, 2))
    assert 2 * many["kernels a layer"] - few["kernels a layer"] <= most
    # A step reads whether its losses are finite, and what is logged.
    assert many["reads of a micro-batch"] == 0 and many["reads of a step"] <= 2
    assert many["reads of a checkpoint"] <= 2  # whether all weights are finite, and the loss that is not logged yet


def test_rl_starts_few_kernels_and_reads_little():
    few, many = (counting.count_rl(layers) for layers in (1, 2))
    assert many["kernels"] - few["kernels"] <= 187
    assert few["kernels"] <= 693
    assert many["reads"] <= 5


def test_a_search_starts_few_kernels_and_reads_little():
    for merged, most in ((False, 26), (True, 18)):
        few, many = (counting.count_decoding(layers, merged) for layers in (1, 2))
        assert 2 * many["a layer and pass"] - few["a layer and pass"] <= most
        assert many["outside the model, a level"] <= 26.25 and many["reads"] == 0
        recorded = counting.count_decoding(1, merged, recorded=True)
        assert not recorded["a layer and pass"] and recorded["outside the model, a level"] <= 2


def test_recorded_passes_are_a_few_starts_of_few_shapes():
    sft = counting.count_sft("lora", 1, users=40, recorded=True)
    assert sft["shapes"] <= 4 and sft["kernels a layer"] <= 13 and sft["reads of a micro-batch"] == 0
    rl = counting.count_rl(1, recorded=True)
    assert rl["kernels"] <= 135 and rl["reads"] <= 5


@pytest.mark.parametrize("lengths", [(3,), (1, 2, 3)])  # of the SIDs: at one depth all end, or at several some
def test_a_search_reads_no_value(lengths):
    """Fake tensors have none, so what runs on them can be captured."""
    model, trie = make_model(scale=2.0), Trie(random_sids(60, lengths), EOS)
    ids, mask = prompts()
    expected = constrained_beam_search(model, ids, mask, trie, 7, tree=True)
    join_frozen_layers(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        rows, scores = constrained_beam_search(model, mode.from_tensor(ids), mode.from_tensor(mask), trie, 7, tree=True)
    assert rows.shape == scores.shape == expected[0].shape
    found = constrained_beam_search(model, ids, mask, trie, 7, tree=True)
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=0)
