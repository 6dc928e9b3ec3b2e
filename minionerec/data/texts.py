"""Counts the rows that have the texts a task needs, before a model is loaded. Only the standard library is imported."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from minionerec.data.files import Catalogue, Interaction, Item, check_rows, read_interactions, sample_rows
from minionerec.data.prompts import Prompts
from minionerec.errors import Problems

R = TypeVar("R", Interaction, Item)


@dataclass(frozen=True)
class CheckedFile:
    """An interactions file whose rows are right: how many of them have the texts of at least one task, how many
    examples all tasks make of them, and a line for each task that skips some."""

    num_usable: int = 0
    num_examples: int = 0
    notes: list[str] = field(default_factory=list)


def check_interactions(
    problems: Problems, flag: str, path: str, sids: Iterable[str] | None, prompts: Prompts | None
) -> CheckedFile:
    """Checks every row of an interactions file, and that at least one has the texts of a task."""
    tasks = [task for task in prompts.tasks.values() if task.rows == "interaction"] if prompts else []
    titles = prompts is not None and prompts.need_titles
    counted = problems.attempt(check_rows, path, flag, sids, titles)
    if counted is None:
        return CheckedFile()
    rows = [(_row_with(*texts), count) for texts, count in counted.items()]
    suited = {task.name: sum(count for row, count in rows if task.suits(row)) for task in tasks}
    if suited and not any(suited.values()):
        problems.add(f"--{flag} {path}: no row has the titles that {', '.join(suited)} need; choose other --tasks")
    usable = sum(count for row, count in rows if any(task.suits(row) for task in tasks))
    examples = sum(suited[task.name] * task.weight for task in tasks)
    return CheckedFile(usable, examples, _left_out(path, sum(counted.values()), suited))


def _row_with(target: bool, history: bool) -> Interaction:
    """A row that has the title of the target, or a title in the history, or not."""
    return Interaction(["sid"], ["title" * history], "sid", "title" * target)


def usable(rows: Iterable[R], prompts: Prompts, kind: str) -> Iterator[R]:
    """The rows, each an "interaction" or an "item" as `kind` says, that have the texts of at least one task."""
    tasks = [task for task in prompts.tasks.values() if task.rows == kind]
    return (row for row in rows if any(task.suits(row) for task in tasks))


@dataclass(frozen=True)
class ValidationRows:
    """The rows of --eval_file that a training validates on: `sample` of the `count` that have the texts of at least one
    task, chosen by `seed`; -1 for all."""

    path: str
    sids: Iterable[str] | None
    prompts: Prompts
    count: int
    sample: int
    seed: int

    def __iter__(self) -> Iterator[Interaction]:
        rows = read_interactions(self.path, "eval_file", self.sids, self.prompts.need_titles)
        return sample_rows(usable(rows, self.prompts, "interaction"), self.count, self.sample, self.seed)

    @property
    def notes(self) -> list[str]:
        """A line if some are left out by chance."""
        chosen = self.sample if 0 <= self.sample < self.count else 0
        return [f"{self.path}: validating on {chosen:,} of {self.count:,} rows (--eval_sample)"] if chosen else []

    @property
    def choice(self) -> dict[str, int]:
        """What the chosen rows depend on, next to the file."""
        return {"sample": self.sample, "seed": self.seed} if self.notes else {}


def items_left_out(catalogue: Catalogue | None, prompts: Prompts | None, path: str) -> list[str]:
    """A line for each task that skips items of the catalogue, because the file at `path` lacks their texts."""
    if catalogue is None or prompts is None:
        return []
    items = catalogue.items.values()
    tasks = [task for task in prompts.tasks.values() if task.rows == "item"]
    return _left_out(path, len(items), {task.name: sum(map(task.suits, items)) for task in tasks})


def _left_out(path: str, num_rows: int, suited: dict[str, int]) -> list[str]:
    return [
        f"{path}: {num_rows - number:,} of {num_rows:,} rows lack a text that {name} needs; this task skips them"
        for name, number in suited.items()
        if number < num_rows
    ]
