"""A tiny catalogue, its files in the published layout, and a tiny base: made once, without a network."""

import gc
import json
import os
import tempfile
from functools import cache
from pathlib import Path

import pytest
from helpers import compile_templates_once, curves_undrawn, sft_flags, succeed, write_csv
from hypothesis import settings

from minionerec import plots
from minionerec.data.files import read_catalogue

# What is compared with plain twins is compared on the CPU. test_gpu.py starts processes that see the cards.
os.environ.setdefault("MINIONEREC_CARDS", os.environ.get("CUDA_VISIBLE_DEVICES", "all"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="minionerec-cache-")
os.environ["HF_HUB_OFFLINE"] = "1"
# Generated input is the same in every run.
settings.register_profile("project", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("project")
pytest.register_assert_rewrite("plain", "processes", "raw_bolts", "raw_files", "recommended", "recorded", "served")


def pytest_configure(config) -> None:
    """What our own calls use that is about to go away is an error."""
    compile_templates_once()
    for category in ("DeprecationWarning", "FutureWarning", "PendingDeprecationWarning"):
        config.addinivalue_line("filterwarnings", f"error::{category}")
    # PEFT 0.21 asks for it while it wraps a model; TRL 1.16 calls these around generation.
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
    for method in ("enable", "disable"):
        ignored = f"ignore:`gradient_checkpointing_{method}` is deprecated:FutureWarning"
        config.addinivalue_line("filterwarnings", ignored)


def pytest_collection_finish() -> None:
    """Leaves what the libraries hold out of garbage collection: every training asks for one, which took half a second
    of the two that it takes."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def undrawn(monkeypatch) -> None:
    """A run that a test makes draws no curves. Those of wider fixtures draw theirs."""
    monkeypatch.setattr(plots, "plot_curves", curves_undrawn)


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """Paths of train, valid, test, index, item and info files over 40 items; items 0 and 1 share a SID."""
    folder = tmp_path_factory.mktemp("data")
    index = {str(i): [f"<a_{i % 5}>", f"<b_{i // 5}>", f"<c_{i % 3}>"] for i in range(40)}
    index["1"] = index["0"]
    items = {
        str(i): {"title": f'Bolt {i}, "M{i % 7}" d\'Été {{x}}', "description": f"['A bolt.', 'Number {i}.']"}
        for i in range(40)
    }
    rows = [[(u * 7 + step * 3) % 40 for step in range(2 + u % 5)] for u in range(60)]
    paths = {}
    for split, part in (("train", rows[:40]), ("valid", rows[40:50]), ("test", rows[50:])):
        paths[split] = str(folder / f"{split}.csv")
        write_csv(Path(paths[split]), part, index, items)
    for name, data in (("index", index), ("item", items)):
        paths[name] = str(folder / f"{name}.json")
        Path(paths[name]).write_text(json.dumps(data), encoding="utf-8")
    paths["info"] = str(folder / "info.txt")
    lines = [f"{''.join(index[i])}\t{items[i]['title']}\t{i}\n" for i in index]
    Path(paths["info"]).write_text("".join(lines), encoding="utf-8")
    return paths


@pytest.fixture(scope="session")
def base(files, tmp_path_factory) -> str:
    """A tiny Qwen2 base with its own tokenizer."""
    folder = str(tmp_path_factory.mktemp("base") / "base")
    succeed(
        "scripts/make_base.py",
        item_meta_path=files["item"],
        output_dir=folder,
        vocab_size=400,
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
    )
    return folder


@pytest.fixture(scope="session")
def sft_run(files, base, tmp_path_factory):
    """`sft_run(method)`: the folder of a run of sft.py that moved far from its base, made once, for tests to read."""

    @cache
    def folder(method: str) -> Path:
        output = tmp_path_factory.mktemp("sft") / method
        flags = {"full": {}, "lora": {"use_lora": True}, "qlora": {"use_qlora": True}}[method]
        result = succeed("sft.py", **sft_flags(files, base, output, **flags, learning_rate=1e-2))
        assert "deprecated" not in result.stderr
        return output

    return folder


@pytest.fixture(scope="session")
def checkpoint(sft_run) -> str:
    """The final checkpoint of the LoRA run of `sft_run`."""
    return str(sft_run("lora") / "final_checkpoint")


@pytest.fixture(scope="session")
def checkpoint_of(files, base, tmp_path_factory):
    """Makes a whole checkpoint of any architecture with the tests' tokenizer and SID tokens."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def make(model_type: str, **changes) -> str:
        folder = str(tmp_path_factory.mktemp(model_type))
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_tokens(read_catalogue(files["index"], files["item"]).sid_tokens)
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = AutoConfig.for_model(model_type, **{**sizes, "vocab_size": len(tokenizer), **changes})
        config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def saved_base(tmp_path_factory) -> dict[bool, str]:
    """Folders of a tied and an untied base."""
    from models import make_model

    folders = {}
    for tied in (True, False):
        folders[tied] = str(tmp_path_factory.mktemp(f"tied_{tied}"))
        make_model(tie_word_embeddings=tied, scale=2.0).save_pretrained(folders[tied])
    return folders
