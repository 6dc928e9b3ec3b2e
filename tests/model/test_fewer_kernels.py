"""Norms and rotary embeddings in few kernels, against those of transformers. With adapters: test_groups.py."""

import copy

import pytest
import torch
from as_on_gpu import starts_kernels
from models import make_model

from minionerec.model import device
from minionerec.model.fewer_kernels import refresh_frozen_norms, use_fewer_kernels

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


def test_frozen_norms_follow_weights_that_are_written_without_a_trace(monkeypatch):
    """As TRL moves a reference; in place, where a recorded pass would read them."""
    monkeypatch.setattr(device, "starts_kernels", starts_kernels)
    model = make_model("gemma2", scale=2.0).requires_grad_(False)  # its weights are around 0
    use_fewer_kernels(model)
    before = model(input_ids=IDS).logits
    prepared = [module._prepared for module in model.modules() if "_prepared" in vars(module)]
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.mul_(0.5).add_(0.1)
    refresh_frozen_norms(model)
    after = model(input_ids=IDS).logits
    twin = make_model("gemma2", scale=2.0)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(after, twin(input_ids=IDS).logits, atol=1e-5, rtol=1e-4)
    assert (after - before).abs().max() > 0.1
    now = [module._prepared for module in model.modules() if "_prepared" in vars(module)]
    assert prepared and all(one is two for one, two in zip(prepared, now, strict=True))
