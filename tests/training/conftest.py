"""A start for trainers of reinforcement, made once."""

import pytest
import torch

from minionerec.data.files import read_catalogue, read_info
from minionerec.model import loading


@pytest.fixture(scope="session")
def sft(files, base, tmp_path_factory):
    """A whole checkpoint that knows the catalogue: (folder, tokenizer, SIDs, ids of the SID tokens)."""
    folder = str(tmp_path_factory.mktemp("sft"))
    torch.manual_seed(0)
    tokenizer, model = loading.load_tokenizer(base), loading.load_base(base)
    ids = loading.add_sid_tokens(model, tokenizer, read_catalogue(files["index"]).sid_tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # predictions that differ between items
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer, read_info(files["info"]), ids
