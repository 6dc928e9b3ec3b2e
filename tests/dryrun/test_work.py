"""The time of a step, as the dry run estimates it, against counts of kernels and what a card has shown."""

from dataclasses import replace

import pytest
from models import config_of
from transformers import Qwen2Config

import lora_utils
from minionerec.cards import find_card
from minionerec.dryrun import report, work
from minionerec.dryrun.memory import predict
from minionerec.dryrun.passes import Step, Work
from minionerec.flags import AdapterFlags
from rl import RLFlags

# The shape of Qwen2-0.5B, with its SID tokens.
HALF = {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2}
HALF |= {"intermediate_size": 4864, "vocab_size": 152225}
METHODS = {"full": {}, "lora": {"use_lora": True}, "lora8": {"use_lora": True, "load_in_8bit": True}}
METHODS["qlora"] = {"use_qlora": True}


@pytest.mark.parametrize(
    ("method", "seconds"), [("full", 0.11), ("lora", 0.18), ("lora8", 0.26), ("qlora", 0.27)]
)  # of 8 rows of 512 tokens on an H100, by code that took the paths of a CPU: benchmarks/LOG.md, section 8
def test_a_step_of_sft_is_estimated_within_30_percent(method, seconds):
    flags, config = AdapterFlags(**METHODS[method]), Qwen2Config(**HALF, tie_word_embeddings=True)
    step = Step(8, 512, 40, accumulate=False)
    found = predict(config, config.vocab_size, list(range(151665, 152225)), step, flags, lora_utils.adapt, True)
    of_bits = work.DEQUANTIZE.get(flags.bits, (0, 0.0))
    stored = Work(0, of_bits[1] * 358e6, of_bits[0] * 168)
    of_step = found.layers + found.head + stored + work.update(found.trainable)
    assert work.on_card(of_step, find_card("H100")).seconds == pytest.approx(seconds, rel=0.3)


def test_a_step_of_rl_is_estimated_within_30_percent():
    """10 prompts of 200 tokens, 16 completions each, in passes of 32, took 1.50 s on an H100."""
    shape = {**HALF, "num_key_value_heads": 7, "vocab_size": 151936}
    flags = RLFlags(use_lora=True, lora_dropout=0.0, num_generations=16, train_batch_size=160, beta=0.04)
    inputs = report.Inputs(Qwen2Config(**shape), range(shape["vocab_size"]), [5], None, None, lora_utils.adapt)
    step = report._rl_step(replace(flags, train_batch_size=32), inputs.config, 200, 4)
    found = inputs.predict(step, flags, on_gpu=True)
    of_step = report._rl_work(flags, found, step, 5, 200, 4, 1e9)
    assert of_step.kernels == pytest.approx(39_210, rel=0.2)  # as counted then
    assert work.on_card(of_step, find_card("H100")).seconds == pytest.approx(1.50, rel=0.3)


@pytest.mark.parametrize(("way", "kernels", "seconds"), [("PEFT", 6_107, 0.18), ("the original's RL", 45_207, 1.52)])
def test_what_others_start_is_estimated_within_30_percent(way, kernels, seconds):
    assert work.on_card(Work(0, 0, kernels), find_card("H100")).seconds == pytest.approx(seconds, rel=0.3)


@pytest.mark.parametrize(("method", "most"), [("full", 130), ("lora", 85), ("qlora", 105)])
def test_the_kernels_of_a_gpu_are_counted_without_one(method, most):
    """`benchmarks/launches.py` counts 128, 78.4 and 87 a layer on real tensors, with token trees."""
    config, layers = config_of("qwen2", num_hidden_layers=24, vocab_size=1024), 24
    arguments = (config, 1024, [90, 91], Step(2, 32, 8), AdapterFlags(**METHODS[method]), lora_utils.adapt)
    found = work.count(*arguments)
    plain = predict(*arguments, True)
    assert 0.75 * most < found.layers.kernels / layers < most
    assert found.layers.kernels < (1.0 if method == "full" else 0.5) * plain.layers.kernels
    # The zeros of a group's block-diagonal factor are multiplied too.
    assert plain.layers.flops <= found.layers.flops < 1.2 * plain.layers.flops
    assert 0 < found.forward.kernels < 0.5 * found.layers.kernels


def test_the_slowest_of_three_counts():
    card = find_card("A100 80GB")
    for work_done, part in ((Work(312e12, 0, 0), 1 / 0.6), (Work(0, 2039e9, 0), 1 / 0.8), (Work(0, 0, 1e6), 35)):
        found = work.on_card(work_done, card)
        assert found.seconds == pytest.approx(part)
