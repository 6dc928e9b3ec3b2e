"""Low-rank updates of experts, and experts in 4 bits, against PEFT's layers and against materialized weights."""

import copy
import math

import pytest
import torch
from architectures import build, configuration
from peft import AutoPeftModelForCausalLM, get_peft_model
from plain import IDS, TOKENS

import lora_utils
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, architecture, experts, loading

# Multiplied from the left; from the right, with biases; without routing; next to a shared expert; next to dense layers.
KINDS = ["mixtral", "gpt_oss", "llama4_text", "qwen2_moe", "deepseek_v3"]


def stacks_of(model) -> list:
    return [module for module in model.modules() if isinstance(module, experts.LeanExperts)]


def moved(model, by: float = 0.05):
    torch.manual_seed(1)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.requires_grad:
            parameter.data += by * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("name", KINDS)
def test_lean_experts_are_pefts(name):
    config = lora_utils.lora_config(build(name), IDS, AdapterFlags(lora_r=8, lora_dropout=0.0))
    plain = moved(get_peft_model(build(name), copy.deepcopy(config)))
    lean = moved(lora_utils.add_lora(build(name), config))
    assert stacks_of(lean) and not stacks_of(plain)
    results = []
    for model in (plain, lean):
        output = model(input_ids=TOKENS, labels=TOKENS, use_cache=False)
        output.loss.backward()
        results.append((output.logits, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-4)
    assert results[0][1].keys() == results[1][1].keys()
    for parameter, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][parameter], gradient, atol=1e-6, rtol=1e-3, msg=parameter)
    with lean.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(lean(input_ids=TOKENS).logits, build(name)(input_ids=TOKENS).logits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(name)`: the folder of a tiny base."""

    def folder(name: str) -> str:
        path = tmp_path_factory.getbasetemp() / f"experts_{name}"
        if not path.exists():
            build(name).save_pretrained(path)
        return str(path)

    return folder


def in_4_bits(path: str):
    return loading.load_base(path, lora_utils.quantization_config(AdapterFlags(use_qlora=True)))


@pytest.mark.parametrize("multiplies_right", [True, False])
def test_a_weight_in_4_bits_multiplies_as_what_it_stands_for(saved, multiplies_right):
    module = stacks_of(in_4_bits(saved("mixtral")))[0]
    state = module.states["down_proj"]
    weight = experts.bitsandbytes.functional.dequantize_4bit(module.down_proj.data, state)
    assert weight.shape == (4, 64, 128) and module.down_proj.numel() == weight.numel() // 2
    torch.manual_seed(0)
    rows = torch.randn(20, weight.shape[1 if multiplies_right else 2]).to(weight.dtype)
    ends = torch.tensor([3, 3, 12, 20], dtype=torch.int32)
    plain = rows.clone().requires_grad_(), rows.requires_grad_()
    results = [
        experts.grouped(plain[0], weight if multiplies_right else weight.mT, ends),
        experts._FourBits.apply(plain[1], module.down_proj, state, ends, multiplies_right),
    ]
    assert torch.equal(*results)
    gradient = torch.randn_like(results[0])
    for result in results:
        result.backward(gradient)
    assert torch.equal(plain[0].grad, plain[1].grad)


@pytest.mark.parametrize("targets", ["all", "qkv"])
def test_no_weight_that_is_written_out_is_kept(saved, targets):
    model = in_4_bits(saved("mixtral"))
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags(lora_target_modules=targets)))
    smallest = min(state.shape.numel() for module in stacks_of(model) for state in module.states.values())
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model.train()(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
    assert kept and max(kept) < smallest
    lowest = [p for n, p in model.named_parameters() if "layers.0.self_attn.q_proj.lora_B" in n]
    assert lowest[0].grad.any()  # through the experts above it


@pytest.mark.parametrize("bits", [4, 16])
def test_checkpointing_gives_the_same_gradients(saved, bits):
    gradients, folder = [], saved("mixtral")  # made once: it draws random numbers
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = in_4_bits(folder) if bits == 4 else build("mixtral")
        model = moved(lora_utils.add_lora(base, lora_utils.lora_config(base, []), checkpointing))
        if checkpointing:
            base.activation_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(2)  # of the dropout masks
        model.train()(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        assert not any(module.updates for module in stacks_of(model))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_dropout_is_on_in_training_also_for_experts(tmp_path):
    model = build("deepseek_v3")
    config = lora_utils.lora_config(
        model, [], AdapterFlags(lora_dropout=0.5, lora_target_modules="gate_up_proj,shared_experts.up_proj")
    )
    model = moved(lora_utils.add_lora(model, config))
    layers = [m for m in model.modules() if isinstance(m, lora_utils.lora.LoraLayer)]
    assert len(layers) == 2 and all(layer.lora_dropout["default"].p == 0.5 for layer in layers)

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return model(input_ids=TOKENS, use_cache=False).logits

    model.train()
    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))
    model.eval()
    evaluated = logits(1)
    assert torch.equal(evaluated, logits(2))
    model.save_pretrained(tmp_path)
    loaded = adapters.load_adapter(build("deepseek_v3"), str(tmp_path)).eval()
    assert loaded.peft_config["default"].lora_dropout == 0  # PEFT would refuse to load another
    torch.testing.assert_close(loaded(input_ids=TOKENS, use_cache=False).logits, evaluated)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_rank_is_divided_among_the_experts_of_a_token(use_rslora):
    model = build("deepseek_v3")  # 2 of 4 experts a token, a dense layer and a shared expert
    config = lora_utils.lora_config(model, [], AdapterFlags(lora_r=8, lora_alpha=16, use_rslora=use_rslora))
    model = lora_utils.add_lora(model, config)
    ranks = {}
    for module in model.modules():
        if isinstance(module, lora_utils.lora.LoraLayer):
            stack = isinstance(module, experts.LeanParameter)
            ranks.setdefault(stack, set()).add((module.r["default"], round(module.scaling["default"], 6)))
    scale = round(16 / math.sqrt(8), 6) if use_rslora else 2.0
    assert ranks == {True: {(4, scale)}, False: {(8, scale)}}
    many = lora_utils.lora_config(architecture.meta_model(configuration("llama4_text")), [], AdapterFlags(lora_r=8))
    assert many.r == 8 and not many.rank_pattern  # one expert a token


def test_names_reach_experts_and_what_stands_next_to_them():
    model = architecture.meta_model(configuration("deepseek_v3"))

    def targets(spec: str) -> tuple[list[str], list[str]]:
        return lora_utils.find_target_modules(model, spec), lora_utils.find_target_parameters(model, spec)

    assert targets("experts.down_proj, o_proj") == (["o_proj"], ["down_proj"])
    # PEFT would take these modules for the experts that had their name.
    assert targets("mlp.down_proj,shared_experts.down_proj") == ([], ["down_proj.weight"])
    assert targets("down_proj") == ([], ["down_proj", "down_proj.weight"])
    with pytest.raises(InputError, match=r"gate matches no linear layer of .*gate_up_proj"):
        targets("gate")
    mixed = architecture.meta_model(configuration("qwen2_moe"))
    assert lora_utils.find_target_modules(mixed, "down_proj") == ["shared_expert.down_proj"]
    assert lora_utils.find_target_parameters(mixed, "down_proj") == ["down_proj"]


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "orthogonal"}])
def test_what_experts_cannot_have_is_refused(settings):
    config = configuration("mixtral")
    with pytest.raises(InputError, match=f"--{next(iter(settings))} .*down_proj, gate_up_proj of Mixtral.*qkv"):
        lora_utils.check_adapter(config, AdapterFlags(**settings))
    assert "0 of 4 weights of experts" in lora_utils.check_adapter(
        config, AdapterFlags(lora_target_modules="qkv", **settings)
    )


@pytest.mark.parametrize("bits", [4, 16])
@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_a_copy_of_an_adapter_gives_the_same(saved, name, bits):
    model = in_4_bits(saved(name)) if bits == 4 else build(name)
    model = moved(lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags(lora_r=8)))).eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS, use_cache=False).logits
        adapters.copy_adapter(model, "default", "ref")
        assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, before)
        moved(model)
        assert not torch.equal(model(input_ids=TOKENS, use_cache=False).logits, before)
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=TOKENS, use_cache=False).logits, before)


def test_peft_alone_loads_a_qlora_adapter_on_4_bits(saved, tmp_path):
    model = in_4_bits(saved("deepseek_v3"))
    model = moved(lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, AdapterFlags(lora_r=8)))).eval()
    model.save_pretrained(tmp_path)
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=True))
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization).eval()
    loading._keep_training_layout(plain)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m(input_ids=TOKENS, use_cache=False).logits for m in (model, plain))
        with model.disable_adapter():
            without = model(input_ids=TOKENS, use_cache=False).logits
    # transformers has the experts in 16 bits there.
    assert (ours - theirs).abs().mean() < 0.5 * (ours - without).abs().mean()


def test_a_base_that_is_stored_quantized_takes_no_adapter():
    config = configuration("gpt_oss")
    config.quantization_config = {"quant_method": "mxfp4"}
    for flags, why in ((AdapterFlags(use_lora=True), "takes no adapter"), (AdapterFlags(), "does not train")):
        with pytest.raises(InputError, match=f"are stored in mxfp4, which {why}; take a bfloat16 copy"):
            lora_utils.check_stored(config, flags)


def test_no_loss_of_the_routers_is_computed(tmp_path):
    model = build("mixtral")
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path)
    loaded = loading.load_base(str(tmp_path))
    mask = torch.zeros(2, 1, 9, 9)  # as RL's, of which the routers' loss can make nothing
    assert loaded(input_ids=TOKENS, attention_mask=mask, use_cache=False).get("aux_loss") is None
    assert architecture.experts_per_token(loaded.config) == 2
