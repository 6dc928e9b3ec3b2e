"""The tokenizer of the tiny base with its SID tokens, and the rows of the files."""

import pytest

from minionerec.data.files import read_catalogue, read_interactions
from minionerec.model.loading import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(base, files):
    tokenizer = load_tokenizer(base)
    tokenizer.add_tokens(read_catalogue(files["index"]).sid_tokens)
    return tokenizer


@pytest.fixture(scope="session")
def rows_of(files):
    """`rows_of(kind)`: the items, or the training rows."""
    items = read_catalogue(files["index"], files["item"]).items_with_text()
    return lambda kind: items if kind == "item" else read_interactions(files["train"], "train_file")
