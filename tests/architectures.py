"""Tiny models of the architectures in architectures.json, which are changes to a small configuration."""

import json
from pathlib import Path

import torch
from models import SMALL
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

CHANGES = json.loads((Path(__file__).parent / "architectures.json").read_text(encoding="utf-8"))
TEXT = {**SMALL, "head_dim": 16}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
# What is nested, which changes to a flat list cannot make, and what is big as it is.
WHOLE = {
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 96, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 64, "query_pre_attn_scalar": 16},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "qwen3_5": {
        "text_config": {**TEXT, **CHANGES["qwen3_5_text"]},
        "vision_config": {**VISION, "depth": 1, "num_heads": 2, "out_hidden_size": 64},
    },
    "kimi_linear": {
        **SMALL, "layer_types": ["linear_attention", "full_attention"], "linear_head_dim": 16, "linear_num_heads": 4,
        "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
        "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    },
}  # fmt: skip


def configuration(architecture: str):
    return CONFIG_MAPPING[architecture](**WHOLE.get(architecture) or {**SMALL, **CHANGES[architecture]})


def build(architecture: str):
    """A model in evaluation mode, whose predictions differ between tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(architecture)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4)
            elif name.endswith(".A"):  # Doge's, which starts at 0 and turns off the layer in front of it
                parameter.fill_(1.0)
    return model
