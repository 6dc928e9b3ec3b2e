"""What a constrained beam search holds next to the weights, and how many prompts fit into one."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MOST, ON_A_CPU = 256, 8  # prompts of a batch; more are no faster
SPARE = 0.1  # of a GPU's memory, for what the allocator cannot use and the prediction misses


def cache_gb(
    config: "PreTrainedConfig", rows: int, tokens: int, beams: int, completion_tokens: int, on_gpu: bool
) -> float:
    """Keys and values of the prompts and of the beams, and the widest activations of the prefill, in GB."""
    text = config.get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = 2 if on_gpu else 4
    cached = 2 * text.num_hidden_layers * heads * width * rows * (tokens + beams * completion_tokens)
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    return (cached + rows * tokens * (3 * inner + 4 * text.hidden_size)) * size / 1e9


def largest_batch(config: "PreTrainedConfig", tokens: int, beams: int, completion_tokens: int, free: float) -> int:
    """The largest power of two of prompts, 256 at most, of up to `tokens` tokens whose search is predicted to fit
    `free` GB of a GPU; 1 at least. Of the logits, two float32 copies are alive next to those of the head."""
    vocabulary, rows = config.get_text_config().vocab_size, MOST
    while rows > 1:
        logits = 3 * 4 * rows * beams * vocabulary / 1e9
        if cache_gb(config, rows, tokens, beams, completion_tokens, on_gpu=True) + logits <= (1 - SPARE) * free:
            break
        rows //= 2
    return rows
