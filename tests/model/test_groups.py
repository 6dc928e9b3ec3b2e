"""What a GPU computes together, against what a CPU computes one by one: values, gradients and files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from architectures import CHANGES, build
from as_on_gpu import starts_kernels
from helpers import rl_flags, sft_flags, succeed
from models import make_model
from peft import LoraConfig, get_peft_model
from peft.helpers import rescale_adapter_scale
from plain import IDS, TOKENS, moved
from processes import assert_same_run, two_processes
from transformers import AutoModelForCausalLM

import lora_utils
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, device, fewer_kernels, groups, loading


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch):
    monkeypatch.setattr(device, "starts_kernels", starts_kernels)


def with_adapter(model, **settings):
    flags = AdapterFlags(**{"lora_r": 8, "lora_dropout": 0.0, **settings})
    return moved(lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, flags)))


def alone(model):
    """The same model whose layers are computed one by one."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module.__dict__.pop("group", None)
    return twin


def sizes_of(model) -> list[int]:
    found = {id(m.group): len(m.group.layers) for m in model.modules() if getattr(m, "group", None) is not None}
    return sorted(found.values())


def results(model, passes=1):
    """Logits, and the gradients of the trained parameters summed over equal passes."""
    model.train()
    torch.manual_seed(2)  # of an architecture's own dropout
    for _ in range(passes):
        logits = model(input_ids=TOKENS, use_cache=False).logits.float()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), found


def assert_same(one, other, passes=1, atol=2e-5):
    (logits, gradients), (expected, wanted) = results(one, passes), results(other, passes)
    torch.testing.assert_close(logits, expected, atol=atol, rtol=1e-4)
    assert gradients.keys() == wanted.keys()
    for name, gradient in wanted.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(gradients[name], gradient, atol=atol * scale, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", CHANGES)
def test_every_architecture_gives_the_same(name):
    plain = build(name)
    model = copy.deepcopy(plain)
    fewer_kernels.use_fewer_kernels(model)
    with torch.no_grad():
        found = model(input_ids=TOKENS, use_cache=False).logits
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(device, "starts_kernels", lambda _: False)
            expected = plain(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    model = with_adapter(model)
    assert_same(model, alone(model), atol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "llama", "gemma2", "phi3"])
@pytest.mark.parametrize("tied", [True, False])
def test_groups_are_what_reads_one_input(architecture, tied):
    model = make_model(architecture, scale=2.0, tie_word_embeddings=tied)
    fewer_kernels.use_fewer_kernels(model)
    assert all("fewer_kernels" in type(m).__module__ for m in model.modules() if type(m).__name__.endswith("RMSNorm"))
    model = with_adapter(model)
    assert sizes_of(model) == ([1, 1, 1, 1] * 2 if architecture == "phi3" else [1, 1, 1, 1, 2, 2, 3, 3])
    twin = alone(model)
    assert_same(model, twin)
    assert_same(model, twin, passes=3)  # gradients are added to those that are there
    with torch.no_grad():  # an optimizer has changed the factors
        for one, other in zip(model.parameters(), twin.parameters(), strict=True):
            if one.requires_grad:
                one.mul_(0.5)
                other.mul_(0.5)
    assert_same(model, twin)
    with model.disable_adapter(), twin.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, twin(input_ids=TOKENS).logits)


def test_the_factors_follow_what_is_written_into_their_data():
    model = with_adapter(make_model(scale=2.0))
    twin = alone(model)
    for own in (model, twin):
        with torch.no_grad():
            own.eval()(input_ids=TOKENS)
        for name, parameter in own.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(-2.0)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, twin(input_ids=TOKENS).logits)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
