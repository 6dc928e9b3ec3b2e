"""The files of a checkpoint: readable by other users and by older releases."""

import json
from pathlib import Path

import pytest

from minionerec.saving import make_portable


def test_all_files_of_a_checkpoint_are_readable_alike(sft_run, base):
    output = sft_run("lora")
    folders = [output / "final_checkpoint", *output.glob("checkpoint-*"), Path(base)]
    modes = {file.name: file.stat().st_mode for folder in folders for file in folder.iterdir()}
    assert len(set(modes.values())) == 1 and any(name.endswith(".safetensors") for name in modes), modes


def test_files_that_transformers_4_reads(tmp_path):
    rope = {"rope_theta": 1e6, "rope_type": "llama3", "factor": 8.0}
    (tmp_path / "config.json").write_text(json.dumps({"dtype": "bfloat16", "rope_parameters": rope}))
    tokenizer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<x>"], "is_local": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    make_portable(str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["rope_theta"] == 1e6
    assert config["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert config["rope_parameters"] == rope
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<x>"],
    }


FULL, SLIDING = {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0}, {"rope_theta": 2e4, "rope_type": "default"}
BY_KIND = {"full_attention": FULL, "sliding_attention": SLIDING}
OF_HALF = {"rope_theta": 2e4, "rope_type": "default", "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("config", "older"),
    [
        ({"rope_parameters": OF_HALF}, {"rope_theta": 2e4, "rope_scaling": None, "partial_rotary_factor": 0.5}),
        ({"rope_parameters": {**FULL, "partial_rotary_factor": 0.4}}, {"partial_rotary_factor": 0.4}),
        ({"rope_parameters": BY_KIND}, {"rope_theta": 1e6, "rope_local_base_freq": 2e4}),
        ({"rope_parameters": BY_KIND}, {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        (
            {"model_type": "modernbert-decoder", "rope_parameters": BY_KIND},
            {"global_rope_theta": 1e6, "local_rope_theta": 2e4},
        ),
        ({"model_type": "gpt_neox", "rope_parameters": OF_HALF}, {"rotary_pct": 0.5, "rotary_emb_base": 2e4}),
        ({"num_local_experts": 8}, {"num_experts": 8}),
        ({"num_local_experts": 8, "num_experts": 2}, {"num_experts": 2}),
        ({"rope_parameters": {"full_attention": FULL, "sliding_attention": None}}, {"rope_theta": 1e6}),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_transformers_4_calls_otherwise(tmp_path, config, older, nested):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config} if nested else config))
    make_portable(str(tmp_path))
    written = json.loads((tmp_path / "config.json").read_text())
    written = written["text_config"] if nested else written
    assert {name: written[name] for name in older} == older
    assert {name: written[name] for name in config} == config
