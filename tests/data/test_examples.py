import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from minionerec.data import encoding, examples
from minionerec.data.encoding import Encoder, Pieces, left_padded
from minionerec.data.examples import IGNORE, Collator, tokenized_dataset
from minionerec.data.files import Interaction, Item, read_catalogue, read_interactions
from minionerec.data.prompts import RECOMMENDATION, load_prompts
from minionerec.model.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(base, files):
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(read_catalogue(files["index"]).sid_tokens)
    return tokenizer


def rows_of_files(files):
    items = read_catalogue(files["index"], files["item"]).items_with_text()
    return lambda kind: items if kind == "item" else read_interactions(files["train"], "train_file")


def test_examples_equal_plain_tokenization(tokenizer, files):
    prompts = load_prompts("bolts")
    encoder = Encoder(tokenizer, prompts, 512)
    for task in prompts.tasks.values():
        rows = list(rows_of_files(files)(task.rows))
        for row, (prompt, response) in zip(rows, encoder.encode(task, rows), strict=True):
            if isinstance(row, Item):
                fields = {"title": row.title, "sid": row.sid, "description": row.description}
            else:
                fields = {"title": row.title, "sid": row.sid}
                fields["sid_history"] = ", ".join(row.sid_history)
                fields["title_history"] = ", ".join(row.title_history)
            instruction = task.instruction.replace("{category}", "bolts")
            text = f"{instruction}\n{task.input.format(**fields)}\nAnswer:\n"
            assert prompt == tokenizer(text, add_special_tokens=False).input_ids
            answer = tokenizer(task.response.format(**fields), add_special_tokens=False).input_ids
            assert response == [*answer, tokenizer.eos_token_id]


def test_the_oldest_items_go_first(tokenizer):
    prompts = load_prompts("bolts")
    encoder = Encoder(tokenizer, prompts, 512)
    task = prompts.tasks[RECOMMENDATION]
    row = Interaction([f"<a_{i % 5}><b_0><c_0>" for i in range(10)], [], "<a_0><b_0><c_0>", "")
    whole = encoder.encode_prompts(task, [row], [512])[0]
    for budget in range(len(whole) - 1, len(whole) - 20, -1):
        ids = encoder.encode_prompts(task, [row], [budget])[0]
        text = tokenizer.decode(ids)
        kept = text.count("<b_0>")
        assert len(ids) <= budget
        assert text.startswith("A customer bought these bolts")
        assert text.endswith("Answer:\n")
        expected = replace(row, sid_history=row.sid_history[-kept:])
        assert ids == encoder.encode_prompts(task, [expected], [512])[0]


def test_nothing_is_longer_than_the_cutoff(tokenizer):
    prompts = load_prompts("bolts")
    encoder = Encoder(tokenizer, prompts, 64)
    long = "é" * 500
    for task in prompts.tasks.values():
        row = Item("<a_0>", long, long) if task.rows == "item" else Interaction(["<a_0>"], [long], "<a_1>", long)
        ((prompt, response),) = encoder.encode(task, [row])
        assert len(prompt) + len(response) <= 64
        assert response[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt).startswith(("A customer", "Give the"))


def test_the_dataset_is_made_once_and_again_when_anything_changes(tokenizer, files):
    prompts = load_prompts("bolts")
    passes = []

    def counted(kind):
        passes.append(kind)
        return rows_of_files(files)(kind)

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
def test_a_damaged_file_of_the_cache_is_made_anew(tokenizer, files, how):
    passes = []

    def counted(kind):
        passes.append(kind)
        return rows_of_files(files)(kind)

    def make():
        return tokenized_dataset(Encoder(tokenizer, load_prompts("bolts"), 256), counted, [files["train"]], damaged=how)

    first = make()
    rows = first[:]
    (file,) = first.cache_files
    damage(Path(file["filename"]), how)
    assert make()[:] == rows and passes == ["interaction", "item"] * 2
    assert make()[:] == rows and len(passes) == 4