def test_the_factors_follow_an_optimizer(fused, to_none):
    """A fused one does not count up the versions of its parameters."""
    model = with_adapter(make_model(scale=2.0))
    twin, losses = alone(model), []
    for own in (model.train(), twin.train()):
        optimizer = torch.optim.AdamW([p for p in own.parameters() if p.requires_grad], lr=1e-2, fused=fused)
        of_model = []
        for _ in range(4):
            for rows in (TOKENS[:1], TOKENS[1:]):
                of_model.append(own(input_ids=rows, labels=rows, use_cache=False).loss)
                of_model[-1].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=to_none)
        losses.append(torch.stack(of_model).detach())
    torch.testing.assert_close(losses[0], losses[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2", "phi3", "gpt2"])
def test_layers_without_an_adapter_join_where_nothing_trains(architecture):
    model = make_model(architecture, scale=2.0)
    plain = copy.deepcopy(model)
    fewer_kernels.use_fewer_kernels(model)
    groups.join_frozen_layers(model)
    sizes = sizes_of(model)
    assert sizes == {"phi3": [], "gpt2": []}.get(architecture, [2, 2, 3, 3])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits)
    loss = model(input_ids=TOKENS).logits.square().mean()
    loss.backward()  # with gradients, each is computed by itself
    plain(input_ids=TOKENS).logits.square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-3, rtol=1e-3)


def test_an_adapter_is_evaluated_in_the_type_of_its_base():
    """As in training under autocast: its factors are rounded to 16 bits, too."""
    model = with_adapter(make_model(scale=2.0).bfloat16()).eval()
    with torch.no_grad():
        found = model(input_ids=TOKENS).logits
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(input_ids=TOKENS).logits, found)
        expected = alone(model)(input_ids=TOKENS).logits  # the update in float32
        with model.disable_adapter():
            without = model(input_ids=TOKENS).logits
    assert (found - expected).abs().mean() < 0.05 * (expected - without).abs().mean()


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"lora_target_modules": "q_proj,v_proj"}, {"use_rslora": True}]
)
def test_other_adapters(settings):
    model = with_adapter(make_model(scale=2.0), **settings)
    sizes = {"use_dora": [], "lora_target_modules": [2, 2], "use_rslora": [1, 1, 1, 1, 2, 2, 3, 3]}
    assert sizes_of(model) == sizes[next(iter(settings))]
    assert_same(model, alone(model))


@pytest.mark.parametrize("name", ["qwen3", "mixtral", "gemma3"])
@pytest.mark.parametrize("kept", [True, False])
def test_four_bits(tmp_path, monkeypatch, name, kept):
    monkeypatch.setattr(groups, "KEPT_SCALES", 2**24 if kept else 0)
    build(name).save_pretrained(tmp_path / "base")
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=True))
    model = with_adapter(loading.load_base(str(tmp_path / "base"), quantization))
    assert sizes_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model, alone(model), atol=0.05)
        model.save_pretrained(tmp_path / "adapter")
        again = adapters.load_adapter(
            loading.load_base(str(tmp_path / "base"), quantization), str(tmp_path / "adapter")
        )
        with torch.no_grad():
            trained = model.eval()(input_ids=TOKENS).logits
            assert torch.equal(again.eval()(input_ids=TOKENS).logits, trained)


