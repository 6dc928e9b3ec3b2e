"""Beams, samples and RL's log-probabilities of every architecture, against scoring one by one: no cache, no padding."""

import json
from pathlib import Path

import pytest
import torch
from test_logprobs import gradients, one_by_one
from test_sid import EOS, exhaustive, sids_of
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from minionerec.decoding.beam_search import constrained_beam_search, constrained_sample
from minionerec.decoding.beams import CopiedBeams, RereadBeams, TreeBeams
from minionerec.decoding.probe import may_share_rows, prove
from minionerec.decoding.trie import Trie
from minionerec.training.logprobs import completion_logps

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
CHANGES = json.loads((Path(__file__).parent / "architectures.json").read_text(encoding="utf-8"))
# Nested configurations, which a flat list of changes cannot make.
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
NESTED = {
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 1024,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3": {
        "text_config": {
            **SMALL, "head_dim": 16, "num_hidden_layers": 4, "sliding_window": 20, "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4, "boi_token_index": 93, "eoi_token_index": 94, "image_token_index": 95,
    },
    "qwen3_5": {
        "text_config": {**SMALL, **DELTA, "head_dim": 16, "num_hidden_layers": 4},
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        "image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 92, "vision_end_token_id": 93,
    },
}  # fmt: skip
SPARSE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
MORE = {
    "deepseek_v2": {
        **LATENT, "q_lora_rank": 16, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16,
    },
    "falcon_mamba": {"state_size": 8},
    "gemma3n_text": {
        "head_dim": 16, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 20, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 96, "intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "head_dim": 16, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 20, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96,
        "num_kv_shared_layers": 0,
    },
    "jamba": {
        "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 8,
    },
    "kimi_linear": {
        **LATENT, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
        "linear_head_dim": 16, "linear_num_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "lfm2_moe": {**SPARSE, "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "olmo": {},
    "olmo3": {"sliding_window": 20, "num_hidden_layers": 4},
    "zamba2": {
        "num_key_value_heads": 4, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16,
    },
}  # fmt: skip
CHANGES.update(MORE)
# A window that prompts of these tests are longer than; one that any row is, one that the probe's rows may be, and one
# that prompts are shorter than and rows with all their beams are not.
WINDOWS = {
    "cohere2": {"sliding_window": 20},
    "exaone4": {"sliding_window": 20},
    "gemma2": {"sliding_window": 20},
    "gemma3_text": {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neo": {"window_size": 20},
    "gpt_oss": {"sliding_window": 20},
    "llama4_text": {"attention_chunk_size": 20},
    "ministral": {"sliding_window": 20},
    "mistral": {"sliding_window": 20},
    "modernbert-decoder": {"local_attention": 20},
    "phi3": {"sliding_window": 20},
    "qwen2": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    "recurrent_gemma": {"attention_window_size": 20},
    "starcoder2": {"sliding_window": 20},
}  # fmt: skip
NARROW = {
    "gemma2": {"sliding_window": 4},
    "gpt_neo": {"window_size": 4},
    "llama4_text": {"attention_chunk_size": 4},
    "mistral": {"sliding_window": 4},
}
BETWEEN = {
    "gpt_neo": {"window_size": 14},
    "llama4_text": {"attention_chunk_size": 12},
    "mistral": {"sliding_window": 12},
}
WIDE = {
    "gemma2": {"sliding_window": 50},
    "gpt_neo": {"window_size": 50},
    "llama4_text": {"attention_chunk_size": 50},
    "mistral": {"sliding_window": 50},
}

# Layers that take no tree mask, by what they are; everything else shares the prompt's cache.
RECURRENT = {
    "bamba", "granitemoehybrid", "jamba", "kimi_linear", "minimax", "olmo_hybrid", "qwen3_5", "qwen3_5_moe_text",
    "qwen3_5_text", "qwen3_next", "zamba2",
}  # fmt: skip
COPIED = {
    **dict.fromkeys(RECURRENT, "linear_attention layers"),
    "falcon_h1": "hybrid layers",
    "lfm2": "conv layers",
    "lfm2_moe": "conv layers",
    "bloom": "bloom layers",  # ALiBi
    "gpt_neo": "gpt_neo layers",  # its window counts places in the row
    "mpt": "mpt layers",  # ALiBi
}
REREAD = {"falcon_mamba", "mamba", "mamba2", "recurrent_gemma", "rwkv"}
SIDS = [(1,), (1, 2), (3, 4), (3, 4, 5), (3, 6, 7), (8, 2)]
LENGTHS = (5, 31, 42)  # of prompts in one batch


def build(architecture: str, **changes):
    """A tiny model in evaluation mode, whose predictions differ between tokens."""
    torch.manual_seed(0)
    if architecture in NESTED:
        config = CONFIG_MAPPING[architecture](**NESTED[architecture])
    else:
        config = CONFIG_MAPPING[architecture](**{**SMALL, **CHANGES[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def prompts(lengths=LENGTHS) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths, padded on the left."""
    ids = torch.randint(1, 92, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return ids * mask, mask


def check_beams(model):
    """Beams are scored and ranked as one by one, and samples are SIDs of the catalogue."""
    ids, mask = prompts()
    trie = Trie(SIDS, EOS)
    rows, scores = constrained_beam_search(model, ids, mask, trie, 4 * len(SIDS))
    expected = exhaustive(model, ids, mask, SIDS)
    torch.testing.assert_close(scores, torch.tensor([[s for _, s in r] for r in expected]), atol=1e-4, rtol=1e-4)
    assert sids_of(trie, rows) == [[sid for sid, _ in ranking] for ranking in expected]
    few, _ = constrained_beam_search(model, ids, mask, Trie(SIDS, EOS), 3)  # no room for all: beams die
    assert few.shape == (3, 3) and all(len(set(row)) == 3 for row in few.tolist())
    drawn = constrained_sample(model, ids, mask, trie, 7)
    assert drawn.shape == (3, 7) and {sid for row in sids_of(trie, drawn) for sid in row} <= set(SIDS)


def completions():
    """Two prompts, the shorter one first, with three completions each."""
    ids, mask = (tensor[:2].repeat_interleave(3, dim=0) for tensor in prompts(LENGTHS[:2]))
    answers = torch.tensor([[1, 0, 0], [3, 4, 0], [8, 2, 0], [3, 6, 7], [1, 2, 0], [3, 4, 5]])
    present = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]])
    return ids, mask, answers, present


def check_logps(model, with_gradients: bool):
    inputs = completions()
    with torch.set_grad_enabled(with_gradients):
        logps, entropies = completion_logps(model, *inputs)
        expected, expected_entropies = one_by_one(model, *inputs)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(entropies, expected_entropies, atol=1e-3, rtol=0)
    if with_gradients:
        found, wanted = gradients(model, logps), gradients(model, expected)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = max(1, gradient.abs().max().item())
            torch.testing.assert_close(found[name], gradient, atol=1e-4 * scale, rtol=1e-3)


@pytest.mark.parametrize("architecture", CHANGES)
def test_every_architecture_is_decoded_exactly(architecture):
    model = build(architecture)
    proof = prove(model)
    if architecture in REREAD:
        assert proof.beams is RereadBeams and not proof.padding
    else:
        assert proof.beams is (CopiedBeams if architecture in COPIED else TreeBeams) and proof.padding
    assert proof.shared == (proof.beams is TreeBeams)
    assert COPIED.get(architecture, "") in proof.why and bool(proof.why) != proof.shared
    assert may_share_rows(model.config) == proof.shared  # what the dry run expects, without weights
    check_beams(model)
    check_logps(
        model, with_gradients=architecture in ("qwen3", "gemma3", "gpt2", "qwen3_5_text", "lfm2", "mpt", "mamba")
    )


CASES = [(name, changes) for windows in (WINDOWS, NARROW, BETWEEN, WIDE) for name, changes in windows.items()]


@pytest.mark.parametrize(("architecture", "window"), CASES)
def test_a_window_is_kept_to_whatever_its_width(architecture, window):
    model = build(architecture, **window)
    check_beams(model)
    check_logps(model, with_gradients=architecture == "gpt_oss")
    longest = prove(model, LENGTHS[-1], LENGTHS[-1] + 24)
    kept = {"gpt_neo": CopiedBeams, "recurrent_gemma": RereadBeams}
    assert longest.beams is kept.get(architecture, TreeBeams)
