"""The tasks, their weights and the wording of their prompts, in one table.

A prompt file (`--prompt_file`, JSON) replaces any part of the wording:

    {"template": "{instruction}\\n{input}\\nAnswer:\\n",
     "tasks": {"sid_history_to_sid": {"instruction": "...", "input": "...", "response": "{sid}\\n", "weight": 2}}}

Prompts recorded in a checkpoint go through the same checks as a prompt file.
"""

import json
import string
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from minionerec.data.files import Interaction, Item, check_is_file, is_text, shorten
from minionerec.errors import InputError, Problems

# How prompts name the categories of the public MiniOneRec release; any other category is used as given.
CATEGORIES = {
    "Industrial_and_Scientific": "industrial and scientific items",
    "Office_Products": "office products",
    "Toys_and_Games": "toys and games",
    "Sports": "sports and outdoors",
    "Sports_and_Outdoors": "sports and outdoor items",
    "Video_Games": "video games",
    "Books": "books",
}


@dataclass(frozen=True)
class Task:
    """One way to turn a row into a prompt and a response.

    Attributes:
        name: the name of the task, for `--tasks` and messages.
        rows: what a row is: an "interaction" of a CSV file, or an "item" of the catalogue.
        instruction: the text before the input; {category} stands for the category.
        input, response: format strings over the fields of a row: {sid_history}, {title_history}, {sid}, {title},
            {description}. A response with a SID starts with it and may end with a fixed text.
        weight: how many times an epoch goes through the task.
    """

    name: str
    rows: str
    instruction: str
    input: str
    response: str
    weight: int = 1

    @property
    def ending(self) -> str | None:
        """The fixed text after the SID of the response, or None if the response is not a SID."""
        (before, field, *_), *rest = [*string.Formatter().parse(self.response)] or [("", None, None, None)]
        if before or field != "sid" or any(field is not None for _, field, *_ in rest):
            return None
        return "".join(text for text, *_ in rest)

    @cached_property
    def fields(self) -> frozenset[str]:
        """The fields of a row that the task reads or writes."""
        return frozenset(_fields(self.input + self.response))

    def suits(self, row: Interaction | Item) -> bool:
        """Whether a row has every text that the task reads or writes; a history needs at least one title."""
        if "title" in self.fields and not row.title:
            return False
        if isinstance(row, Item):
            return "description" not in self.fields or bool(row.description)
        return "title_history" not in self.fields or any(map(str.strip, row.title_history))


TEMPLATE = "{instruction}\n{input}\nAnswer:\n"

TASKS = {
    task.name: task
    for task in [
        Task(
            "sid_history_to_sid",
            "interaction",
            "A customer bought these {category}, oldest first, given as semantic IDs. Predict the semantic ID of the "
            "next purchase.",
            "Purchases: {sid_history}",
            "{sid}",
        ),
        Task(
            "title_to_sid",
            "item",
            "Give the semantic ID of the item with this title.",
            "Title: {title}",
            "{sid}",
        ),
        Task(
            "description_to_sid",
            "item",
            "Give the semantic ID of the item with this description.",
            "Description: {description}",
            "{sid}",
        ),
        Task(
            "sid_to_title",
            "item",
            "Give the title of the item with this semantic ID.",
            "Semantic ID: {sid}",
            "{title}",
        ),
        Task(
            "sid_history_to_title",
            "interaction",
            "A customer bought these {category}, oldest first, given as semantic IDs. Predict the title of the next "
            "purchase.",
            "Purchases: {sid_history}",
            "{title}",
        ),
        Task(
            "title_history_to_title",
            "interaction",
            "A customer bought these {category}, oldest first, given by title. Predict the title of the next purchase.",
            "Purchases: {title_history}",
            "{title}",
        ),
        Task(
            "title_history_to_sid",
            "interaction",
            "A customer bought these {category}, oldest first, given by title. Predict the semantic ID of the next "
            "purchase.",
            "Purchases: {title_history}",
            "{sid}",
        ),
    ]
}

# What `--tasks all` means in sft.py and in rl.py.
SFT_TASKS = tuple(name for name in TASKS if name != "description_to_sid")
RL_TASKS = ("sid_history_to_sid", "title_to_sid", "description_to_sid", "title_history_to_sid")

