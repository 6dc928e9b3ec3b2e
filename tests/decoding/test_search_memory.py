"""What a search holds, and how many prompts of it fit."""

import pytest
import torch
from architectures import configuration
from models import config_of
from transformers import AutoModelForCausalLM, Gemma4TextConfig, MambaConfig

from minionerec import Ranker
from minionerec.decoding.search_memory import cache_gb, feed_forward_width, largest_batch, search_gb


def test_the_cache_of_the_beams():
    config = config_of("qwen2")  # 2 layers, 2 heads of 16 for keys and values
    per_token = 2 * 2 * 2 * 16 * 2
    without = cache_gb(config, 3, 100, 0, 0, True)
    assert cache_gb(config, 3, 100, 20, 4, True) == pytest.approx(without + 3 * 20 * 4 * per_token / 1e9)


def test_the_layers_of_a_cache_may_differ():
    """Those of Gemma 4 in the width of their heads, those of Gemma 3n in that of their feed-forward parts."""
    config = configuration("gemma4_text", global_head_dim=32)
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_config(config).eval()(torch.ones(3, 10, dtype=torch.long)).past_key_values
    held = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    without = cache_gb(config, 3, 100, 0, 0, False)
    assert cache_gb(config, 3, 100, 2, 5, False) == pytest.approx(without + held / 1e9)
    assert largest_batch(Gemma4TextConfig(), 512, 20, 4, 8.0) > 1
    assert feed_forward_width(configuration("gemma3n_text", intermediate_size=[64, 128, 256, 128])) == 256


def test_a_cache_that_beams_cannot_share_is_copied():
    config = config_of("qwen2")
    copied = config_of("qwen2", layer_types=["linear_attention", "full_attention"])
    per_token = (cache_gb(config, 3, 100, 2, 0, True) - cache_gb(config, 3, 0, 2, 0, True)) / 100
    more = cache_gb(copied, 3, 100, 20, 4, True) - cache_gb(config, 3, 100, 20, 4, True)
    assert 0 < more < 19 * 100 * per_token and more == pytest.approx(3 * 19 * 100 * 2 * 2 * 2 * 16 * 2 / 1e9)


def test_a_model_without_attention_reads_prompts_again():
    config = MambaConfig()
    assert cache_gb(config, 1, 100, 20, 4, True) == pytest.approx(20 * cache_gb(config, 1, 100, 1, 4, True))
    assert largest_batch(config, 512, 20, 4, 8.0) > 1


def test_the_logits_of_beams_count():
    config = config_of("qwen2", vocab_size=150_000)
    found = search_gb(config, 32, 100, 20, 4, True) - cache_gb(config, 32, 100, 20, 4, True)
    assert found == pytest.approx(3 * 4 * 32 * 20 * 150_000 / 1e9)


def test_a_batch_of_prompts_is_as_large_as_the_memory():
    config = config_of("qwen2", vocab_size=150_000, hidden_size=1024)
    found = [largest_batch(config, 512, 50, 4, free) for free in (0.0, 1.0, 8.0, 80.0, 1e6)]
    assert found[0] == 1 and found[-1] == 256 and found == sorted(found) and found[2] == 64
    # Of every one but the first, the logits of the beams alone need most.
    assert all(rows * 50 * 150_000 * 12 <= 0.9e9 * free for rows, free in zip(found[1:], (1, 8, 80), strict=False))


def test_a_cpu_ranks_eight_prompts_at_a_time(files, sft_run):
    checkpoint = sft_run("lora") / "final_checkpoint"
    assert Ranker.load(checkpoint, info_file=files["info"], batch_size="auto").batch_size == 8