def test_containers_with_the_same_process_id_share_a_cache(tokenizer, files, tmp_path, monkeypatch):
    """Another one writes the same entry from beginning to end while the first is at its first row."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    encoder, inner = Encoder(tokenizer, load_prompts("bolts"), 256), []

    def interrupted(kind):
        if not inner:
            inner.append(kind)
            inner.append(tokenized_dataset(encoder, rows_of_files(files), [files["train"]])[:])
        return rows_of_files(files)(kind)

    assert tokenized_dataset(encoder, interrupted, [files["train"]])[:] == inner[1]
    assert sorted(path.suffix for path in (tmp_path / "minionerec").iterdir()) == [".arrow", ".note", ".sha256"]


def test_the_cache_knows_the_code_and_the_tokenizers_release(tokenizer, files, tmp_path, monkeypatch):
    def name() -> str:
        encoder = Encoder(tokenizer, load_prompts("bolts"), 256)
        return tokenized_dataset(encoder, rows_of_files(files), [files["train"]]).cache_files[0]["filename"]

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


def test_prompts_are_padded_on_the_left():
    for prompts in ([[1, 2], [3]], [np.array([1, 2], dtype=np.int32), np.array([3])]):
        ids, mask = left_padded(prompts, 9)
        assert torch.equal(ids, torch.tensor([[1, 2], [9, 3]]))
        assert torch.equal(mask, torch.tensor([[1, 1], [0, 1]]))


def test_no_batch_is_built_token_by_token(monkeypatch):
    """torch takes in a list of numbers one by one."""
    rows = [{"input_ids": list(range(50 + i)), "prompt_length": 40, "length": 50 + i} for i in range(4)]
    monkeypatch.setattr(torch, "tensor", lambda *_: pytest.fail("torch.tensor of a list"))
    batch = Collator(0)(rows)
    ids, mask = left_padded([row["input_ids"] for row in rows], 0)
    assert batch["input_ids"].dtype == batch["labels"].dtype == ids.dtype == mask.dtype == torch.int64
    assert batch["input_ids"][0, :50].tolist() == ids[0, -50:].tolist() == list(range(50))


TEXTS = [
    "Purchases: <a_1><b_2><c_3>, <a_1><b_2><c_4>, <a_1><b_2><c_3>\nAnswer:\n",
    'Purchases: Bolt 3/4", M8 (pack of 10), 1.75 mm, é漢字®, , ,x,  two spaces, \n, "quoted", it\'s, end,\nAnswer:\n',
    "one:  two: three\n\nfour.\n five,\nsix",
    "",
    ", ",
]


@pytest.mark.parametrize("pre_tokenizer", ["bytes", "qwen", "none", "metaspace", "edges", "prepending"])
def test_pieces_give_the_tokens_of_the_whole_text(pre_tokenizer):
    tokenizer = Tokenizer(models.BPE())
    qwen = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    qwen += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    kinds = {
        "bytes": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "qwen": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(qwen), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        "metaspace": pre_tokenizers.Metaspace(),
        # Words end after a comma, but between two SIDs the comma and the space are one.
        "edges": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r", $| ?[^\s,]+|,|\n|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        "prepending": pre_tokenizers.ByteLevel(add_prefix_space=False),
    }
    if pre_tokenizer == "prepending":
        tokenizer.normalizer = normalizers.Prepend("_")
    if pre_tokenizer in kinds:
        tokenizer.pre_tokenizer = kinds[pre_tokenizer]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "a, b, " * 50, *["x, "] * 50], trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<a_1>", "<b_2>", "<c_3>", "<c_4>")])
    pieces = Pieces(tokenizer)
    assert pieces.splits == (pre_tokenizer in ("bytes", "qwen"))
    assert not pieces.splits or len(pieces.split(TEXTS[0])) == 5
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    assert pieces.encode(TEXTS) == expected
    assert pieces.encode(TEXTS) == expected  # from memory
