"""Finds control tokens in texts of the catalogue, and tokenizes such texts as ordinary text.

A tokenizer turns the text of an added token, such as `<|im_end|>`, `</s>` or `<a_1>`, into that token wherever it
stands. That is right for the wording of a prompt and for SIDs. A title is data: there these strings are text.

`tokenizers` has no switch for a part of a text. So texts with such a string go through a copy of the tokenizer that
knows each added token by an alias only. The wording and the SIDs get the aliases, the data stays as it is.
"""

import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

from tokenizers import AddedToken, Tokenizer, models

DATA_FIELDS = ("title_history", "title", "description")  # of a task: texts of the catalogue; the others are SIDs
BLANK = " \t\r\n\v\f▁"  # runs of these are tokens of some tokenizers, and no control tokens
OTHER = "\0"  # stands for text that is not a token


class ControlTokens:
    """The control tokens of a tokenizer: all that were added to its model's vocabulary, but not runs of blanks."""

    def __init__(self, tokenizer: Tokenizer):
        """The tokens are those that `tokenizer` has now."""
        self._tokenizer = tokenizer
        tokens = [token for token in tokenizer.get_added_tokens_decoder().values() if token.content.strip(BLANK)]
        self._tokens, self._contents = tokens, [token.content for token in tokens]
        # A text without any of these characters holds no control token. A normalizer may make them of others.
        normalized = tokenizer.normalizer is not None and any(token.normalized for token in tokens)
        self._first = None if normalized else {content[0] for content in self._contents}
        # No text contains these by chance, or on purpose.
        self._mark = f"\ue000{secrets.token_hex(8)}"
        self._alias = {content: f"{self._mark}t{i}\ue001" for i, content in enumerate(self._contents)}
        self._place = {name: f"{self._mark}{name}\ue001" for name in DATA_FIELDS}

    def first_in(self, texts: Sequence[str]) -> dict[int, str]:
        """Index -> the first control token of the texts that hold one."""
        held: Sequence[int] = range(len(texts) if self._contents else 0)
        if self._first is not None:
            held = sorted({i for first in self._first for i, text in enumerate(texts) if first in text})
        found = self._finder.encode_batch_fast([texts[i] for i in held], add_special_tokens=False) if held else []
        first = {i: next(filter(None, encoding.ids), 0) for i, encoding in zip(held, found, strict=True)}
        return {i: self._contents[token - 1] for i, token in first.items() if token}

    def encode(self, form: Callable[[dict[str, str]], str], rows: Iterable[Mapping[str, str]]) -> list[list[int]]:
        """Token ids of the texts that `form` makes of the fields of rows, with control tokens only outside the
        DATA_FIELDS."""
        texts = []
        for fields in rows:
            text = self._with_aliases(form({**fields, **self._place}))
            for name, place in self._place.items():
                text = text.replace(place, fields.get(name, ""))
            texts.append(text)
        if not texts:
            return []
        copy, own_id = self._copy
        return [
            [own_id.get(token, token) for token in encoding.ids]
            for encoding in copy.encode_batch_fast(texts, add_special_tokens=False)
        ]

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of bare texts of the catalogue."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids, held = [encoding.ids for encoding in encoded], list(self.first_in(texts))
        of_held = self.encode(lambda fields: fields["title"], [{"title": texts[i]} for i in held])
        for i, one in zip(held, of_held, strict=True):
            ids[i] = one
        return ids

    def can_cross(self, form: Callable[[dict[str, str]], str], separator: str) -> bool:
        """Whether a data field and the wording around it can make a control token together, as in `<{title}>`; the
        entries of title_history are joined by `separator`."""
        place = re.compile("|".join(map(re.escape, self._place.values())))
        parts = place.split(form({"sid": "", "sid_history": "", **self._place}))
        after = [*parts[1:], separator]
        return (
            "" in parts[1:-1] or any(map(self._can_begin, [*parts[:-1], separator])) or any(map(self._can_end, after))
        )

    def _can_begin(self, text: str) -> bool:
        """Whether a control token can begin in the text and end after it."""
        return _extends(self._sorted, [text[start:] for start in range(max(len(text) - self._longest, 0), len(text))])

    def _can_end(self, text: str) -> bool:
        """Whether a control token can begin before the text and end in it."""
        ends = range(1, min(len(text), self._longest) + 1)
        return _extends(self._sorted_backwards, [text[:end][::-1] for end in ends])

    @cached_property
    def _finder(self) -> Tokenizer:
        """Finds the tokens as the tokenizer does, and nothing else; it numbers them from 1, and other text is 0."""
        finder = Tokenizer(models.WordLevel({OTHER: 0}, unk_token=OTHER))
        if self._tokenizer.normalizer is not None:
            finder.normalizer = self._tokenizer.normalizer
        finder.add_tokens([_plain(token) for token in self._tokens])
        return finder

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._contents), default=0)

    @cached_property
    def _sorted(self) -> list[str]:
        return sorted(self._contents)

    @cached_property
    def _sorted_backwards(self) -> list[str]:
        return sorted(content[::-1] for content in self._contents)

    def _with_aliases(self, text: str) -> str:
        """The text with every control token replaced by its alias."""
        found = self._finder.encode(text, add_special_tokens=False)
        parts, end = [], 0
        for token, (start, stop) in zip(found.ids, found.offsets, strict=True):
            if token:
                span = text[start:stop]  # with the spaces that a token takes in
                alias = self._alias[self._contents[token - 1]]
                parts += [text[end:start], span[: len(span) - len(span.lstrip())], alias, span[len(span.rstrip()) :]]
                end = stop
        return "".join([*parts, text[end:]])

    @cached_property
    def _copy(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer with aliases in the place of control tokens, and the ids that differ -> those of the
        tokenizer."""
        data = json.loads(self._tokenizer.to_str())
        for token in data["added_tokens"]:
            if token["content"] in self._alias:
                token.update(content=self._alias[token["content"]], single_word=False)
        _rename(data["model"], self._alias)
        copy = Tokenizer.from_str(json.dumps(data))
        ids = {copy.token_to_id(alias): self._tokenizer.token_to_id(text) for text, alias in self._alias.items()}
        return copy, {here: there for here, there in ids.items() if here != there}  # type: ignore[misc]


def _plain(token: AddedToken) -> AddedToken:
    """The token as one to find: `tokenizers` may be told to leave special ones alone."""
    return AddedToken(
        token.content,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=False,
    )


def _extends(ordered: list[str], beginnings: list[str]) -> bool:
    """Whether one of the `ordered` texts begins with one of these, and is longer."""
    for beginning in beginnings:
        place = bisect_left(ordered, beginning + "\0")
        if place < len(ordered) and ordered[place].startswith(beginning):
            return True
    return False


def _rename(model: dict, alias: dict[str, str]) -> None:
    """Renames entries of a model's vocabulary, in place, so that no text becomes them: a Unigram, WordPiece or
    WordLevel model would find them in text, a BPE model where merges make them."""
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {alias.get(text, text): token for text, token in vocabulary.items()}
    else:
        model["vocab"] = [[alias.get(text, text), *score] for text, *score in vocabulary]
    if model.get("unk_token"):
        model["unk_token"] = alias.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = ((merge, merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
        model["merges"] = [
            merge for merge, (left, right) in pairs if not {left, right, left + right}.intersection(alias)
        ]