# The task that training validates on, and that evaluate.py runs on every row.
RECOMMENDATION = "sid_history_to_sid"

SEPARATOR = ", "


@dataclass(frozen=True)
class Prompts:
    """The wording of a run: what a checkpoint records and a later command reads back."""

    template: str
    tasks: dict[str, Task]
    category: str

    def render(self, task: Task, fields: dict[str, str]) -> str:
        """The prompt of one row, up to where the response starts."""
        instruction = task.instruction.replace("{category}", self.category)
        # The fields are filled in last and in one pass, so braces in a title are kept.
        return self.template.format(instruction=instruction, input=task.input.format(**fields))

    @property
    def need_titles(self) -> bool:
        """Whether a task on interactions reads or writes titles."""
        return any(
            "title" in name for task in self.tasks.values() if task.rows == "interaction" for name in task.fields
        )

    def for_validation(self) -> "Prompts":
        """Only the recommendation task, or the other tasks on interactions if that one is not trained."""
        if RECOMMENDATION in self.tasks:
            return replace(self, tasks={RECOMMENDATION: self.tasks[RECOMMENDATION]})
        return replace(self, tasks={name: task for name, task in self.tasks.items() if task.rows == "interaction"})

    def only(self, name: str) -> "Prompts":
        """Only the task `name`, in the built-in wording if these prompts do not have it."""
        return replace(self, tasks={name: self.tasks.get(name, TASKS[name])})

    def to_json(self) -> dict:
        """What a checkpoint records."""
        return {"template": self.template, "category": self.category, "tasks": [asdict(t) for t in self.tasks.values()]}

    @staticmethod
    def from_json(data: object, place: str = "prompts") -> "Prompts":
        """The prompts that `to_json` wrote. Raises InputError, naming `place`, for what a prompt file may not hold."""
        if not isinstance(data, dict) or set(data) != {"template", "category", "tasks"}:
            raise InputError(f"{place}: expected an object of template, category and tasks")
        template = _checked_template(data["template"], place)
        category = _checked_text(data["category"], f"{place}: category")
        if not isinstance(data["tasks"], list) or not all(isinstance(task, dict) for task in data["tasks"]):
            raise InputError(f"{place}: tasks must be a list of objects")
        problems = Problems()
        tasks: dict[str, Task] = {}
        for task in data["tasks"]:
            name, kind = task.get("name"), task.get("rows")
            known = TASKS.get(name) if isinstance(name, str) else None
            if known is None or kind != known.rows or name in tasks:
                problems.add(f"{place}: task {_shown(name)} on rows {_shown(kind)} is unknown or listed twice")
            else:
                wording = {key: value for key, value in task.items() if key not in ("name", "rows")}
                tasks[name] = problems.attempt(_override, known, wording, place) or known
        problems.check()
        return Prompts(template, tasks, category)


MOST_TEXT = 10_000  # characters of a template, instruction, input, response or category
MOST_REPEATS = 10  # of one field in a text
MOST_WEIGHT = 100


def _shown(value: object) -> str:
    return shorten(value, 60)


def _checked_text(text: object, what: str) -> str:
    if not is_text(text):
        raise InputError(f"{what} must be text, not {_shown(text)}")
    if len(text) > MOST_TEXT:
        raise InputError(f"{what} has {len(text):,} characters; at most {MOST_TEXT:,} are allowed")
    return text


def _checked_template(template: object, place: str) -> str:
    text = _checked_text(template, f"{place}: template")
    try:
        named = sorted(_fields(text))
    except ValueError:
        named = []
    if named != ["input", "instruction"]:
        raise InputError(f"{place}: template must contain {{instruction}} and {{input}}, each once, and no other field")
    return text


def _fields(text: str) -> list[str]:
    """The fields of a format string, in order. Raises ValueError if it is not one, or has a conversion or format."""
    names = []
    for _, name, spec, conversion in string.Formatter().parse(text):
        if spec or conversion:
            raise ValueError(f"write {shorten(name, 60)} without a conversion or format")
        if name is not None:
            names.append(name)
    return names


