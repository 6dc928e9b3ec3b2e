"""Embedding and output head of a quantized base in 8 bits: values, gradients, memory, loading, saving, resuming."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from architectures import CHANGES, build
from helpers import cut_short, sft_flags
from models import ARCHITECTURES, make_model, predicted
from peft import AutoPeftModelForCausalLM
from plain import IDS, TOKENS, Made
from processes import assert_same_run, two_processes
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lora_utils
import sft
from minionerec.checkpoint import Checkpoint, newest_checkpoint
from minionerec.dryrun.passes import Step
from minionerec.flags import AdapterFlags
from minionerec.model import adapters, device, int8_rows, loading

EXPERTS = {"gpt_oss", "kimi_linear", "qwen3_next"}  # the predictions of their tiny models hang on single experts
CPU = torch.device("cpu")
AS_ON_GPU = torch.device("cpu", 0)  # not the device that torch.device("cpu") is, as a GPU is not
QLORA = AdapterFlags(use_qlora=True, lora_dropout=0.0)


def in_8_bits(model, used_on: torch.device = CPU):
    """A copy of the model with both ends in 8 bits, and its twin: plain layers with the same values."""
    model = copy.deepcopy(model).requires_grad_(False)
    int8_rows.quantize_embeddings(model, used_on)
    twin = copy.deepcopy(model)
    int8_rows.dequantize_embeddings(twin, torch.float32)
    return model, twin


def adapted(model):
    """The model with an adapter that has moved."""
    torch.manual_seed(1)
    model = lora_utils.add_lora(model, lora_utils.lora_config(model, IDS, QLORA))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def results(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and the gradient of everything that trains."""
    logits = model(input_ids=TOKENS, use_cache=False).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


# --- Bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_value_is_off_by_half_a_scale_at_most(dtype, monkeypatch):
    monkeypatch.setattr(int8_rows, "CHUNK", 40 * 68)
    torch.manual_seed(0)
    weight = (torch.randn(96, 64) * torch.logspace(-3, 2, 96).unsqueeze(1)).to(dtype)
    weight[3] = 0
    packed = int8_rows.pack(weight)
    assert packed.shape == (96, 68) and packed.dtype == torch.int8
    scale = weight.float().abs().amax(dim=1, keepdim=True) / 127
    apart = (int8_rows.unpack(packed, torch.float32) - weight.float()).abs()
    assert (apart <= 0.5001 * scale).all() and off(int8_rows.unpack(packed, torch.float32), weight) < 0.01
    assert torch.equal(int8_rows.unpack(packed[[5, 3]], dtype), int8_rows.unpack(packed, dtype)[[5, 3]])


def test_one_row_of_a_width_that_four_does_not_divide():
    weight = torch.randn(3, 30)
    packed = int8_rows.pack(weight)
    for one in (packed[1], packed[1:2], packed[[1]]):
        assert torch.equal(int8_rows.unpack(one, torch.float32).view(-1), int8_rows.unpack(packed, torch.float32)[1])


