"""Weights that are not sharded go through minionerec.sharding unchanged; sharded ones: test_devices.py."""

import copy

import pytest
import torch
from models import make_model
from plain import moved

import lora_utils
from minionerec.model.sharding import local_shard, overwrite, whole_tensors, with_sid_rows_merged


@pytest.mark.parametrize("tied", [True, False])
def test_sid_rows_are_merged_in_a_state_as_in_a_model(tied):
    model = lora_utils.train_sid_rows_only(make_model("qwen2", tie_word_embeddings=tied), [90, 91, 92])
    moved(model, by=1.0)
    base = model.get_base_model()
    state = with_sid_rows_merged(base, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    assert state.keys() == merged.keys()
    for name, tensor in merged.items():
        assert torch.equal(state[name], tensor), name


def test_whole_parameters_are_copied_and_overwritten():
    parameters = {"a": torch.nn.Parameter(torch.arange(3.0)), "b": torch.nn.Parameter(torch.ones(2, 2).T)}
    copies = whole_tensors(parameters)
    overwrite(parameters, {name: tensor + 1 for name, tensor in copies.items()})
    assert copies["a"].tolist() == [0, 1, 2] and not copies["a"].requires_grad
    assert local_shard(parameters["a"]).tolist() == [1, 2, 3]
    assert torch.equal(parameters["b"], torch.full((2, 2), 2.0))
