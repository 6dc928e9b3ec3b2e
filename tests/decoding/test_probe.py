"""How a model can be decoded is tried on the model itself, once, and what cannot be decoded is refused."""

import copy
import shutil
from functools import partial

import pytest
import torch
from architectures import COPIED, build
from helpers import evaluate_flags, rl_flags, sft_flags
from models import make_model
from plain import EOS, SIDS, check_beams, check_logps, exhaustive, prompts, with_adapter
from transformers import AutoModelForCausalLM, BertConfig, RwkvConfig
from transformers.models.bamba import modeling_bamba

import evaluate
import lora_utils
import rl
import sft
from minionerec.decoding import probe as probing
from minionerec.decoding.beam_search import constrained_beam_search
from minionerec.decoding.beams import CopiedBeams, RereadBeams, TreeBeams
from minionerec.decoding.probe import probe
from minionerec.decoding.ranking import score_prompts
from minionerec.decoding.trie import Trie
from minionerec.errors import InputError
from minionerec.flags import AdapterFlags
from minionerec.model import loading

KINDS = ["qwen2", "llama", "gemma2", "mixtral", "qwen3_5_text", "lfm2", "mpt", "minimax"]


def forwards_of(model) -> list:
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def test_a_model_is_tried_once_and_left_as_it_was():
    model = make_model("mistral", sliding_window=64).train()
    seen, weights, state = forwards_of(model), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    support = probe(model)
    assert support.beams is TreeBeams and support.shared and model.training and 0 < len(seen) < 10
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    tried = len(seen)
    assert probe(model) is support and probe(with_adapter(model), 30, 63) is support and len(seen) == tried
    # Rows that the window is shorter than are tried as long as they are, once too.
    assert probe(model, 40, 64).beams is TreeBeams and len(seen) > tried
    tried = len(seen)
    assert probe(model, 40, 64).shared and probe(model, 9, 64).shared and len(seen) == tried


@pytest.mark.parametrize("architecture", KINDS)
def test_rounding_does_not_hide_it(architecture):
    support = probe(build(architecture).to(torch.bfloat16))
    assert support.beams is (CopiedBeams if architecture in COPIED else TreeBeams) and support.padding
    assert support.shared == (support.beams is TreeBeams)
    # Of layers that have learned little, what they ignore may be smaller than the rounding.
    assert architecture not in COPIED or probe(make_untrained(architecture)).beams is CopiedBeams


def make_untrained(architecture):
    model = build(architecture)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.div_(4)
    return model.to(torch.bfloat16)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3_5_text"])
def test_quantized_bases(architecture, bits, tmp_path):
    build(architecture).save_pretrained(tmp_path)
    quantization = lora_utils.quantization_config(AdapterFlags(use_qlora=bits == 4, load_in_8bit=bits == 8))
    support = probe(loading.load_base(str(tmp_path), quantization))
    assert support.beams is (CopiedBeams if architecture in COPIED else TreeBeams) and support.padding


def test_a_kernel_for_few_tokens_may_round_differently():
    model = build("qwen2").to(torch.bfloat16)
    torch.manual_seed(0)
    for layer in model.model.layers.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.forward = partial(multiply_as_4_bits_on_a_gpu, layer)
    model.is_quantized = True
    support = probe(model)
    assert support.beams is TreeBeams and support.padding and support.shared


def multiply_as_4_bits_on_a_gpu(layer, x):
    """On an H100, bitsandbytes multiplies up to 32 tokens of a small layer with a kernel of its own, whose weights are
    rounded differently."""
    rounded = layer.weight * (1 + 2**-7 * torch.randn_like(layer.weight))
    return torch.nn.functional.linear(x, rounded if x.numel() <= 32 * x.shape[-1] else layer.weight, layer.bias)


def test_layers_that_ignore_padding_get_one_prompt_at_a_time(monkeypatch):
    monkeypatch.setattr(modeling_bamba, "apply_mask_to_padding_states", lambda states, _mask: states)
    model = build("bamba")
    support = probe(model)
    assert support.beams is CopiedBeams and not support.padding and "one prompt at a time" in str(support)
    check_beams(model)
    check_logps(model, with_gradients=False)
    # Each process decodes single prompts, so that all run as many forward passes.
    ids, mask = prompts()
    lists = [row[present.bool()].tolist() for row, present in zip(ids, mask, strict=True)]
    batches = []
    model.register_forward_pre_hook(lambda _m, _a, kw: batches.append(len(kw["input_ids"])), with_kwargs=True)
    trie = Trie(SIDS, EOS)
    ranked = score_prompts(model, trie, lists, 0, 3, batch_size=3)
    assert batches.count(1) == 3 and set(batches) == {1, 3}  # a prompt at a time, then its three beams
    assert [SIDS[row[0][0]] for row in ranked] == [ranking[0][0] for ranking in exhaustive(model, ids, mask, SIDS)]


