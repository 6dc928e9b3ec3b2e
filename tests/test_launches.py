"""How many kernels a GPU would start, and how often the host would wait for it: no more than these."""

import pytest
import torch

from benchmarks import launches


@pytest.fixture(autouse=True)
def on_gpu():
    torch.manual_seed(0)
    with launches.as_on_gpu():
        yield


@pytest.mark.parametrize(("method", "most"), [("full", 125), ("lora", 78), ("qlora", 86)])
def test_sft_starts_few_kernels_and_reads_little(method, most):
    few, many = (launches.count_sft(method, layers, users=16) for layers in (1, 2))
    assert 2 * many["kernels a layer"] - few["kernels a layer"] <= most
    # A step reads whether its losses are finite, and what is logged.
    assert many["reads of a micro-batch"] * many["micro-batches a step"] + many["reads of a step"] <= 2
    assert many["reads of a checkpoint"] <= 2  # whether all weights are finite, and the loss that is not logged yet


def test_rl_starts_few_kernels_and_reads_little():
    few, many = (launches.count_rl(layers) for layers in (1, 2))
    assert many["kernels"] - few["kernels"] <= 203
    assert few["kernels"] <= 763
    assert many["reads"] <= 8


def test_a_search_starts_few_kernels_and_reads_little():
    for merged, most in ((False, 29), (True, 21)):
        few, many = (launches.count_decoding(layers, merged) for layers in (1, 2))
        assert 2 * many["a layer and pass"] - few["a layer and pass"] <= most
        assert many["outside the model, a level"] <= 37 and many["reads"] <= 1
