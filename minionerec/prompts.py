"""The tasks, their weights and the wording of their prompts, in one table.

A prompt file (`--prompt_file`, JSON) replaces any part of the wording:

    {"template": "{instruction}\\n{input}\\nAnswer:\\n",
     "tasks": {"sid_history_to_sid": {"instruction": "...", "input": "...", "weight": 2}}}
"""

import json
import string
from dataclasses import asdict, dataclass, replace

from minionerec.checkpoint import read_run
from minionerec.cli import InputError

# How the categories of the public MiniOneRec release are spoken of; any other text is used as it stands.
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

    `rows` says what a row is: an "interaction" of a CSV file, or an "item" of the catalogue. `input` and `response`
    are format strings over the fields of that row: {sid_history}, {title_history}, {sid}, {title}, {description}.
    `weight` is how many times an epoch runs over the task.
    """

    name: str
    rows: str
    instruction: str
    input: str
    response: str
    weight: int = 1


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

# What `--tasks all` stands for in sft.py and in rl.py.
SFT_TASKS = tuple(name for name in TASKS if name != "description_to_sid")
RL_TASKS = ("sid_history_to_sid", "title_to_sid", "description_to_sid", "title_history_to_sid")

# The task that is validated on during training and asked of every row by evaluate.py.
RECOMMENDATION = "sid_history_to_sid"

SEPARATOR = ", "


@dataclass(frozen=True)
class Prompts:
    """The wording of a run: what a checkpoint records and a later command reads back."""

    template: str
    tasks: dict[str, Task]
    category: str

    def render(self, task: Task, fields: dict[str, str]) -> str:
        """The prompt of one row, up to the place where the response begins."""
        instruction = task.instruction.replace("{category}", self.category)
        # The fields go in last and in one pass, so braces in a title stay what they are.
        return self.template.format(instruction=instruction, input=task.input.format(**fields))

    @property
    def need_titles(self) -> bool:
        """Whether a task on interactions reads or writes titles."""
        tasks = [task for task in self.tasks.values() if task.rows == "interaction"]
        return any("title" in name for task in tasks for name in _field_names(task.input + task.response))

    def for_validation(self) -> "Prompts":
        """The recommendation task alone; where it is not trained, the other tasks on interactions."""
        if RECOMMENDATION in self.tasks:
            return replace(self, tasks={RECOMMENDATION: self.tasks[RECOMMENDATION]})
        return replace(self, tasks={name: task for name, task in self.tasks.items() if task.rows == "interaction"})

    def only(self, name: str) -> "Prompts":
        """One task alone, in the built-in wording where these prompts lack it."""
        return replace(self, tasks={name: self.tasks.get(name, TASKS[name])})

    def to_json(self) -> dict:
        return {"template": self.template, "category": self.category, "tasks": [asdict(t) for t in self.tasks.values()]}

    @staticmethod
    def from_json(data: dict) -> "Prompts":
        tasks = [Task(**task) for task in data["tasks"]]
        return Prompts(data["template"], {task.name: task for task in tasks}, data["category"])


def _field_names(text: str) -> set[str]:
    """The fields of a format string. Raises ValueError where it is none, or says how to format a field."""
    names = set()
    for _, name, spec, conversion in string.Formatter().parse(text):
        if spec or conversion:
            raise ValueError(f"write {{{name}}} without a conversion or format")
        if name is not None:
            names.add(name)
    return names


def _override(task: Task, changes: object, path: str) -> Task:
    if not isinstance(changes, dict):
        raise InputError(f"{path}: task {task.name!r} must be an object of instruction, input, response or weight")
    unknown = set(changes) - {"instruction", "input", "response", "weight"}
    if unknown:
        raise InputError(f"{path}: task {task.name!r} has unknown keys {sorted(unknown)}")
    weight = changes.get("weight", task.weight)
    if not isinstance(weight, int) or isinstance(weight, bool) or weight < 1:
        raise InputError(f"{path}: the weight of task {task.name!r} must be a whole number above 0, not {weight!r}")
    for key in {"instruction", "input", "response"} & set(changes):
        if not isinstance(changes[key], str):
            raise InputError(f"{path}: {key} of task {task.name!r} must be text")
    allowed = {
        "interaction": {"sid_history", "title_history", "sid", "title"},
        "item": {"sid", "title", "description"},
    }[task.rows]
    if task.response == "{sid}" and changes.get("response", "{sid}") != "{sid}":
        raise InputError(
            f"{path}: response of task {task.name!r} must stay {{sid}}: a SID is decoded right behind the prompt; "
            "other words go into the template"
        )
    # The answer may not stand in the question: a history task sees the target in its response alone.
    targets = {"sid", "title"} if task.rows == "interaction" else set()
    new = replace(task, **changes)
    for key, names in (("input", allowed - targets), ("response", allowed)):
        try:
            unknown = _field_names(getattr(new, key)) - names
        except ValueError as error:
            raise InputError(f"{path}: {key} of task {task.name!r} is no format string: {error}") from None
        if unknown:
            raise InputError(
                f"{path}: {key} of task {task.name!r} names unknown fields {sorted(unknown)}; there are {sorted(names)}"
            )
    return new


def load_prompts(
    category: str, prompt_file: str | None = None, tasks: str = "all", default: tuple[str, ...] = SFT_TASKS
) -> Prompts:
    """The wording for `category`: the table above, or what `prompt_file` puts in its place, for the chosen tasks.

    `tasks` holds names separated by commas, or is "all" for those of `default`. Raises InputError for an unreadable
    file, an unknown task, key or field.
    """
    template, table = TEMPLATE, dict(TASKS)
    if prompt_file:
        try:
            with open(prompt_file, encoding="utf-8") as file:
                data = json.load(file)
        except (OSError, ValueError) as error:
            raise InputError(f"--prompt_file {prompt_file}: cannot be read as JSON: {error}") from None
        if not isinstance(data, dict) or set(data) - {"template", "tasks"}:
            raise InputError(f"--prompt_file {prompt_file}: expected an object with template and tasks")
        template = data.get("template", template)
        try:
            named = _field_names(template) if isinstance(template, str) else set()
        except ValueError:
            named = set()
        if named != {"instruction", "input"}:
            raise InputError(f"--prompt_file {prompt_file}: template must contain {{instruction}} and {{input}} alone")
        if not isinstance(data.get("tasks", {}), dict):
            raise InputError(f"--prompt_file {prompt_file}: tasks must be an object of task names")
        for name, changes in data.get("tasks", {}).items():
            if name not in table:
                raise InputError(f"--prompt_file {prompt_file}: unknown task {name!r}; there are {', '.join(table)}")
            table[name] = _override(table[name], changes, f"--prompt_file {prompt_file}")
    if tasks != "all":
        chosen = [name.strip() for name in tasks.split(",") if name.strip()]
        unknown = [name for name in chosen if name not in table]
        if unknown or not chosen:
            raise InputError(f"--tasks {tasks!r}: unknown {', '.join(unknown)}; there are all, {', '.join(table)}")
    else:
        chosen = default
    return Prompts(
        template, {name: task for name, task in table.items() if name in chosen}, CATEGORIES.get(category, category)
    )


def recorded_prompts(
    checkpoint: str, category: str, prompt_file: str | None = None, tasks: str = "all", default: tuple[str, ...] = ()
) -> Prompts:
    """The wording a later command uses with a checkpoint: of `prompt_file` where one is given, else what the checkpoint
    recorded, else the table above. Tasks it was not trained on come in the built-in wording, but in its own template
    and category."""
    recorded = read_run(checkpoint).get("prompts")
    if not category.strip() and recorded is None:
        recorded_none = f", and {checkpoint} recorded none" if checkpoint else ""
        raise InputError(f"--category is missing{recorded_none}; say what the items are")
    prompts = load_prompts(category or recorded["category"], prompt_file, tasks, default)
    if prompt_file or recorded is None:
        return prompts
    known = Prompts.from_json(recorded)
    return replace(known, tasks={name: known.tasks.get(name, task) for name, task in prompts.tasks.items()})


def differing_prompts(checkpoint: str, prompts: Prompts) -> list[str]:
    """A warning, or none, where a checkpoint was trained with another wording of the tasks that it shares."""
    recorded = read_run(checkpoint).get("prompts")
    known = Prompts.from_json(recorded) if recorded else prompts
    differ = [name for name, task in prompts.tasks.items() if known.tasks.get(name, task) != task]
    if not differ and known.template == prompts.template:
        return []
    what = f"tasks {', '.join(differ)}" if differ else "template"
    return [f"warning: the wording of --prompt_file differs from the one {checkpoint} was trained with: {what}"]
