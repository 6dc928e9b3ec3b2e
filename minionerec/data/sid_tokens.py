"""Adds SID tokens to a tokenizer so that no normalizer changes them, and checks how every SID is tokenized.

A token that is added as plain text is matched after the tokenizer's normalizer. If that puts "▁" before a text,
`<a_0><b_0><c_0>` silently becomes 11 tokens instead of 3.

Dimensions: `S` SIDs, `D` tokens of the longest response with its end-of-sequence token.
"""

import string
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import tokenizers
from tokenizers import AddedToken, Tokenizer, models

from minionerec.data.control_tokens import OTHER
from minionerec.data.encoding import Encoder, batches
from minionerec.data.files import Catalogue, shorten
from minionerec.data.prompts import SEPARATOR, Task
from minionerec.errors import InputError

if TYPE_CHECKING:  # slow to import, and needed for annotations only
    from transformers import PreTrainedTokenizerFast

PAD = -1  # fills rows of token ids after the end of a shorter sequence
UNKNOWN = -2  # in place of a token id, for text that is not a known token
SIDS_OF_A_PROMPT = 100  # put into one prompt by a check

Refuse = Callable[[int, str], NoReturn]  # raises InputError about the SID in a row of the check


def add_sid_tokens(tokenizer: "PreTrainedTokenizerFast", sid_tokens: Sequence[str]) -> None:
    """Adds SID tokens that are matched in the raw text: before any normalizer, and next to any other text.

    Tokens that the tokenizer knows keep their ids. Raises InputError for one that has another meaning there, such as
    the end-of-sequence token.
    """
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    own = {getattr(tokenizer, name): name for name in names}
    taken = [token for token in sid_tokens if token in own]
    if taken:
        raise InputError(
            f"SID token {taken[0]!r} is the {own[taken[0]]} of the tokenizer; rename it in --sid_index_path"
        )
    known = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    new = [token for token in sid_tokens if token not in known or not _matches_raw_text(known[token])]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])


def _matches_raw_text(token: AddedToken) -> bool:
    return not (token.normalized or token.lstrip or token.rstrip or token.single_word)


def check_sids(encoder: Encoder, catalogue: Catalogue, where: str, remedy: str) -> None:
    """Checks all SIDs as `sid_responses` does, with the ending of every task of the encoder."""
    for ending in sorted({task.ending or "" for task in encoder.prompts.tasks.values()}):
        sid_responses(encoder, list(catalogue.tokens_of), ending, catalogue, where, remedy)


def sid_responses(
    encoder: Encoder, sids: Sequence[str], ending: str | None, catalogue: Catalogue | None, where: str, remedy: str
) -> np.ndarray:
    """Token ids [S, D - 1] of what a model writes for SIDs, padded with PAD: the SID and `ending`, if there is one.

    Every SID must become its own tokens and no others, both as a response and in the prompts of the encoder's tasks.
    A million SIDs are checked in arrays, without a Python object for each token.

    Args:
        catalogue: the SIDs and their tokens. Without one, a SID's own tokens are the tokens added to this tokenizer
            whose texts join to the SID; if none was added for any SID, SIDs are plain text.
        where, remedy: for messages, the flag that named the tokenizer, and what to do.

    Raises InputError naming the first SID that becomes other tokens, two SIDs that become the same ones, or a SID that
    contains the end-of-sequence token or is longer than half of the encoder's `cutoff_len`.
    """
    tokenizer = encoder.tokenizer
    sequences = sid_sequences(tokenizer, [sid + ending for sid in sids] if ending else sids)
    lengths = (sequences != PAD).sum(axis=1)

    def refuse(row: int, problem: str) -> NoReturn:
        raise InputError(f"{where}: SID {shorten(sids[row])} {problem}; {remedy}")

    def became(row: int) -> str:
        tokens = tokenizer.convert_ids_to_tokens(sequences[row, : lengths[row]].tolist())
        return f"becomes {len(tokens)} tokens, {shorten(tokens)}"

    # Checks that need no knowledge of the SIDs' own tokens.
    if not lengths.all():
        refuse(int(lengths.argmin()), "becomes no token at all")
    ends = (sequences == tokenizer.eos_token_id).any(axis=1)
    if ends.any():
        refuse(int(ends.argmax()), "or the text after it contains the end-of-sequence token")
    if sequences.shape[1] > encoder.cutoff_len // 2 - 1:
        refuse(
            int(lengths.argmax()),
            f"takes {sequences.shape[1] + 1} tokens to write, more than half of cutoff_len {encoder.cutoff_len}",
        )
    if catalogue is not None:
        lacking = sorted(set(catalogue.sid_tokens) - set(tokenizer.get_vocab()))
        if lacking:
            raise InputError(
                f"{where}: its tokenizer lacks {len(lacking)} SID tokens of the index, such as {lacking[0]!r}; {remedy}"
            )
    own = _added_tokens(tokenizer, sids) if catalogue is None else _tokens_of_index(tokenizer, sids, catalogue)
    if own is None:
        _check_distinct(sequences, refuse)
        return sequences
    unknown = (own == UNKNOWN).any(axis=1)
    if unknown.any():
        row = int(unknown.argmax())
        refuse(row, f"{became(row)}: the tokenizer does not know all of its tokens")

    # As a response, each SID is its own tokens and then the ending, whose tokens are those after the first SID.
    own_lengths = (own != PAD).sum(axis=1)
    tail = sequences[0, own_lengths[0] : lengths[0]] if ending else sequences[0, :0]
    expected = np.full((len(own), max(own.shape[1] + len(tail), sequences.shape[1])), PAD)
    expected[:, : own.shape[1]] = own
    expected[np.arange(len(own))[:, None], own_lengths[:, None] + np.arange(len(tail))] = tail
    found = np.pad(sequences, ((0, 0), (0, expected.shape[1] - sequences.shape[1])), constant_values=PAD)
    wrong = (found != expected).any(axis=1)
    if wrong.any():
        row = int(wrong.argmax())
        refuse(row, f"{became(row)}, instead of its own {own_lengths[row]}")
    _check_in_prompts(encoder, sids, own, refuse)
    return sequences


