import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minionerec.data import encoding, examples
from minionerec.data.encoding import Encoder, left_padded
from minionerec.data.examples import IGNORE, Collator, tokenized_dataset
from minionerec.data.prompts import RECOMMENDATION, load_prompts


def test_the_dataset_is_made_once_and_again_when_anything_changes(tokenizer, files, rows_of):
    prompts = load_prompts("bolts")
    passes = []

    def counted(kind):
        passes.append(kind)
        return rows_of(kind)

    def make(prompts, **settings):
        return tokenized_dataset(Encoder(tokenizer, prompts, 256), counted, [files["train"]], **settings)

    first, second = make(prompts, seed=1), make(prompts, seed=1)
    assert passes == ["interaction", "item"]
    assert first[:] == second[:]
    assert [len(ids) for ids in first["input_ids"]] == list(first["length"])
    make(prompts, seed=2)
    assert len(passes) == 4
    heavier = replace(prompts.tasks[RECOMMENDATION], weight=3)
    again = make(replace(prompts, tasks={**prompts.tasks, RECOMMENDATION: heavier}))
    assert len(again) == len(first) + 2 * 40


def damage(path: Path, how: str) -> None:
    data = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "half":
        path.write_bytes(data[: len(data) // 2])
    elif how == "no end":  # a stream without its last batch and its end is read without a word
        path.write_bytes(data[:-8])
    elif how == "one byte":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    else:
        Path(f"{path}.sha256").unlink()


@pytest.mark.parametrize("how", ["empty", "zeros", "half", "no end", "one byte", "no checksum"])
def test_a_damaged_file_of_the_cache_is_made_anew(tokenizer, files, rows_of, how):
    passes = []

    def counted(kind):
        passes.append(kind)
        return rows_of(kind)

    def make():
        return tokenized_dataset(Encoder(tokenizer, load_prompts("bolts"), 256), counted, [files["train"]], damaged=how)

    first = make()
    rows = first[:]
    (file,) = first.cache_files
    damage(Path(file["filename"]), how)
    assert make()[:] == rows and passes == ["interaction", "item"] * 2
    assert make()[:] == rows and len(passes) == 4


def test_containers_with_the_same_process_id_share_a_cache(tokenizer, files, rows_of, tmp_path, monkeypatch):
    """Another one writes the same entry from beginning to end while the first is at its first row."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    encoder, inner = Encoder(tokenizer, load_prompts("bolts"), 256), []

    def interrupted(kind):
        if not inner:
            inner.append(kind)
            inner.append(tokenized_dataset(encoder, rows_of, [files["train"]])[:])
        return rows_of(kind)

    assert tokenized_dataset(encoder, interrupted, [files["train"]])[:] == inner[1]
    assert sorted(path.suffix for path in (tmp_path / "minionerec").iterdir()) == [".arrow", ".note", ".sha256"]


def test_the_cache_knows_the_code_and_the_tokenizers_release(tokenizer, files, rows_of, tmp_path, monkeypatch):
    def name() -> str:
        encoder = Encoder(tokenizer, load_prompts("bolts"), 256)
        return tokenized_dataset(encoder, rows_of, [files["train"]]).cache_files[0]["filename"]

    package = tmp_path / "package"
    shutil.copytree(Path(encoding.__file__).parent.parent, package)
    assert examples.code_digest(str(package)) == examples.code_digest()
    first = name()
    (package / "data" / "prompts.py").write_text((package / "data" / "prompts.py").read_text() + "\n# changed\n")
    examples.code_digest.cache_clear()
    changed = examples.code_digest(str(package))
    assert changed != examples.code_digest()
    assert name() == first
    monkeypatch.setattr(examples, "code_digest", lambda: changed)
    second = name()
    monkeypatch.setattr(encoding.tokenizers, "__version__", "0.0.1")
    assert len({first, second, name()}) == 3


def test_labels_cover_the_response_alone():
    batch = Collator(9)([{"input_ids": [1, 2, 3], "prompt_length": 2}, {"input_ids": [4, 5], "prompt_length": 1}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 3], [IGNORE, 5, IGNORE]]


def test_no_batch_is_built_token_by_token(monkeypatch):
    """torch takes in a list of numbers one by one."""
    rows = [{"input_ids": list(range(50 + i)), "prompt_length": 40, "length": 50 + i} for i in range(4)]
    monkeypatch.setattr(torch, "tensor", lambda *_: pytest.fail("torch.tensor of a list"))
    batch = Collator(0)(rows)
    ids, mask = left_padded([row["input_ids"] for row in rows], 0)
    assert batch["input_ids"].dtype == batch["labels"].dtype == ids.dtype == mask.dtype == torch.int64
    assert batch["input_ids"][0, :50].tolist() == ids[0, -50:].tolist() == list(range(50))
