"""Tokenizes rows into prompts and responses, in batches, and shortens what exceeds `cutoff_len`."""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, product, takewhile
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
import torch

from minionerec.data.control_tokens import DATA_FIELDS, ControlTokens
from minionerec.data.files import Interaction, Item, shorten
from minionerec.data.prompts import SEPARATOR, Prompts, Task
from minionerec.errors import InputError

if TYPE_CHECKING:  # slow to import, and needed for annotations only
    from transformers import PreTrainedTokenizerFast


def _fields(row: Interaction | Item) -> dict[str, str]:
    """The texts that a task's format strings may name."""
    if isinstance(row, Item):
        return {"sid": row.sid, "title": row.title, "description": row.description}
    return {
        "sid_history": SEPARATOR.join(row.sid_history),
        "title_history": SEPARATOR.join(filter(str.strip, row.title_history)),  # missing titles are skipped
        "sid": row.sid,
        "title": row.title,
    }


def _response(task: Task, fields: dict[str, str]) -> str:
    return task.response.format(**fields)


class Pieces:
    """Tokenizes texts piece by piece and caches the pieces, because histories repeat the same titles and SIDs.

    A text is split between a comma or colon and the space that follows, and after a line feed. If a token of this
    tokenizer could span such a split, texts are tokenized whole. The ids are the same either way.
    """

    MOST = 200_000  # cached pieces
    split = staticmethod(re.compile(r"(?<=[,:])(?= \S)|(?<=\n)(?=\w)").split)

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self.tokenizer = tokenizer
        self.splits = self._splits_are_safe()
        self.known: dict[str, list[int]] = {}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of every text, without special tokens."""
        if not self.splits:
            return self._encode_whole(texts)
        if len(self.known) > self.MOST:
            self.known.clear()
        split = [self.split(text) for text in texts]
        new = list({piece for pieces in split for piece in pieces if piece not in self.known})
        self.known.update(zip(new, self._encode_whole(new), strict=True))
        return [list(chain.from_iterable(map(self.known.__getitem__, pieces))) for pieces in split]

    def _encode_whole(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def _splits_are_safe(self) -> bool:
        """Whether split texts give the ids of whole ones, tried with many kinds of text around each split."""
        if self.tokenizer.pre_tokenizer is None:
            return False
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        if any(len(self.split(f"{content}x")[0]) < len(content) for content in added):  # such as `<type: drill>`
            return False
        added = added[-2:]  # SID tokens
        around = [*added, *["word", "7", "3/4", "(x)", "'s", '"', ",", "é", "漢字", "®", "<", "-", "A1", "..", "́", "_"]]
        texts = [f"{before}{mark}{after}" for before, mark, after in product(around, (", ", ": ", "\n"), around)]
        split = [self.split(text) for text in texts]
        apart = iter(self._encode_whole([piece for pieces in split for piece in pieces]))
        for text, pieces, whole in zip(texts, split, self._encode_whole(texts), strict=True):
            ends = {end for _, (_, end) in self.tokenizer.pre_tokenizer.pre_tokenize_str(text)}
            together = list(chain.from_iterable(islice(apart, len(pieces))))
            if len(pieces[0]) not in ends or together != whole:
                return False
        return True


class Encoder:
    """Turns rows into token ids: a prompt, and the response with its end-of-sequence token.

    Titles and descriptions are text: a control token or SID in them is tokenized as ordinary text.

    No sequence is longer than `cutoff_len`. A prompt that is too long first drops the oldest items of its history; if
    that is not enough, its longest field is cut at the end. The instruction is never cut: InputError if it takes more
    than three quarters of `cutoff_len`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompts: Prompts, cutoff_len: int):
        self.tokenizer, self.prompts, self.cutoff_len = tokenizer, prompts, cutoff_len
        # Llama and Gemma start every text with one special token, GLM with two, Qwen and GPT-2 with none.
        text = tokenizer("x", return_special_tokens_mask=True)
        pairs = zip(text.input_ids, text.special_tokens_mask, strict=True)
        self.start = [token for token, _ in takewhile(lambda pair: pair[1], pairs)]

        self.pieces = Pieces(tokenizer.backend_tokenizer)
        self.control = ControlTokens(tokenizer.backend_tokenizer)
        self.control_texts: dict[str, str] = {}  # texts that hold a control token -> the first one
        self.control_note: str | None = None  # a line about them
        self._crossing = {task.name for task in prompts.tasks.values() if self._can_cross(task)}
        for task in prompts.tasks.values():
            empty = dict.fromkeys(("sid_history", "title_history", "sid", "title", "description"), "")
            instruction = len(self.start) + len(self.pieces.encode([prompts.render(task, empty)])[0])
            if instruction > cutoff_len * 3 // 4:
                raise InputError(
                    f"--cutoff_len {cutoff_len}: the instruction of task {task.name} has {instruction} tokens, which "
                    f"leaves too little room for the row; give {math.ceil(instruction * 4 / 3)} or more"
                )

    def _can_cross(self, task: Task) -> bool:
        """Whether the wording of a task and its texts can make control tokens together: its rows are then all encoded
        as those with control tokens."""
        if task.fields.isdisjoint(DATA_FIELDS):
            return False
        forms = (partial(self.prompts.render, task), partial(_response, task))
        return any(self.control.can_cross(form, SEPARATOR) for form in forms)

    def _with_control_tokens(self, task: Task, rows: Sequence[dict[str, str]]) -> list[int]:
        """The rows, by number, in whose data the tokenizer would find control tokens."""
        if task.name in self._crossing:
            return list(range(len(rows)))
        names = [name for name in DATA_FIELDS if name in task.fields]
        return sorted({i for name in names for i in self.control.first_in([fields[name] for fields in rows])})

    def _note(self, row: Interaction | Item) -> None:
        """Counts the texts of a row that hold control tokens."""
        texts = [row.title, row.description] if isinstance(row, Item) else [row.title, *row.title_history]
        self.control_texts.update({texts[i]: token for i, token in self.control.first_in(texts).items()})
        if self.control_texts:
            token = next(iter(self.control_texts.values()))
            self.control_note = (
                f"titles and descriptions with control tokens such as {shorten(token)}: {len(self.control_texts):,}; "
                "there these are tokenized as text"
            )

    def responses(self, task: Task, rows: list[Interaction | Item]) -> list[list[int]]:
        """Token ids of the responses, each at most half of `cutoff_len`; equal texts are tokenized once."""
        fields = list(map(_fields, rows))
        texts = [_response(task, one) for one in fields]
        distinct = list(dict.fromkeys(texts))
        limit, end = self.cutoff_len // 2 - 1, self.tokenizer.eos_token_id
        ids = {text: [*ids[:limit], end] for text, ids in zip(distinct, self.pieces.encode(distinct), strict=True)}
        encoded = [ids[text] for text in texts]
        held = self._with_control_tokens(task, fields)
        for i, one in zip(held, self.control.encode(partial(_response, task), [fields[i] for i in held]), strict=True):
            self._note(rows[i])
            encoded[i] = [*one[:limit], end]
        return encoded

    def encode_prompts(self, task: Task, rows: Sequence[Interaction | Item], budgets: list[int]) -> list[list[int]]:
        """Token ids of the prompts; that of row i has at most `budgets[i]`."""
        fields = list(map(_fields, rows))
        held = self._with_control_tokens(task, fields)
        encoded = self._prompts(task, fields, held)
        for i in held:
            self._note(rows[i])
        for i, budget in enumerate(budgets):
            if len(encoded[i]) > budget:
                encoded[i] = self._shortened(task, rows[i], budget)
        return encoded

    def _prompts(self, task: Task, rows: Sequence[dict[str, str]], held: Sequence[int]) -> list[list[int]]:
        """Token ids of whole prompts, from the fields of rows; `held` is what `_with_control_tokens` found."""
        form = partial(self.prompts.render, task)
        encoded = self.pieces.encode(list(map(form, rows)))
        for i, ids in zip(held, self.control.encode(form, [rows[i] for i in held]), strict=True):
            encoded[i] = ids
        return [self.start + ids for ids in encoded]

    def _shortened(self, task: Task, row: Interaction | Item, budget: int) -> list[int]:
        def ids_of(fields: dict[str, str]) -> list[int]:
            return self._prompts(task, [fields], self._with_control_tokens(task, [fields]))[0]

        def tokens_of(fields: dict[str, str], name: str, kept: int) -> int:
            return len(ids_of({**fields, name: fields[name][:kept]}))

        # The oldest items go first, as few as will do; their number is searched by halves.
        if isinstance(row, Interaction):
            without_oldest, numbers = row.without_oldest, range(1, len(row.sid_history))
            count = bisect_left(numbers, True, key=lambda n: len(ids_of(_fields(without_oldest(n)))) <= budget)
            row = without_oldest(min(count + 1, len(numbers)))
        # Then the end of the longest text.
        fields = _fields(row)
        ids = ids_of(fields)
        while len(ids) > budget:
            names = [name for name in fields if "{" + name + "}" in task.input]
            longest = max(names, key=lambda name: len(fields[name]), default=None)
            if longest is None or not fields[longest]:
                return ids[:budget]  # the instruction by itself is too long
            # A character may be several tokens, so how many characters stay is searched by halves.
            kept = bisect_right(range(len(fields[longest])), budget, key=partial(tokens_of, fields, longest)) - 1
            fields[longest] = fields[longest][: max(kept, 0)]
            ids = ids_of(fields)
        return ids

    def encode(self, task: Task, rows: list[Interaction | Item]) -> list[tuple[list[int], list[int]]]:
        """(prompt, response) token ids of every row."""
        responses = self.responses(task, rows)
        prompts = self.encode_prompts(task, rows, [self.cutoff_len - len(response) for response in responses])
        return list(zip(prompts, responses, strict=True))


def batches(rows: Iterable, size: int) -> Iterator[list]:
    """The rows in lists of `size`; the last list may be shorter."""
    rows = iter(rows)
    while batch := list(islice(rows, size)):
        yield batch


Rows = Sequence[Sequence[int] | np.ndarray]


def left_padded(prompts: Rows, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """input_ids and attention_mask [B, P] of prompts (lists or arrays), padded on the left."""
    return _padded(prompts, pad_token_id, on_the_left=True)


def right_padded(completions: Rows, pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same [B, C] of completions, padded on the right."""
    return _padded(completions, pad_token_id, on_the_left=False)


def _padded(rows: Rows, pad_token_id: int, on_the_left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, rows))
    input_ids: np.ndarray = np.full((len(rows), width), pad_token_id, dtype=np.int64)
    mask = np.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        place = slice(width - len(ids), None) if on_the_left else slice(len(ids))
        input_ids[i, place], mask[i, place] = ids, 1
    return torch.from_numpy(input_ids), torch.from_numpy(mask)
