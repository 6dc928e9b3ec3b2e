"""A prediction from few layers against the same from all of them, and how much work a search for settings takes."""

import copy
import json
from unittest import mock

import pytest
from helpers import ROOT
from models import SMALL, predicted
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import CONFIG_MAPPING

import lora_utils
from minionerec.dryrun import depth, memory
from minionerec.dryrun.memory import Prediction, predict
from minionerec.dryrun.passes import Step
from minionerec.dryrun.report import suggestion
from minionerec.model import architecture
from sft import SFTFlags

ARCHITECTURES = json.loads((ROOT / "tests" / "architectures.json").read_text())
# Changes to the small configurations, and how many of 8 layers are measured.
DEEP = {
    "qwen2": ({}, 3),
    "gemma2": ({}, 5),  # windows in every other layer
    "qwen3_moe": ({"num_experts": 16}, 3),
    "deepseek_v3": ({"first_k_dense_replace": 1}, 4),
    "granitemoehybrid": ({"layer_types": ["mamba", "mamba", "mamba", "attention"] * 2}, 4),
    "qwen3_next": ({"layer_types": [*["linear_attention"] * 3, "full_attention"] * 2}, 4),
}


def deep(architecture: str, layers: int = 8, **changes):
    settings = {**SMALL, **ARCHITECTURES[architecture], "num_hidden_layers": layers, **changes}
    return CONFIG_MAPPING[architecture](**settings)


def on_all_layers():
    return mock.patch.object(memory, "on_few_layers", lambda measure: measure(False))


@pytest.mark.parametrize("architecture", DEEP)
@pytest.mark.parametrize(
    ("method", "checkpointing"), [("full", False), pytest.param("lora", True, marks=pytest.mark.slow)]
)
def test_few_layers_predict_what_all_do(architecture, method, checkpointing):
    changes, measured = DEEP[architecture]
    config = deep(architecture, **changes)

    def prediction() -> Prediction:
        flags = {"lora_dropout": 0.0, "gradient_checkpointing": checkpointing}
        return predicted(config, [90, 91], Step(2, 40, 6), method, True, **flags)

    found, run = [], memory.run

    def watched(planned, *more):
        found.append(planned.depth)
        return run(planned, *more)

    with mock.patch.object(memory, "run", side_effect=watched):
        few = prediction()
    assert len(found[0].layers) == measured and len(found) == 1
    with on_all_layers():
        every = prediction()
    assert few.parts == pytest.approx(every.parts, rel=1e-3) and few.total == pytest.approx(every.total, rel=1e-3)
    assert config.num_hidden_layers == 8
    assert few.trainable == every.trainable
    for part in ("weights", "adapter", "gradients", "optimizer"):
        assert few.parts[part] == pytest.approx(every.parts[part], rel=1e-12)


@pytest.mark.parametrize("bits", [4, 8])
def test_few_layers_weigh_what_all_do_in_fewer_bits(bits):
    step = Step(4, 8, 4, shared=True, accumulate=False, rewarded=True)
    arguments = (deep("qwen2", 20), [90, 91], step, "qlora" if bits == 4 else "lora")
    few = predicted(*arguments, load_in_8bit=bits == 8)
    with on_all_layers():
        every = predicted(*arguments, load_in_8bit=bits == 8)
    few.parts.pop("runtime"), every.parts.pop("runtime")  # of this process, which grows
    assert few.parts == pytest.approx(every.parts, rel=1e-9) and few.trainable == every.trainable


def test_a_model_that_runs_one_layer_twice_is_measured_whole():
    model = architecture.meta_model(deep("qwen2"))
    model.model.layers[6] = model.model.layers[1]
    trainable = sum(p.numel() for p in model.parameters())
    with mock.patch.object(architecture, "meta_model", lambda *_: copy.deepcopy(model)):
        found = predicted(model.config, [90], Step(2, 8, 4))
    assert found.trainable == trainable


def test_a_model_that_cannot_do_with_few_layers_is_measured_whole():
    arguments = (deep("qwen2"), [90, 91], Step(2, 40, 6), "full", True)
    few = predicted(*arguments)
    with mock.patch.object(depth, "_keep", lambda *_: None):  # it then looks for eight layers
        every = predicted(*arguments)
    assert every.parts == pytest.approx(few.parts) and every.trainable == few.trainable


def test_a_search_on_a_deep_model_takes_few_passes_through_few_layers():
    """48 layers of 128 experts that fit nowhere: each of nine ways to train is tried once."""
    config = deep("qwen3_moe", 48, num_experts=128)
    flags = SFTFlags(lora_dropout=0.0, micro_batch_size=64)
    tried, ran = [], []
    layer = type(architecture.meta_model(config).model.layers[0])

    def total_of(flags):
        tried.append(flags)
        return predict(config, 96, [90], Step(flags.micro_batch_size, 16, 8), flags, lora_utils.adapt, True).total

    counting = register_module_forward_pre_hook(lambda module, _: ran.append(module) if type(module) is layer else None)
    with counting:
        assert suggestion(flags, "micro_batch_size", [64, 32, 1], 0.0, total_of).startswith(
            "no other setting tried here fits"
        )
    assert len(tried) == 9 and len(ran) == 9 * 2 * 3  # 2 micro-batches through 3 layers
