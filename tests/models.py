"""Tiny random models of the architectures the project supports."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lora_utils
from minionerec.dryrun.memory import Prediction, Step, predict
from minionerec.flags import AdapterFlags

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 0}
ARCHITECTURES = {
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 16},
    "llama": SMALL,
    "mistral": SMALL,
    "gemma2": {**SMALL, "head_dim": 16},
    "phi3": SMALL,
    "gpt2": GPT2,
}


def config_of(architecture: str, **changes):
    return CONFIG_MAPPING[architecture](**{**ARCHITECTURES[architecture], **changes})


def make_model(architecture: str = "qwen2", scale: float = 8.0, **changes):
    """A model in evaluation mode; `scale` spreads its weights, so that its predictions differ between tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(architecture, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def predicted(
    config, ids: list[int], step: Step, method: str = "full", on_gpu: bool = False, vocabulary: int = 96,
    reference_copy: bool = False, **flags,
) -> Prediction:  # fmt: skip
    """The predicted memory of a training by a method, with other adapter flags."""
    chosen = AdapterFlags(use_lora=method == "lora", use_qlora=method == "qlora", **flags)
    return predict(config, vocabulary, ids, step, chosen, lora_utils.adapt, on_gpu, reference_copy)
