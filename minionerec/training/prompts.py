"""The prompts of RL steps: which rows, in which order, and what the dataset says of them."""

from collections.abc import Callable, Iterator

import datasets
import torch
from trl.trainer.utils import RepeatSampler

Columns = dict[str, list]  # of a batch, by name: `prompt`, `target`, `row` and what else the rewards use


class RowNumbers(torch.utils.data.Dataset):
    """`count` rows, each of which holds only its number: pinning and moving a batch visit every int of every list in
    it, and a batch would hold each prompt once per completion."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> dict[str, int]:
        return {"row": row}


def look_up(dataset: datasets.Dataset, rows: list[dict[str, int]]) -> Columns:
    """The columns of a batch of `RowNumbers`, with each row's number as `row`. The completions of a prompt share one
    value."""
    numbers = [row["row"] for row in rows]
    distinct = list(dict.fromkeys(numbers))
    place = {number: i for i, number in enumerate(distinct)}
    found = {**dataset[distinct], "row": distinct}
    return {name: [values[place[number]] for number in numbers] for name, values in found.items()}


class PromptSampler(RepeatSampler):
    """TRL's sampler in an order that depends on the seed and the epoch only, so that a resumed run gets the same
    prompts.

    Args:
        epoch: gives the epoch of the run.
        settings: those of TRL's sampler.
    """

    def __init__(self, epoch: Callable[[], float | None], **settings: object):
        super().__init__(**settings)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + int(self.epoch() or 0))
        return super().__iter__()
