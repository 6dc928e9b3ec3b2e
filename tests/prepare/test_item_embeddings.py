"""Embeddings of items: of words, of a model, or a file of the user."""

import json
import shutil

import numpy as np
import pytest
from raw_bolts import flags_of, path_of, refused

from minionerec.errors import InputError
from minionerec.prepare import item_embeddings, semantic_ids
from minionerec.prepare.item_embeddings import TextModel
from scripts.prepare_data import prepare_data

WORDS = ["steel", "bolt", "nylon", "rope", "glass", "beaker", "valve", "tape", "saw", "blade"]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 4)) for _ in range(300)] + ["M3 螺丝刀", "M4 螺丝刀", "", "🔩"]


def test_text_embeddings_know_words_and_neighbouring_characters(texts, tmp_path):
    model = TextModel.fit(texts, seed=0)
    assert {"steel", "螺丝", "丝刀"} <= set(model.words) and "螺丝刀" not in model.words
    embeddings = model.embed(texts)
    assert embeddings.dtype == np.float32 and len(embeddings) == len(texts)
    lengths = np.linalg.norm(embeddings, axis=1)
    np.testing.assert_allclose(lengths[:302], 1, rtol=1e-5)
    assert (lengths[302:] == 0).all()
    assert embeddings[300] @ embeddings[301] > 0.99 and abs(embeddings[300] @ embeddings[0]) < 0.1
    # The same from the file, also for texts that come later.
    model.save(str(tmp_path / "m.safetensors"))
    np.testing.assert_array_equal(
        TextModel.load(str(tmp_path / "m.safetensors")).embed(texts[:5]), model.embed(texts[:5])
    )
    assert (tmp_path / "m.safetensors").stat().st_mode & 0o044  # others may read it
    assert np.linalg.norm(model.embed(["a saw that nobody knew"])) == pytest.approx(1)


def test_many_words_are_reduced():
    rng = np.random.default_rng(0)
    words = [f"word{i}" for i in range(400)]
    model = TextModel.fit([" ".join(rng.choice(words, 8)) for _ in range(500)], seed=0)
    assert model.components.shape == (item_embeddings.DIMENSIONS, len(model.words))
    with pytest.raises(InputError, match="no word occurs in two titles"):
        TextModel.fit(["one", "two"], seed=0)


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    for load in (TextModel.load, semantic_ids.load_codebooks):
        with pytest.raises(InputError, match="cannot be read"):
            load(str(tmp_path / "x"))
    np.save(tmp_path / "good.npy", np.eye(3, dtype=np.float64))
    matrix = item_embeddings.open_embeddings(str(tmp_path / "good.npy"))
    assert item_embeddings.rows_of_embeddings("f", matrix, 3, [2, 0]).tolist() == [[0, 0, 1], [1, 0, 0]]
    with pytest.raises(InputError, match="has 3 rows, the items file 4"):
        item_embeddings.rows_of_embeddings("f", matrix, 4, [0])
    for value in (np.nan, -np.inf, 1e25):
        with pytest.raises(
            InputError, match=r"row 2: contains NaN or infinity, or a value above 1e\+15 \(1 such rows\)"
        ):
            item_embeddings.rows_of_embeddings("f", np.array([[1.0], [value]]), 2, [0, 1])
    for bad in (np.array([1.0]), np.array([["a"]]), np.array([[None]], object), np.empty((2, 0))):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(InputError, match=r"--embeddings .*bad.npy: cannot be read"):
            item_embeddings.open_embeddings(str(tmp_path / "bad.npy"))


@pytest.mark.parametrize("kind", ["gpt_neox", "bert", "t5"])
def test_a_model_embeds_by_the_mean_of_its_last_states(tmp_path, kind):
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CONFIG_MAPPING, AutoModel, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    size = {"vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    size |= {"intermediate_size": 16, "d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "d_ff": 16}
    size |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = AutoModel.from_config(CONFIG_MAPPING[kind](**size)).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    asked = ["steel bolt", "", "rope", "glass beaker valve tape saw"] * 5
    found = item_embeddings.embed_with_model(str(tmp_path), asked)
    encoder = model.get_encoder() if kind == "t5" else model
    for text, embedding in zip(asked, found, strict=True):
        ids = torch.tensor([[1 + WORDS.index(word) for word in text.split()]])
        if text:
            expected = encoder(input_ids=ids).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(embedding, expected.detach().numpy(), atol=1e-5)
        else:
            assert np.isfinite(embedding).all()
    with pytest.raises(InputError, match=r"--encoder .*nowhere: cannot be loaded"):
        item_embeddings.embed_with_model(str(tmp_path / "nowhere"), ["a"])
    shutil.copytree(tmp_path, tmp_path / "cut", ignore=shutil.ignore_patterns("*.safetensors"))
    for content in (b"", b"PK\x03\x04 the start of a zip file"):
        (tmp_path / "cut" / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(InputError, match=r"--encoder .*cut: cannot be loaded"):
            item_embeddings.embed_with_model(str(tmp_path / "cut"), ["a"])
    torch.nn.init.constant_(model.get_input_embeddings().weight[1 + WORDS.index("rope")], torch.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"embeds 5 of 20 items as NaN or infinity; its weights are damaged"):
        item_embeddings.embed_with_model(str(tmp_path), asked)


def test_other_embeddings(raw, tmp_path, base):
    rows = np.random.default_rng(0).normal(size=(52, 6))
    np.save(tmp_path / "own.npy", rows)
    prepare_data(**flags_of(raw, tmp_path / "own", embeddings=str(tmp_path / "own.npy")))
    saved = np.load(path_of(tmp_path / "own", "embeddings"))
    np.testing.assert_array_equal(saved, rows[:48].astype(np.float32))
    prepare_data(**flags_of(raw, tmp_path / "encoded", encoder=base))
    assert np.load(path_of(tmp_path / "encoded", "embeddings")).shape == (48, 64)
    record = json.loads((tmp_path / "encoded" / "dataset.json").read_text())
    assert record["embeddings"].keys() == {"kind", "name", "weights", "width"} and base not in json.dumps(record)

    add = {"add_items": raw["add_items"], "output_dir": str(tmp_path / "more")}
    refused({**add, "dataset": str(tmp_path / "own")}, "were embedded by embeddings; give --embeddings")
    refused({**add, "dataset": str(tmp_path / "encoded")}, "were embedded by encoder; give --encoder")
    np.save(tmp_path / "new.npy", rows[:4, :5])
    refused(
        {**add, "dataset": str(tmp_path / "own"), "embeddings": str(tmp_path / "new.npy")},
        f"has width 5, but the embeddings of {tmp_path / 'own'} have 6",
    )
    np.save(tmp_path / "new.npy", rows[:4])
    prepare_data(**{**add, "dataset": str(tmp_path / "own"), "embeddings": str(tmp_path / "new.npy")})
    np.testing.assert_array_equal(np.load(path_of(tmp_path / "more", "embeddings"))[48:], rows[:2].astype(np.float32))