def test_a_cache_that_forgets_is_not_used(monkeypatch):
    monkeypatch.setattr(
        "minionerec.decoding.beams.select_rows", lambda cache, rows: cache.reorder_cache(torch.zeros_like(rows))
    )
    model = build("lfm2")
    assert probe(model).beams is RereadBeams
    check_beams(model)


def test_what_is_not_causal_is_refused():
    model = AutoModelForCausalLM.from_config(BertConfig(vocab_size=96, hidden_size=48, num_hidden_layers=1)).eval()
    ids, mask = prompts()
    with pytest.raises(InputError, match=r"decoding: BertLMHeadModel is not causal.*; choose another model") as refused:
        constrained_beam_search(model, ids, mask, Trie(SIDS, EOS), 2)
    assert len(refused.value.problems) == 1 and "\n" not in str(refused.value)
    broken = build("qwen2")
    broken.lm_head.forward = lambda _: None
    with pytest.raises(InputError, match=r"--base_model x: Qwen2ForCausalLM cannot be run: .*; choose another model"):
        probe(broken, name="--base_model x")


def test_the_first_process_decides(monkeypatch):
    answers = iter([True, True, True, True, False, True])  # reads, finite, causal, tells leaks; no tree mask, copies

    class Dist:
        is_available = is_initialized = staticmethod(lambda: True)

        @staticmethod
        def broadcast_object_list(decided, device):
            decided[0] = next(answers)

    monkeypatch.setattr(probing, "dist", Dist)
    model = build("qwen2")
    assert probe(model).beams is CopiedBeams and next(answers, None) is None


def test_weights_of_rwkv_stay_as_they_are(tmp_path):
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=96, hidden_size=64, num_hidden_layers=7, attention_hidden_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = loading.load_base(str(tmp_path))
    weights = copy.deepcopy(model.state_dict())
    assert probe(model.eval()).beams is RereadBeams
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_commands_refuse_what_cannot_be_decoded_before_they_train(files, checkpoint_of, tmp_path):
    bert = checkpoint_of("bert")
    for command, flags in (
        (sft.train, sft_flags(files, bert, str(tmp_path / "sft"))),
        (rl.train, rl_flags(files, bert, str(tmp_path / "rl"))),
        (evaluate.evaluate, evaluate_flags(files, str(tmp_path / "r.json"), base_model=bert, category="bolts")),
    ):
        with pytest.raises(InputError, match=rf"^--(base_model|model_path) {bert}: BertLMHeadModel is not causal"):
            command(**flags)
    assert not list(tmp_path.iterdir())


def test_commands_say_how_they_decode(files, checkpoint_of, tmp_path, capsys):
    lfm2 = checkpoint_of("lfm2", num_key_value_heads=2, block_ff_dim=64, layer_types=["conv", "full_attention"])
    line = "decoding: beams are copied with the cache: conv layers ignore a tree mask"
    sft.train(**sft_flags(files, lfm2, str(tmp_path / "sft"), sample=8))
    assert line in capsys.readouterr().out
    start = str(tmp_path / "sft" / "final_checkpoint")
    rl.train(**rl_flags(files, start, str(tmp_path / "rl"), test_during_training=False, sample_train=True))
    assert line + "; completions each repeat their prompt" in capsys.readouterr().out
    evaluate.evaluate(**evaluate_flags(files, str(tmp_path / "r.json"), base_model=start))
    assert line in capsys.readouterr().out

    qwen2 = checkpoint_of("qwen2", num_key_value_heads=2)
    sft.train(**sft_flags(files, qwen2, str(tmp_path / "other"), sample=8, tasks="sid_history_to_sid"))
    assert "decoding" not in capsys.readouterr().out
    shutil.rmtree(tmp_path / "rl")
    start = str(tmp_path / "other" / "final_checkpoint")
    rl.train(**rl_flags(files, start, str(tmp_path / "rl"), test_during_training=False, sample_train=True))
    shared = "decoding: beams share the prompt's cache under a tree mask; completions share a row with their prompt\n"
    assert shared in capsys.readouterr().out


def test_an_expert_that_rounding_exchanges_does_not_make_a_model_look_ahead(monkeypatch):
    """Scores that change with later tokens for one draw of tokens are the rounding's, for every draw the model's."""
    draws = []

    def later_than(limit):
        def is_causal(trial):
            draws.append(trial.prompts[0].tolist())
            return len(draws) > limit

        return is_causal

    monkeypatch.setattr(probing._Trial, "is_causal", later_than(2))
    assert probe(make_model()).beams
    assert len(draws) == 3 and draws[0] != draws[1] != draws[2]
    draws.clear()
    monkeypatch.setattr(probing._Trial, "is_causal", later_than(3))
    with pytest.raises(InputError, match="is not causal"):
        probe(make_model())
