"""LoRA and SID rows on 68 architectures: what is reached and what is left out, gradients, saving, merging, 4 bits."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from architectures import CHANGES, build, configuration
from models import predicted, rl_trainer
from peft import AutoPeftModelForCausalLM
from plain import IDS, TOKENS, moved
from transformers import AutoModelForCausalLM

import lora_utils
from minionerec.dryrun.passes import Step
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, architecture, loading

DIRECT = "weight read directly"
OTHER = "not a linear layer"
DELTA = {"linear_attn.conv1d": OTHER}
ROUTER = {"mlp.gate": "a router"}
SHARED = {**ROUTER, "mlp.shared_expert_gate": "a router"}
# What `all` leaves out; nothing in the others.
LEFT_OUT = {
    "bamba": {"mamba.conv1d": OTHER, "mamba.out_proj": DIRECT},
    "dbrx": {"ffn.router.layer": "a router", **{f"ffn.experts.mlp.{name}": OTHER for name in ("w1", "v1", "w2")}},
    "deepseek_v3": ROUTER,
    "ernie4_5_moe": ROUTER,
    "glm4_moe": ROUTER,
    "gpt_oss": {"mlp.router": "a router"},
    "granitemoe": {"block_sparse_moe.router": "a router"},
    "granitemoehybrid": {"mamba.conv1d": OTHER, "mamba.out_proj": DIRECT},
    "kimi_linear": {**ROUTER, "self_attn.conv1d": OTHER},
    "lfm2": {"conv.conv": OTHER},
    "llama4_text": {"feed_forward.router": "a router"},
    "mamba": {
        "mixer.A_log": OTHER, "mixer.conv1d": OTHER,
        **{f"mixer.{name}": DIRECT for name in ("dt_proj", "out_proj", "x_proj")},
    },
    "mamba2": {"mixer.conv1d": OTHER, "mixer.out_proj": DIRECT},
    "minimax": ROUTER,
    "mixtral": ROUTER,
    "olmo_hybrid": DELTA,
    "olmoe": ROUTER,
    "phimoe": {"mlp.router": "a router"},
    "qwen2_moe": SHARED,
    "qwen3_5": DELTA,
    "qwen3_5_moe_text": {**DELTA, **SHARED},
    "qwen3_5_text": DELTA,
    "qwen3_moe": ROUTER,
    "qwen3_next": {**DELTA, **SHARED},
    "recurrent_gemma": {
        "temporal_block.conv_1d": OTHER,
        **{f"temporal_block.rg_lru.{gate}_gate_weight": OTHER for gate in ("input", "recurrent")},
    },
}  # fmt: skip
EXPERTS = {
    "deepseek_v3", "ernie4_5_moe", "glm4_moe", "gpt_oss", "granitemoe", "kimi_linear", "llama4_text", "minimax",
    "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
}  # fmt: skip
NO_ATTENTION = {"mamba", "mamba2"}  # no --lora_target_modules qkv
NO_BITS = {"falcon"}  # none of its linear layers is transformers' own
NO_PREDICTION = {"dbrx"}  # a loop over the experts that have tokens


def kind(name: str) -> str:
    return re.sub(r"^.*\.\d+\.", "", name)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, use_cache=False).logits.float()


def adapted(model, **settings):
    """The model with an adapter that has moved."""
    config = lora_utils.lora_config(model, IDS, AdapterFlags(**{"lora_r": 8, **settings}))
    return moved(lora_utils.add_lora(model, config))


def untrained(model) -> list[str]:
    """The trainable parameters that a training step gives no gradient."""
    found = model.train()(input_ids=TOKENS, use_cache=False).logits.float()
    F.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return [name for name, gradient in trained.items() if gradient is None or not gradient.any()]


@pytest.mark.parametrize("name", CHANGES)
def test_all_says_what_it_leaves_out(name):
    model = architecture.meta_model(configuration(name))
    found = architecture.matrices(model)
    assert {kind(full): reason for full, reason in found.left_out.items()} == LEFT_OUT.get(name, {})
    assert bool(found.experts) == (name in EXPERTS)
    report = lora_utils.check_adapter(model.config, AdapterFlags())
    assert f"adapters on {len(found.layers)} of {len(found.layers)} linear layers" in report
    assert (f"and {len(found.experts)} of {len(found.experts)} weights of experts" in report) == (name in EXPERTS)
    for left, reason in LEFT_OUT.get(name, {}).items():
        assert f"x {left} ({reason})" in report
    if name in NO_ATTENTION:
        with pytest.raises(InputError, match="no attention layers"):
            lora_utils.check_adapter(model.config, AdapterFlags(lora_target_modules="qkv"))
    else:
        report = lora_utils.check_adapter(model.config, AdapterFlags(lora_target_modules="qkv"))
        assert (f"and 0 of {len(found.experts)} weights of experts" in report) == (name in EXPERTS)
    if name in NO_BITS:
        with pytest.raises(InputError, match="--use_qlora True: bitsandbytes has no layer for any of Falcon"):
            lora_utils.check_adapter(model.config, AdapterFlags(use_qlora=True))


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_trains_loads_and_merges(tmp_path, name):
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    model = adapted(loading.load_base(str(tmp_path / "base"), dtype=torch.float32))
    assert not untrained(model)
    model.save_pretrained(tmp_path / "adapter")
    trained, far = logits(model), 1e-2
    with model.disable_adapter():
        without = logits(model)
    torch.testing.assert_close(without, logits(base), atol=2e-5, rtol=1e-4)
    assert (trained - without).abs().max() > far

    loaded = adapters.load_adapter(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), trained, atol=2e-5, rtol=1e-4)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # nothing of ours
    assert not [warning for warning in said if "ignored" in str(warning.message)]
    torch.testing.assert_close(logits(plain), trained, atol=2e-5, rtol=1e-4)
    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), trained, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_trains_in_full_gets_a_gradient(name):
    model = build(name)
    architecture.freeze_non_text_modules(model)
    found = model.train()(input_ids=TOKENS, use_cache=False).logits
    F.cross_entropy(found[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]  # DDP would wait for it


STRUCTURES = {
    "dense": "qwen3",
    "convolutions of size 1": "gpt2",
    "experts": "mixtral",
    "experts, a shared one, a dense layer": "deepseek_v3",
    "experts multiplied from the right, with biases": "gpt_oss",
    "experts that get rows": "llama4_text",
    "hybrid": "bamba",
    "hybrid, experts": "qwen3_next",
    "composite": "gemma3",
    "experts out of reach": "dbrx",
}


@pytest.mark.parametrize("name", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_qlora_trains_loads_and_merges(tmp_path, name):
    build(name).save_pretrained(tmp_path / "base")
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=True))

    def base():
        return loading.load_base(str(tmp_path / "base"), quantization)

    model = base()
    skeleton = architecture.meta_model(configuration(name))
    planned = architecture.quantized_weights(skeleton, 4)
    assert {n for n, p in model.named_parameters() if getattr(p, "quant_state", None)} == set(planned)
    assert set(architecture.matrices(skeleton).experts) <= set(planned)
    assert not any(LEFT_OUT.get(name, {}).get(kind(n.removesuffix(".weight"))) for n in planned)
    assert lora_utils.count_parameters(model)[1] == lora_utils.count_parameters(skeleton)[1]
    if name in ("mixtral", "bamba"):
        parts = predicted(configuration(name), IDS, Step(1, 8, 1), "qlora", vocabulary=0).parts
        assert parts["weights"] * 1e9 == pytest.approx(sum(map(_bytes, model.parameters())), rel=0.03)

    model = adapted(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not untrained(model)
        trained = logits(model)
        model.save_pretrained(tmp_path / "adapter")
        assert torch.equal(logits(adapters.load_adapter(base(), str(tmp_path / "adapter"))), trained)
    with model.disable_adapter(), torch.autocast("cpu", torch.bfloat16):
        far = (logits(model) - trained).abs().mean()
    with torch.autocast("cpu", torch.bfloat16):  # the same arithmetic: in another, routers choose other experts
        written_out = adapters.load_adapter(base().dequantize(torch.bfloat16), str(tmp_path / "adapter"))
        # Its embedding and head are rounded to bfloat16 once more.
        assert (logits(written_out) - trained).abs().mean() < 0.03 * far
    whole = base().dequantize(torch.float32).to(torch.float32)
    loaded = adapters.load_adapter(whole, str(tmp_path / "adapter"))
    expected = logits(loaded)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CHANGES)
def test_rl_takes_a_step(tmp_path, name):
    check_rl_step(build(name), tmp_path, AdapterFlags(use_lora=True))


@pytest.mark.parametrize("name", STRUCTURES.values(), ids=STRUCTURES.keys())
def test_rl_takes_a_step_on_4_bits(tmp_path, name):
    flags = AdapterFlags(use_qlora=True)
    build(name).save_pretrained(tmp_path / "base")
    check_rl_step(loading.load_base(str(tmp_path / "base"), lora_utils.quantization_config(flags)), tmp_path, flags)


def check_rl_step(base, folder, flags: AdapterFlags):
    """A new adapter equals its reference before the first step, and every part of it gets a gradient."""
    model = lora_utils.adapt(base, flags, IDS)
    trainer = rl_trainer(model, folder, new_adapter=True, bits=flags.bits, optim="sgd")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert trainer.state.log_history[0]["kl"] == 0
    assert trainer.state.log_history[0]["grad_norm"] > 0
    moved = {name for name, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])}
    assert moved >= {name for name in before if "lora_B" in name}  # the others have no gradient while B is 0


def _bytes(parameter: torch.Tensor) -> int:
    state = getattr(parameter, "quant_state", None)
    extra = sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax)) if state else 0
    return parameter.numel() * parameter.element_size() + extra


def test_experts_have_no_8_bits(tmp_path):
    build("mixtral").save_pretrained(tmp_path / "base")
    config = configuration("mixtral")
    report = lora_utils.check_adapter(config, AdapterFlags(use_lora=True, load_in_8bit=True))
    assert "2 x mlp.experts.gate_up_proj (bitsandbytes has no 8 bits for it)" in report
    model = loading.load_base(str(tmp_path / "base"), lora_utils.quantization_config(AdapterFlags(load_in_8bit=True)))
    stored = {f"{n}.weight" for n, m in model.named_modules() if type(m).__name__ == "Linear8bitLt"}
    assert stored == set(architecture.quantized_weights(architecture.meta_model(config), 8))
    assert not untrained(adapted(model))


@pytest.mark.parametrize("name", ["mixtral", "gemma3"])
def test_the_prediction_counts_experts_and_no_vision_tower(name):
    config = configuration(name)
    step = Step(2, 40, 6)
    full, lora = (predicted(config, IDS, step, method) for method in ("full", "lora"))
    model = build(name)
    architecture.freeze_non_text_modules(model)
    assert full.trainable == lora_utils.count_parameters(model)[0]
    assert full.trainable < sum(p.numel() for p in model.parameters()) or name == "mixtral"
    wrapped = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS))
    assert lora.trainable == lora_utils.count_parameters(wrapped)[0]


@pytest.mark.parametrize("name", sorted(NO_PREDICTION))
def test_what_cannot_be_predicted_is_refused(name):
    with pytest.raises(InputError, match=f"--dry_run True: the memory of {name} cannot be predicted"):
        predicted(configuration(name), IDS, Step(2, 40, 6), "lora")