@pytest.mark.parametrize("kept", [True, False])
def test_dropout_has_the_gradients_of_its_mask(monkeypatch, kept):
    """A mask that is kept and one that is drawn again. Both are recovered from what they do to x."""
    monkeypatch.setattr(groups, "KEPT_MASK", 2**21 if kept else 0)
    model = with_adapter(make_model(scale=2.0), lora_dropout=0.5).train()
    layers = model.get_base_model().model.layers[0].mlp.gate_proj.group.layers
    x = torch.randn(2, 300, 64, requires_grad=True)
    torch.manual_seed(7)
    outputs = [layer(x) for layer in layers]
    sum((out * weight).sum() for out, weight in zip(outputs, (1.0, -0.5), strict=True)).backward()
    torch.manual_seed(7)
    flat = x.detach().flatten(0, 1)
    mask = (
        torch.native_dropout(torch.ones_like(flat), 0.5, True)[0]
        if kept
        else groups.redrawn(flat, 0.5, groups.draw_seed())
    )
    assert mask.unique().tolist() == [0.0, 2.0] and 0.9 < mask.mean() < 1.1
    twin, plain_x = alone(model), x.detach().clone().requires_grad_()
    total = 0.0
    for layer, out, weight in zip(
        twin.get_base_model().model.layers[0].mlp.children(), outputs, (1.0, -0.5), strict=False
    ):
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        update = (plain_x * mask.view_as(plain_x)) @ a.T @ b.T * layer.scaling["default"]
        expected = layer.base_layer(plain_x) + update
        torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
        total = total + (expected * weight).sum()
    total.backward()
    torch.testing.assert_close(x.grad, plain_x.grad, atol=1e-4, rtol=1e-4)
    for layer, other in zip(layers, twin.get_base_model().model.layers[0].mlp.children(), strict=False):
        for factor in ("lora_A", "lora_B"):
            found, wanted = (getattr(own, factor)["default"].weight.grad for own in (layer, other))
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_gradient_checkpointing_draws_the_same_masks():
    model = make_model(scale=2.0)
    fewer_kernels.use_fewer_kernels(model)
    model = with_adapter(model, lora_dropout=0.5)
    plain = results(model)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    recomputed = results(model)
    torch.testing.assert_close(recomputed[0], plain[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(recomputed[1][name], gradient, atol=1e-6, rtol=1e-4)


def test_a_layer_that_is_called_later_gets_an_output_of_its_own():
    """With gradients, or another adapter, than when the first layer of its group computed all outputs."""
    model = with_adapter(make_model(scale=2.0))
    gate, up = model.get_base_model().model.layers[0].mlp.gate_proj, model.get_base_model().model.layers[0].mlp.up_proj
    assert gate.group is up.group
    x = torch.randn(2, 3, 64, requires_grad=True)
    with torch.no_grad():
        gate(x)
    assert up(x).requires_grad
    gate(x)
    expected = alone(model).get_base_model().model.layers[0].mlp.up_proj.base_layer(x)
    with model.disable_adapter():
        torch.testing.assert_close(up(x), expected)
    gate(x)
    with torch.no_grad():
        x.mul_(2.0)
        torch.testing.assert_close(up(x), alone(model).get_base_model().model.layers[0].mlp.up_proj(x))


def test_an_optimizer_between_the_passes_is_noticed():
    model = with_adapter(make_model(scale=2.0)).train()
    loss = model(input_ids=TOKENS).logits.sum()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_merging_and_taking_it_back(tmp_path):
    model = with_adapter(make_model(scale=2.0))
    with torch.no_grad():
        before = model.eval()(input_ids=TOKENS).logits
        model.merge_adapter()
        torch.testing.assert_close(model(input_ids=TOKENS).logits, before, atol=1e-4, rtol=1e-3)
        model.unmerge_adapter()
        torch.testing.assert_close(model(input_ids=TOKENS).logits, before, atol=1e-4, rtol=1e-3)
        merged = model.merge_and_unload()
        groups.join_frozen_layers(merged)
        torch.testing.assert_close(merged(input_ids=TOKENS).logits, before, atol=1e-4, rtol=1e-3)
        merged.save_pretrained(tmp_path)  # weights that are parts of one
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again(input_ids=TOKENS).logits, before, atol=1e-4, rtol=1e-3)


def test_files_are_those_of_peft(tmp_path):
    model = with_adapter(make_model(scale=2.0))
    results(model)
    model.save_pretrained(tmp_path / "ours")
    plain = get_peft_model(make_model(scale=2.0), model.peft_config["default"])
    plain.load_adapter(str(tmp_path / "ours"), "default")
    with torch.no_grad():
        expected = plain.eval()(input_ids=TOKENS).logits
        torch.testing.assert_close(model.eval()(input_ids=TOKENS).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_train_as_one_does(files, base, tmp_path, monkeypatch):
    monkeypatch.setenv("AS_ON_GPU", "float32")
    monkeypatch.setattr(device, "compute_dtype", lambda quantized=False: torch.float32)
    flags = {"use_lora": True, "lora_dropout": 0.0, "batch_size": 8, "micro_batch_size": 2}
    succeed("sft.py", **sft_flags(files, base, tmp_path / "one", **flags))
    two_processes("torchrun", tmp_path, "sft.py", sft_flags(files, base, tmp_path / "two", **flags))
    assert_same_run(tmp_path / "one", tmp_path / "two", 1e-4)
    start = tmp_path / "one" / "final_checkpoint"
    flags = {"use_lora": True, "add_gt": True}
    succeed("rl.py", **rl_flags(files, start, tmp_path / "rl", **flags))
    flags = rl_flags(files, start, tmp_path / "rl two", **flags)
    two_processes("torchrun", tmp_path, "rl.py", {**flags, "train_batch_size": flags["train_batch_size"] // 2})
    assert_same_run(tmp_path / "rl", tmp_path / "rl two", 1e-4)


SECOND = [
    {"alpha_pattern": {"k_proj": 64}},
    {"rank_pattern": {"k_proj": 2}},
    {"use_dora": True},
    {"lora_bias": True},
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": ["v_proj", "up_proj", "down_proj"], "r": 2},
    {"target_modules": ["o_proj"]},
    {"r": 3, "lora_alpha": 5, "use_rslora": True},
]


@pytest.mark.parametrize("changes", SECOND, ids=[next(iter(changes)) for changes in SECOND])
def test_a_second_adapter_may_be_of_another_kind(changes):
    base = make_model("qwen2", scale=2.0)
    every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    second = LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, "target_modules": every, **changes})
    first = lora_utils.lora_config(base, IDS, AdapterFlags(lora_r=8, lora_dropout=0.0))
    plain = get_peft_model(copy.deepcopy(base), copy.deepcopy(first))
    model = lora_utils.add_lora(base, first)
    for one in (plain, model):
        one.add_adapter("other", second)
        one.set_adapter("other")
    moved(model)
    plain.load_state_dict(model.state_dict())
    for name in ("other", "default", "other"):
        for one in (plain, model):
            one.set_adapter(name)
        assert_same(model, plain)
    for one in (plain, model):  # an adapter of this name, but of another shape
        one.delete_adapter("other")
        one.add_adapter("other", LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=9, target_modules=every))
        one.set_adapter("other")
    moved(model)
    plain.load_state_dict(model.state_dict())
    assert_same(model, plain)


def test_a_scale_may_change():
    model = with_adapter(make_model("llama", scale=2.0)).eval()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        with rescale_adapter_scale(model, 0.5):
            found, expected = model(input_ids=TOKENS).logits, alone(model)(input_ids=TOKENS).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        assert (found - before).abs().max() > 0.1
        torch.testing.assert_close(model(input_ids=TOKENS).logits, before)


@pytest.mark.parametrize("adapted", [True, False])
def test_biases_are_those_of_the_layers(adapted):
    model = make_model("qwen2", scale=2.0).requires_grad_(False)
    layer = model.model.layers[0].self_attn.k_proj
    if adapted:
        model = with_adapter(model)
    else:
        groups.join_frozen_layers(model)
    assert sizes_of(model) == ([1, 1, 1, 1, 2, 2, 3, 3] if adapted else [2, 2, 3, 3])
    with torch.no_grad():
        model(input_ids=TOKENS)
        layer.bias.add_(1)  # as an optimizer does it
        found = model(input_ids=TOKENS).logits
        twin = copy.deepcopy(model)
        for module in twin.modules():
            module.__dict__.pop("group", None)
            module.__class__ = torch.nn.Linear if type(module) is groups.JoinedLinear else type(module)
        torch.testing.assert_close(found, twin(input_ids=TOKENS).logits, atol=2e-5, rtol=1e-4)
        layer.bias.data = layer.bias + 1  # as loading may do it
        for module in twin.modules():
            if isinstance(module, torch.nn.Linear) and module.bias is not None and module.out_features == 32:
                module.bias.add_(1)
                break
        torch.testing.assert_close(model(input_ids=TOKENS).logits, twin(input_ids=TOKENS).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("adapted", [True, False])
def test_models_can_be_copied_and_used_without_versions(adapted):
    model = make_model("qwen2", scale=2.0).requires_grad_(False)
    if adapted:
        model = with_adapter(model).eval()
    else:
        groups.join_frozen_layers(model)
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(input_ids=TOKENS).logits, expected, atol=1e-6, rtol=1e-5)
        assert sizes_of(copied) == sizes_of(model)
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=TOKENS).logits, expected, atol=1e-6, rtol=1e-5)
