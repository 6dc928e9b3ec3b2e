"""What a search holds, and how many prompts of it fit."""

import pytest
from models import config_of

from minionerec import Ranker
from minionerec.decoding.search_memory import cache_gb, largest_batch


def test_the_cache_of_the_beams():
    config = config_of("qwen2")  # 2 layers, 2 heads of 16 for keys and values
    per_token = 2 * 2 * 2 * 16 * 2
    without = cache_gb(config, 3, 100, 0, 0, True)
    assert cache_gb(config, 3, 100, 20, 4, True) == pytest.approx(without + 3 * 20 * 4 * per_token / 1e9)


def test_a_batch_of_prompts_is_as_large_as_the_memory():
    config = config_of("qwen2", vocab_size=150_000, hidden_size=1024)
    found = [largest_batch(config, 512, 50, 4, free) for free in (0.0, 1.0, 8.0, 80.0, 1e6)]
    assert found[0] == 1 and found[-1] == 256 and found == sorted(found) and found[2] == 64
    # Of every one but the first, the logits of the beams alone need most.
    assert all(rows * 50 * 150_000 * 12 <= 0.9e9 * free for rows, free in zip(found[1:], (1, 8, 80), strict=False))


def test_a_cpu_ranks_eight_prompts_at_a_time(files, sft_run):
    checkpoint = sft_run("lora") / "final_checkpoint"
    assert Ranker.load(checkpoint, info_file=files["info"], batch_size="auto").batch_size == 8
