"""What a constrained beam search holds next to the weights, and how many prompts fit into one."""

from typing import TYPE_CHECKING

from minionerec.decoding.probe import may_share_rows

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST, ON_A_CPU = 256, 8  # prompts of a batch; more are no faster
SPARE = 0.1  # of a GPU's memory, for what the allocator cannot use and the prediction misses


def search_gb(
    config: "PreTrainedConfig", rows: int, tokens: int, beams: int, completion_tokens: int, on_gpu: bool
) -> float:
    """What a search holds, in GB: `cache_gb`, and the logits of the beams. Of these a GPU has two float32 copies next
    to those of the head."""
    logits = (3 if on_gpu else 1) * 4 * rows * beams * config.get_text_config().vocab_size
    return cache_gb(config, rows, tokens, beams, completion_tokens, on_gpu) + logits / 1e9


def cache_gb(
    config: "PreTrainedConfig", rows: int, tokens: int, beams: int, completion_tokens: int, on_gpu: bool
) -> float:
    """Keys and values of the prompts and of the beams, and the widest activations of the prefill, in GB.

    Where beams cannot share the prompt's cache, each has a copy of it; recurrent layers count as attention there. A
    model without attention reads the prompt again for every beam.
    """
    text = config.get_text_config()
    keys_and_values = sum(map(_keys_and_values, _layers(text)))
    copies = 1 if may_share_rows(config) else beams
    cached = keys_and_values * rows * (copies * tokens + beams * completion_tokens)
    read = rows * tokens * (1 if keys_and_values else copies)
    return (cached + read * (3 * feed_forward_width(config) + 4 * text.hidden_size)) * (2 if on_gpu else 4) / 1e9


def feed_forward_width(config: "PreTrainedConfig") -> int:
    """That of the widest layer."""
    found = []
    for layer in _layers(config.get_text_config()):
        width = getattr(layer, "intermediate_size", None) or 4 * layer.hidden_size
        found.append(width if isinstance(width, int) else max(width))  # Gemma 3n has a list of all layers
    return max(found)


def _layers(text: "PreTrainedConfig") -> list["PreTrainedConfig"]:
    """The configuration of every layer: they may differ in their heads and widths, as those of Gemma 4 do. Older
    releases of transformers have one for all."""
    return list(getattr(text, "per_layer_config", None) or [text] * text.num_hidden_layers)


def _keys_and_values(layer: "PreTrainedConfig") -> int:
    """How many values a layer keeps of a token; 0 without attention."""
    heads = getattr(layer, "num_attention_heads", None)
    if not heads:
        return 0
    width = getattr(layer, "head_dim", None) or layer.hidden_size // heads
    return 2 * width * (getattr(layer, "num_key_value_heads", None) or heads)


def largest_batch(config: "PreTrainedConfig", tokens: int, beams: int, completion_tokens: int, free: float) -> int:
    """The largest power of two of prompts, 256 at most, of up to `tokens` tokens whose search is predicted to fit
    `free` GB of a GPU; 1 at least."""
    rows = MOST
    while rows > 1:
        if search_gb(config, rows, tokens, beams, completion_tokens, on_gpu=True) <= (1 - SPARE) * free:
            break
        rows //= 2
    return rows
