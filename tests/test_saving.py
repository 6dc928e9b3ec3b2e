"""The files of a checkpoint: readable by other users and by older releases."""

import json
from pathlib import Path

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