def test_a_damaged_row_stays_visible():
    weight = torch.randn(4, 8)
    weight[1, 2], weight[2, 3] = float("nan"), float("inf")
    found = int8_rows.unpack(int8_rows.pack(weight), torch.float32)
    assert found[[0, 3]].isfinite().all()
    assert not found[1].isfinite().any() and not found[2].isfinite().all()


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("used_on", [CPU, AS_ON_GPU], ids=["one device", "embedding on the CPU"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_values_and_gradients_are_those_of_plain_layers(architecture, tied, used_on, monkeypatch):
    monkeypatch.setattr(int8_rows, "CHUNK", 40 * 68)  # rows do not divide the vocabulary
    whole = make_model(architecture, scale=2.0, tie_word_embeddings=tied)
    model, twin = in_8_bits(whole, used_on)
    assert len(int8_rows.int8_layers(model)) == 2 and not int8_rows.int8_layers(twin)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert (output.packed is embedding.packed) == (output.weight is embedding.weight) == tied
    parameters = [p for p in model.parameters() if p.dtype == torch.int8]
    assert len(parameters) == (1 if tied or used_on == AS_ON_GPU else 2)
    assert lora_utils.count_parameters(model) == (0, lora_utils.count_parameters(whole)[1])

    logits, gradients = results(adapted(model))
    expected, expected_gradients = results(adapted(twin))
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)
    unrounded, its_gradients = results(adapted(whole))
    assert 0 < off(logits, unrounded) < 0.02
    assert max(off(gradients[name], its_gradients[name]) for name in gradients) < 0.04


@pytest.mark.parametrize("name", CHANGES)
def test_every_architecture_keeps_its_predictions(name):
    whole = build(name).eval()
    model, twin = in_8_bits(whole)
    with torch.no_grad():
        found, expected, unrounded = (m(input_ids=TOKENS, use_cache=False).logits.float() for m in (model, twin, whole))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert len(int8_rows.int8_layers(model)) == 2
    assert 0 < off(found, unrounded) < (0.25 if name in EXPERTS else 0.1)  # a router may choose another expert


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("biased", [True, False])
def test_the_head_computes_in_float32(dtype, biased, monkeypatch):
    monkeypatch.setattr(int8_rows, "CHUNK", 40 * 68)
    model = make_model(tie_word_embeddings=False).to(dtype)
    if biased:
        model.lm_head.bias = torch.nn.Parameter(torch.randn(96, dtype=dtype), requires_grad=False)
    model, twin = in_8_bits(model)
    hidden = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    gradient = torch.randn(2, 5, 96)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.lm_head(hidden)
        (found,) = torch.autograd.grad(logits, hidden, gradient)
    bias = twin.lm_head.bias
    expected = F.linear(hidden.float(), twin.lm_head.weight, None if bias is None else bias.float())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-5)
    assert logits.dtype == torch.float32 and found.dtype == dtype
    expected = gradient @ twin.lm_head.weight
    assert off(found, expected) < (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("tied", [True, False])
def test_no_matrix_is_written_out(tied, monkeypatch):
    monkeypatch.setattr(int8_rows, "CHUNK", 32 * 68)
    model = adapted(in_8_bits(make_model(vocab_size=960, scale=2.0, tie_word_embeddings=tied))[0])
    with Made() as made:
        results(model)
    assert max(max(sizes) for dtype, sizes in made.sizes.items() if dtype.is_floating_point) < 960 * 64
    assert model.get_input_embeddings().weight.dtype == torch.float32  # which models ask, and it makes nothing


def test_what_is_read_by_its_weight_stays_as_it_is():
    class Reads(torch.nn.Embedding):
        def forward(self, token_ids):
            return F.embedding(token_ids, self.weight)

    model = make_model()
    model.model.embed_tokens.__class__ = Reads
    model, _ = in_8_bits(model)
    assert not int8_rows.int8_layers(model)
    assert isinstance(model.lm_head.weight, torch.nn.Parameter)


# --- Growing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("used_on", [CPU, AS_ON_GPU], ids=["one device", "embedding on the CPU"])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_added(tied, used_on, sharded, monkeypatch):
    plain, _ = in_8_bits(make_model(scale=2.0, tie_word_embeddings=tied))
    monkeypatch.setattr(device, "weights_are_sharded", lambda: sharded)
    model, _ = in_8_bits(make_model(scale=2.0, tie_word_embeddings=tied), used_on)
    packed = [layer.packed for layer in int8_rows.int8_layers(model)]
    assert all(p.is_floating_point() == sharded for p in packed)  # what FSDP and ZeRO-3 can shard
    int8_rows.grow(model, 101)
    assert [layer.packed.dtype for layer in int8_rows.int8_layers(model)] == [p.dtype for p in packed]
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    assert (output.packed is embedding.packed) == tied
    assert embedding.weight.shape == output.weight.shape == (101, 64)
    assert model.config.vocab_size == model.vocab_size == embedding.num_embeddings == output.out_features == 101
    with torch.no_grad():
        logits, before = model(input_ids=TOKENS).logits, plain(input_ids=TOKENS).logits
        assert torch.equal(logits[..., :96], before) and logits.shape[-1] == 101
    new = embedding.weight[list(range(96, 101))]
    assert 0.01 < new.std() < 0.04 and off(embedding.weight[:96], plain.get_input_embeddings().weight[:96]) == 0


# --- Loading, saving, merging -----------------------------------------------------------------------------------------


def storage(bits: int):
    return lora_utils.quantization_config(AdapterFlags(use_qlora=bits == 4, load_in_8bit=bits == 8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_a_quantized_base_is_loaded_so(saved_base, tied, bits):
    model = loading.load_base(saved_base[tied], storage(bits))
    whole = loading.load_base(saved_base[tied], storage(bits), embeddings_in_8_bits=False)
    assert len(int8_rows.int8_layers(model)) == 2 and not int8_rows.int8_layers(whole)
    assert torch.equal(model.get_output_embeddings().packed, int8_rows.pack(whole.get_output_embeddings().weight))
    assert lora_utils.count_parameters(model)[1] == lora_utils.count_parameters(whole)[1]
    original = AutoModelForCausalLM.from_pretrained(saved_base[tied], dtype=torch.bfloat16)
    assert torch.equal(whole.get_input_embeddings().weight, original.get_input_embeddings().weight)
    with torch.no_grad():
        assert off(model(input_ids=TOKENS).logits, whole(input_ids=TOKENS).logits) < 0.02
    back = model.dequantize(torch.float32)
    assert off(back.get_input_embeddings().weight.detach(), original.get_input_embeddings().weight.detach()) < 0.01
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied


def test_while_loading_embedding_and_head_stay_on_the_cpu():
    """And transformers reserves no memory for them on a GPU."""
    from transformers import BitsAndBytesConfig

    from minionerec.model import experts

    quantizer = experts._Quantizer4bit(BitsAndBytesConfig(load_in_4bit=True), pre_quantized=False)
    model = make_model(tie_word_embeddings=False)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert quantizer.param_element_size(model, name, model.get_parameter(name)) == 0
        elsewhere = torch.empty(96, 64, device="meta")
        with pytest.raises(NotImplementedError, match="meta"):  # it is sent to the CPU
            quantizer.get_quantize_ops().convert({name: [elsewhere]}, model=model)
        # One of another shape is left out: `load_base` refuses a base that lacks weights.
        assert quantizer.get_quantize_ops().convert({name: [torch.empty(95, 64)]}, model=model) == {}


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_saved_and_loads_as_ever(saved_base, tmp_path, tied):
    model = adapted(loading.load_base(saved_base[tied], storage(4)))
    model.save_pretrained(tmp_path / "adapter")
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trained.values())
    again = adapters.load_adapter(loading.load_base(saved_base[tied], storage(4)), str(tmp_path / "adapter"), True)
    found = {name: p for name, p in again.named_parameters() if p.requires_grad}
    assert found.keys() == trained.keys() and all(torch.equal(found[name], p) for name, p in trained.items())
    adapters.copy_adapter(again, "default", "reference")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # nothing of ours, in full precision
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = model.eval()(input_ids=TOKENS).logits
        assert torch.equal(again.eval()(input_ids=TOKENS).logits, logits)
        again.set_adapter("reference")
        assert torch.equal(again(input_ids=TOKENS).logits, logits)
        with model.disable_adapter():
            far = (model(input_ids=TOKENS).logits - logits).abs().mean()
        assert (plain(input_ids=TOKENS).logits - logits).abs().mean() < 0.5 * far


@pytest.fixture(scope="module")
def runs(files, base, tmp_path_factory):
    """The base and the folder of a QLoRA run on it, tied and untied."""
    found = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp(f"run_tied_{tied}")
        tokenizer = loading.load_tokenizer(base)
        make_model(tie_word_embeddings=tied, vocab_size=len(tokenizer)).save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        flags = sft_flags(
            files, str(folder / "base"), str(folder / "sft"), use_qlora=True, lora_dropout=0.0, learning_rate=1e-3
        )
        sft.train(**flags)
        found[tied] = str(folder / "base"), str(folder / "sft"), flags
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_merged_into_the_published_rows(runs, tied, bits, dtype):
    """Whatever did not train and is not in 4 or 8 bits: rows of ordinary tokens, norms, biases, rotary frequencies."""
    base, output, _ = runs[tied]
    checkpoint = Checkpoint.read(os.path.join(output, "final_checkpoint"))
    tokenizer = loading.load_tokenizer(checkpoint.path)
    merged = lora_utils.load_adapted(checkpoint, tokenizer, base, storage(bits), merge_in=dtype)
    adapter = load_file(os.path.join(checkpoint.path, "adapter_model.safetensors"))
    published = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)  # of float32
    for part, of in (("embed_tokens", "get_input_embeddings"), ("lm_head", "get_output_embeddings")):
        weight, original = getattr(merged, of)().weight, getattr(published, of)().weight
        rows = next(t for name, t in adapter.items() if "tokens_delta" in name and (tied or part in name))
        assert torch.equal(weight, torch.cat([original, rows.to(dtype)])) and len(weight) == len(tokenizer)
    found = {**dict(merged.named_parameters()), **dict(merged.named_buffers())}
    kept = [n for n in found if ("norm" in n or "bias" in n or "inv_freq" in n) and "proj.weight" not in n]
    assert len(kept) > 8
    for name in kept:
        value = published.get_buffer(name) if "inv_freq" in name else published.get_parameter(name)
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_resumes_to_the_same_weights(runs, tied, tmp_path):
    _, output, flags = runs[tied]
    shutil.copytree(output, tmp_path / "again")
    cut_short(tmp_path / "again")
    sft.train(**{**flags, "output_dir": str(tmp_path / "again"), "resume_from_checkpoint": "True"})
    ours, theirs = (
        load_file(os.path.join(newest_checkpoint(str(o)), "adapter_model.safetensors"))
        for o in (tmp_path / "again", output)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["torchrun", "fsdp"])
def test_two_processes_train_an_untied_base_as_one_does(runs, tmp_path, engine):
    _, output, flags = runs[False]
    two_processes(engine, tmp_path, "sft.py", {**flags, "output_dir": tmp_path / "two"})
    assert_same_run(Path(output), tmp_path / "two", 3e-3)


# --- Prediction -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("tied", [True, False])
def test_the_dry_run_counts_every_byte(saved_base, tied, bits):
    model = loading.load_base(saved_base[tied], storage(bits))
    method, flags = ("qlora", {}) if bits == 4 else ("lora", {"load_in_8bit": True})
    here, on_gpu = (
        predicted(model.config, IDS, Step(1, 8, 1), method, on_gpu, vocabulary=0, **flags).parts["weights"] * 1e9
        for on_gpu in (False, True)
    )
    embedding = model.get_input_embeddings().packed.numel()
    assert embedding == 96 * 68
    assert here - on_gpu == pytest.approx(0 if tied else embedding)  # which stays on the CPU
    held = sum(layer.out_features * 4 for layer in model.modules() if type(layer).__name__ == "Linear8bitLt")
    for parameter in model.parameters():
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        held += sum(t.numel() * t.element_size() for t in (state.absmax, state.state2.absmax)) if state else 0
    assert here == pytest.approx(held, abs=500)  # bitsandbytes rounds the number of its scales up
