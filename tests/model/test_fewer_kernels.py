"""Norms and rotary embeddings in few kernels, against those of transformers. With adapters: test_groups.py."""

import copy

import pytest
import torch
from as_on_gpu import starts_kernels
from models import make_model

from minionerec.model import device
from minionerec.model.fewer_kernels import use_fewer_kernels

IDS = torch.tensor([[1, 90, 5, 7, 91, 3], [2, 5, 90, 91, 8, 4]])


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma2"])  # biases, norms of heads, weights around 0
def test_a_model_that_trains_in_full_has_the_same_values_and_gradients(architecture, monkeypatch):
    plain = make_model(architecture, scale=2.0)
    model, found = copy.deepcopy(plain), []
    use_fewer_kernels(model)
    assert all(type(one) is type(other) for one, other in zip(model.modules(), plain.modules(), strict=True))  # a CPU
    for own, on_gpu in ((plain, False), (model, True)):
        monkeypatch.setattr(device, "starts_kernels", starts_kernels if on_gpu else lambda _: False)
        use_fewer_kernels(own)
        output = own(input_ids=IDS, labels=IDS)
        output.loss.backward()
        found.append([output.logits.detach(), *(parameter.grad for parameter in own.parameters())])
    norms = [type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    assert norms and all("fewer_kernels" in kind.__module__ for kind in norms)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-3)