def _tokens_of_index(tokenizer: "PreTrainedTokenizerFast", sids: Sequence[str], catalogue: Catalogue) -> np.ndarray:
    """Ids of the SIDs' own tokens, [S, tokens of the longest], padded with PAD."""
    vocabulary, tokens_of = tokenizer.get_vocab(), catalogue.tokens_of
    lengths = np.fromiter((len(tokens_of[sid]) for sid in sids), np.int64, len(sids))
    ids = (vocabulary[token] for sid in sids for token in tokens_of[sid])
    own = np.full((len(sids), lengths.max()), PAD)
    own[np.arange(own.shape[1]) < lengths[:, None]] = np.fromiter(ids, np.int64, lengths.sum())
    return own


def _added_tokens(tokenizer: "PreTrainedTokenizerFast", sids: Sequence[str]) -> np.ndarray | None:
    """The same without an index, from the tokens that were added to this tokenizer: a second tokenizer that knows only
    those finds them in the SIDs. Other text is UNKNOWN; None if the SIDs contain no added token."""
    added = tokenizer.added_tokens_decoder
    finder = Tokenizer(models.WordLevel({OTHER: 0}, unk_token=OTHER))
    finder.add_tokens([AddedToken(token.content, normalized=False) for token in added.values()])
    found = token_rows(finder, sids)
    if (found <= 0).all():
        return None
    # `found` numbers the added tokens from 1, 0 is other text, and PAD, -1, takes the last entry.
    return np.array([UNKNOWN, *added, PAD])[found]


def _check_distinct(sequences: np.ndarray, refuse: Refuse) -> None:
    seen: dict[bytes, int] = {}
    for row, ids in enumerate(sequences):
        other = seen.setdefault(ids.tobytes(), row)
        if other != row:
            refuse(row, "becomes the same tokens as another one")


def _check_in_prompts(encoder: Encoder, sids: Sequence[str], own: np.ndarray, refuse: Refuse) -> None:
    """Renders prompts with many SIDs each, and compares the SID tokens found there with the SIDs' own."""
    tokenizer = encoder.tokenizer
    sid_ids = np.unique(own[own != PAD])

    def found(task: Task, parts: list[list[int]]) -> list[np.ndarray]:
        """The ids of the SID tokens in one prompt per part; a part lists the rows of its SIDs."""
        texts = []
        for rows in parts:
            text = SEPARATOR.join([sids[row] for row in rows])
            fields = {**dict.fromkeys(task.fields, ""), "sid_history": text, "sid": text}
            texts.append(encoder.prompts.render(task, fields))
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(encoding.ids, dtype=np.int64) for encoding in encoded]
        return [these[np.isin(these, sid_ids)] for these in ids]

    for task in encoder.prompts.tasks.values():
        times = sum(name in ("sid_history", "sid") for _, name, *_ in string.Formatter().parse(task.input))
        wording = len(found(task, [[]])[0])  # SID tokens in the wording itself

        def first_wrong(
            parts: list[list[int]], task: Task = task, times: int = times, wording: int = wording
        ) -> tuple[list[int], list[str]] | None:
            """The first part whose prompt has other SID tokens than its SIDs, and those tokens."""
            for rows, ids in zip(parts, found(task, parts), strict=True):
                expected = np.tile(own[rows][own[rows] != PAD], times)
                if len(ids) != len(expected) + wording or (not wording and (ids != expected).any()):
                    return rows, tokenizer.convert_ids_to_tokens(ids.tolist())
            return None

        for parts in batches(batches(range(len(sids)), SIDS_OF_A_PROMPT), 100) if times else ():
            if wrong := first_wrong(parts):
                rows, _ = wrong
                one_or_two = [rows[max(i - 1, 0) : i + 1] for i in range(len(rows))]
                rows, tokens = first_wrong([[row] for row in rows]) or first_wrong(one_or_two) or wrong
                text = SEPARATOR.join([sids[row] for row in rows])
                refuse(rows[-1], f"becomes {shorten(tokens)} in a prompt of task {task.name}, as {shorten(text)}")


def token_rows(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Token ids of texts as [texts, tokens of the longest], padded with PAD; one row per text, in order. A batch at a
    time becomes an array, so that a million texts do not become lists of ints."""
    ids: list[np.ndarray] = []
    for start in range(0, len(texts), 10_000):
        batch = tokenizer.encode_batch_fast(list(texts[start : start + 10_000]), add_special_tokens=False)
        rows: np.ndarray = np.full((len(batch), max(len(encoding.ids) for encoding in batch)), PAD, dtype=np.int32)
        for row, encoding in zip(rows, batch, strict=True):
            row[: len(encoding.ids)] = encoding.ids
        ids.append(rows)
    width = max(rows.shape[1] for rows in ids)
    return np.concatenate([np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=PAD) for rows in ids])


def sid_sequences(tokenizer: "PreTrainedTokenizerFast", sids: Sequence[str]) -> np.ndarray:
    """Token ids of SIDs as [S, D - 1], padded with PAD; one row per SID, in order. Unchecked: see `sid_responses`."""
    return token_rows(tokenizer.backend_tokenizer, sids)
