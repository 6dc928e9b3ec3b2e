"""Counts the rows that have the texts a task needs, before a model is loaded. Only the standard library is imported."""

from collections.abc import Iterable

from minionerec.data.files import Catalogue, Interaction, Item, read_interactions
from minionerec.data.prompts import Prompts, Task
from minionerec.errors import Problems


def check_interactions(
    problems: Problems, flag: str, path: str, sids: Iterable[str] | None, prompts: Prompts | None
) -> tuple[int, list[str]]:
    """Checks every row of an interactions file, and that at least one has the texts of a task.

    Returns the number of rows, and a line for each task that skips some of them.
    """
    tasks = [task for task in prompts.tasks.values() if task.rows == "interaction"] if prompts else []
    titles = prompts is not None and prompts.need_titles
    counted = problems.attempt(_count_suited, read_interactions(path, flag, sids, titles), tasks)
    if counted is None:
        return 0, []
    num_rows, suited = counted
    if suited and not any(suited.values()):
        problems.add(f"--{flag} {path}: no row has the titles that {', '.join(suited)} need; choose other --tasks")
    return num_rows, _left_out(path, num_rows, suited)


def items_left_out(catalogue: Catalogue | None, prompts: Prompts | None, path: str) -> list[str]:
    """A line for each task that skips items of the catalogue, because the file at `path` lacks their texts."""
    if catalogue is None or prompts is None:
        return []
    tasks = [task for task in prompts.tasks.values() if task.rows == "item"]
    return _left_out(path, *_count_suited(catalogue.items.values(), tasks))


def _count_suited(rows: Iterable[Interaction | Item], tasks: list[Task]) -> tuple[int, dict[str, int]]:
    """The number of rows, and for each task the number of rows that have its texts."""
    count, suited = 0, [0] * len(tasks)
    for row in rows:
        count += 1
        for i, task in enumerate(tasks):
            suited[i] += task.suits(row)
    return count, {task.name: number for task, number in zip(tasks, suited, strict=True)}


def _left_out(path: str, num_rows: int, suited: dict[str, int]) -> list[str]:
    return [
        f"{path}: {num_rows - number:,} of {num_rows:,} rows lack a text that {name} needs; this task skips them"
        for name, number in suited.items()
        if number < num_rows
    ]
