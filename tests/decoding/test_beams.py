"""Beams, samples and RL's log-probabilities of every architecture, against scoring one by one: no cache, no padding."""

import pytest
from architectures import COPIED, DECODED, REREAD, build
from plain import LENGTHS, check_beams, check_logps

from minionerec.decoding.beams import CopiedBeams, RereadBeams, TreeBeams
from minionerec.decoding.probe import may_share_rows, probe

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


@pytest.mark.parametrize("architecture", DECODED)
def test_every_architecture_is_decoded_exactly(architecture):
    model = build(architecture)
    support = probe(model)
    if architecture in REREAD:
        assert support.beams is RereadBeams and not support.padding
    else:
        assert support.beams is (CopiedBeams if architecture in COPIED else TreeBeams) and support.padding
    assert support.shared == (support.beams is TreeBeams)
    assert COPIED.get(architecture, "") in support.why and bool(support.why) != support.shared
    assert may_share_rows(model.config) == support.shared  # what the dry run expects, without weights
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
    longest = probe(model, LENGTHS[-1], LENGTHS[-1] + 24)
    kept = {"gpt_neo": CopiedBeams, "recurrent_gemma": RereadBeams}
    assert longest.beams is kept.get(architecture, TreeBeams)
