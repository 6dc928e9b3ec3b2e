"""The prompts of RL steps: which rows, in which order, and what the dataset says of them."""

from collections.abc import Callable, Iterator

import datasets
from trl.trainer.utils import RepeatSampler

Columns = dict[str, list]  # of a batch, by name: `prompt`, `target`, `row` and what else the rewards use


def look_up(dataset: datasets.Dataset, rows: list[int]) -> Columns:
    """The columns of a batch of rows, by their numbers, which are the column `row`. The completions of a prompt share
    one value."""
    distinct = list(dict.fromkeys(rows))
    place = {row: i for i, row in enumerate(distinct)}
    found = {**dataset[distinct], "row": distinct}
    return {name: [values[place[row]] for row in rows] for name, values in found.items()}


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
