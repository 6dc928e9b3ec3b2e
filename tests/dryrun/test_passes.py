"""The work of a step, as it is counted while few layers run without values."""

import pytest
from models import IDS, config_of
from transformers import AutoModelForCausalLM

import lora_utils
from minionerec.dryrun.memory import predict
from minionerec.dryrun.passes import Step
from minionerec.flags import AdapterFlags


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_work_of_a_step_is_that_of_its_matmuls(method, checkpointing):
    """Of all 12 layers, though few are measured: 2 FLOPs a weight and position forward, 2 for the gradient of the
    input, 2 for that of the weight if it trains, and the forward pass again with checkpointing. Attention is little."""
    config = config_of("qwen2", num_hidden_layers=12, hidden_size=256, intermediate_size=1024)
    model = AutoModelForCausalLM.from_config(config)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)
    head = model.lm_head.weight.numel()
    flags = AdapterFlags(
        use_lora=method == "lora", use_qlora=method == "qlora", lora_r=1, gradient_checkpointing=checkpointing
    )
    step = Step(2, 32, 8, accumulate=True)
    found = predict(config, config.vocab_size, IDS, step, flags, lora_utils.adapt, False)
    passes = 3 if method == "full" else 2
    assert found.layers.flops == pytest.approx(2 * 64 * layers * (passes + checkpointing), rel=0.1)
    assert found.head.flops == pytest.approx(2 * 8 * head * passes, rel=0.1)
