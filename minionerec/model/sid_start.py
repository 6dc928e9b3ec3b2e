"""The rows that new SID tokens start with, in the embedding and in an output head of its own.

Dimensions: `H` hidden, `N` new tokens, `V` vocabulary.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minionerec.data.control_tokens import ControlTokens
from minionerec.data.encoding import batches
from minionerec.data.files import Catalogue
from minionerec.model import int8_rows

ROWS_AT_ONCE = 4096  # rows of a matrix that are read as float32 at a time


def start_sid_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    new_tokens: Sequence[str],
    catalogue: Catalogue,
    way: str,
) -> None:
    """Sets the rows of new SID tokens, in place.

    Args:
        model: with a row for every token, before an adapter is added.
        new_tokens: the SID tokens that the base did not have.
        way: "text", the mean of the rows of the titles of the items whose SID has the token, or the mean row where
            none has a title; "mean", the mean row of the tokens of the base; "random", as `resize_token_embeddings`
            left them.
    """
    if way == "random" or not new_tokens:
        return
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(new_tokens)))
    embeddings = {id(layer.weight): layer for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    known = torch.tensor(sorted(tokenizer.get_vocab().values()))
    for layer in embeddings.values():
        rows = _mean_row(layer.weight, known, ids).expand(len(ids), -1).clone()
        if way == "text":
            total, count = _title_rows(layer.weight, tokenizer, new_tokens, catalogue)
            rows[count > 0] = total[count > 0] / count[count > 0, None]
        if isinstance(layer, int8_rows.Int8Layer):
            int8_rows.set_rows(layer, ids, rows)
        else:
            with torch.no_grad():
                layer.weight[ids] = rows.to(layer.weight)


def _mean_row(weight: torch.Tensor | int8_rows.Rows, known: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The mean [H] of the rows of a weight [V, H] that belong to a token whose id is in `known`, and not in `new`."""
    old = known[~torch.isin(known, new)]
    total = sum(weight[part].float().sum(dim=0).cpu() for part in old.split(ROWS_AT_ONCE))
    return total / len(old)


def _title_rows(
    weight: torch.Tensor | int8_rows.Rows,
    tokenizer: PreTrainedTokenizerFast,
    new_tokens: Sequence[str],
    catalogue: Catalogue,
) -> tuple[torch.Tensor, torch.Tensor]:
    """For every new token, the sum [N, H] of the mean rows of the titles of its items, and how many these are, [N]."""
    number = {token: place for place, token in enumerate(new_tokens)}
    total, count = torch.zeros(len(number), weight.shape[1]), torch.zeros(len(number))
    control = ControlTokens(tokenizer.backend_tokenizer)
    titled = [item for item in catalogue.items.values() if item.title]
    for items in batches(titled, 1024):
        words = control.tokenize([item.title for item in items])
        lengths = torch.tensor([len(title) for title in words])
        flat = torch.tensor([token for title in words for token in title], dtype=torch.long)
        read = weight[flat].detach().float().cpu()
        titles = torch.zeros(len(items), weight.shape[1])
        titles.index_add_(0, torch.arange(len(items)).repeat_interleave(lengths), read)
        titles /= lengths.clamp(min=1)[:, None]
        pairs = [
            (number[token], place)
            for place, item in enumerate(items)
            for token in catalogue.tokens_of[item.sid]
            if token in number
        ]
        tokens, places = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
        total.index_add_(0, tokens, titles[places])
        count.index_add_(0, tokens, (lengths[places] > 0).float())  # a title may be nothing to a tokenizer
    return total, count