def _override(task: Task, changes: object, place: str) -> Task:
    """The task with another wording. Raises InputError, naming `place`, for a wording that cannot be used."""
    if not isinstance(changes, dict):
        raise InputError(f"{place}: task {task.name!r} must be an object of instruction, input, response or weight")
    unknown = set(changes) - {"instruction", "input", "response", "weight"}
    if unknown:
        raise InputError(f"{place}: task {task.name!r} has unknown keys {_shown(sorted(unknown))}")
    weight = changes.get("weight", task.weight)
    if type(weight) is not int or not 1 <= weight <= MOST_WEIGHT:
        raise InputError(
            f"{place}: the weight of task {task.name!r} must be a whole number from 1 to {MOST_WEIGHT}, not "
            f"{_shown(weight)}"
        )
    for key in ("instruction", "input", "response"):
        _checked_text(changes.get(key, ""), f"{place}: {key} of task {task.name!r}")
    new = replace(task, **changes)
    allowed = {
        "interaction": {"sid_history", "title_history", "sid", "title"},
        "item": {"sid", "title", "description"},
    }[task.rows]
    named: dict[str, list[str]] = {}
    for key in ("response", "input"):
        # A prompt must not contain its answer: on items no field of the response, on interactions neither the SID nor
        # the title of the target.
        hidden = {"sid", "title"} if task.rows == "interaction" else set(named.get("response", ()))
        names = allowed - hidden if key == "input" else allowed
        try:
            named[key] = _fields(getattr(new, key))
        except ValueError as error:
            raise InputError(f"{place}: {key} of task {task.name!r} is not a format string: {error}") from None
        unknown = set(named[key]) - names
        if unknown:
            raise InputError(
                f"{place}: {key} of task {task.name!r} names unknown fields {_shown(sorted(unknown))}; the known ones "
                f"are {sorted(names)}"
            )
        if any(named[key].count(name) > MOST_REPEATS for name in names):
            raise InputError(f"{place}: {key} of task {task.name!r} names a field more than {MOST_REPEATS} times")
    if not named["response"]:
        raise InputError(f"{place}: response of task {task.name!r} names no field; it must contain at least one")
    if task.ending is not None and new.ending is None:
        raise InputError(
            f"{place}: response of task {task.name!r} must begin with {{sid}}, and only a fixed text may follow it: "
            "a SID is decoded right after the prompt; put other words into the template"
        )
    return new


def load_prompts(
    category: str, prompt_file: str | None = None, tasks: str = "all", default: tuple[str, ...] = SFT_TASKS
) -> Prompts:
    """The wording for `category` of the chosen tasks: the table above, with what `prompt_file` replaces.

    `tasks` is names separated by commas, or "all" for those of `default`. Raises InputError for an unreadable file, or
    an unknown task, key or field.
    """
    template, table = TEMPLATE, dict(TASKS)
    if prompt_file:
        check_is_file(prompt_file, "prompt_file")
        try:
            with open(prompt_file, encoding="utf-8-sig") as file:
                data = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"--prompt_file {prompt_file}: cannot be read as JSON: {error}") from None
        if not isinstance(data, dict) or set(data) - {"template", "tasks"}:
            raise InputError(f"--prompt_file {prompt_file}: expected an object with template and tasks")
        template = _checked_template(data.get("template", template), f"--prompt_file {prompt_file}")
        if not isinstance(data.get("tasks", {}), dict):
            raise InputError(f"--prompt_file {prompt_file}: tasks must be an object with task names as keys")
        problems = Problems()
        for name, changes in data.get("tasks", {}).items():
            if name in table:
                new = problems.attempt(_override, table[name], changes, f"--prompt_file {prompt_file}")
                table[name] = new or table[name]
            else:
                problems.add(
                    f"--prompt_file {prompt_file}: unknown task {_shown(name)}; the tasks are {', '.join(table)}"
                )
        problems.check()
    chosen: Sequence[str] = default
    if tasks != "all":
        chosen = [name.strip() for name in tasks.split(",") if name.strip()]
        unknown = [name for name in chosen if name not in table]
        if unknown or not chosen:
            raise InputError(
                f"--tasks {tasks!r}: unknown {', '.join(unknown)}; choose all, or some of {', '.join(table)}"
            )
    wanted = {name: task for name, task in table.items() if name in chosen}
    return Prompts(template, wanted, CATEGORIES.get(category, category))
