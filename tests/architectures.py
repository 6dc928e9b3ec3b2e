"""Tiny models of every architecture: those of architectures.json, which are changes to a small configuration, and more
that only decoding is tested on."""

import json
from pathlib import Path

import torch
from models import SMALL
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

CHANGES = json.loads((Path(__file__).parent / "architectures.json").read_text(encoding="utf-8"))
LONGER = {**SMALL, "max_position_embeddings": 1024}
TEXT = {**LONGER, "head_dim": 16}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
}  # fmt: skip
SLIDING = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"]}
# What is nested, which changes to a flat list cannot make, and what is big as it is.
WHOLE = {
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 1024,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3": {
        "text_config": {**TEXT, **SLIDING, "query_pre_attn_scalar": 16},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4, "boi_token_index": 93, "eoi_token_index": 94, "image_token_index": 95,
    },
    "kimi_linear": {
        **LONGER, **LATENT, "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16,
        "linear_num_heads": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
    "qwen3_5": {
        "text_config": {**TEXT, **CHANGES["qwen3_5_text"]},
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
        "image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 92, "vision_end_token_id": 93,
    },
}  # fmt: skip
DECODED_TOO = {
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
    "lfm2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
    },
    "olmo": {},
    "olmo3": {"sliding_window": 20, "num_hidden_layers": 4},
    "zamba2": {
        "num_key_value_heads": 4, "num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2,
        "mamba_d_state": 16, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 16,
    },
}  # fmt: skip
DECODED = {**CHANGES, **DECODED_TOO}

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


def configuration(architecture: str, **changes):
    return CONFIG_MAPPING[architecture](**(WHOLE.get(architecture) or {**LONGER, **DECODED[architecture], **changes}))


def build(architecture: str, **changes):
    """A model in evaluation mode, whose predictions differ between tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(architecture, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            elif name.endswith(".A"):  # Doge's, which starts at 0 and turns off the layer in front of it
                parameter.fill_(1.0)
    return model
