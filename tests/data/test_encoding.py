"""Prompts and responses as tokens: those of the whole text, shortened from the oldest item on."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from minionerec.data.encoding import Encoder, Pieces, left_padded
from minionerec.data.files import Interaction, Item
from minionerec.data.prompts import RECOMMENDATION, load_prompts


def test_examples_equal_plain_tokenization(tokenizer, rows_of):
    prompts = load_prompts("bolts")
    encoder = Encoder(tokenizer, prompts, 512)
    for task in prompts.tasks.values():
        rows = list(rows_of(task.rows))
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


def test_a_long_history_is_shortened_in_few_steps(tokenizer):
    prompts = load_prompts("bolts")
    encoder = Encoder(tokenizer, prompts, 512)
    row = Interaction(["<a_1><b_0><c_0>"] * 1000, [], "<a_0><b_0><c_0>", "")
    tokenized = []
    plain = encoder._prompts
    encoder._prompts = lambda *args: tokenized.append(1) or plain(*args)
    (ids,) = encoder.encode_prompts(prompts.tasks[RECOMMENDATION], [row], [100])
    assert 90 < len(ids) <= 100 and len(tokenized) < 15


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


@pytest.mark.parametrize("text", ["中文商品描述" * 60, "🔩 " * 150, "Bolt M8, " * 90])
def test_a_long_text_keeps_all_that_fits_also_where_a_character_is_several_tokens(tokenizer, text):
    prompts = load_prompts("bolts", tasks="description_to_sid")
    encoder = Encoder(tokenizer, prompts, 512)
    (ids,) = encoder.encode_prompts(prompts.tasks["description_to_sid"], [Item("<a_0>", "", text)], [200])
    assert 200 - 4 < len(ids) <= 200
    assert tokenizer.decode(ids).split("Description: ")[1].startswith(text[:20])


def test_prompts_are_padded_on_the_left():
    for prompts in ([[1, 2], [3]], [np.array([1, 2], dtype=np.int32), np.array([3])]):
        ids, mask = left_padded(prompts, 9)
        assert torch.equal(ids, torch.tensor([[1, 2], [9, 3]]))
        assert torch.equal(mask, torch.tensor([[1, 1], [0, 1]]))


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


@pytest.mark.parametrize("content", ["<type: drill>", "<drill, small>", "<drill>, "])
def test_a_token_that_a_split_would_cut_turns_splitting_off(content):
    tokenizer = Tokenizer(models.BPE(dict(zip(pre_tokenizers.ByteLevel.alphabet(), range(256), strict=True)), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("\n\n", "<a_1>", "<b_2>")])
    assert Pieces(tokenizer).splits
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (content, "<c_3>", "<c_4>")])
    text = f"Purchases: <a_1>{content}<b_2>, <a_1><b_2>"
    assert Pieces(tokenizer).encode([text]) == [tokenizer.encode(text, add_special_tokens=False).ids]
