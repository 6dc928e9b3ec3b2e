"""What a checkpoint folder says about itself, read once. Only the standard library is imported."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from minionerec import world
from minionerec.data.files import Catalogue, read_json, sha256_of, shorten
from minionerec.data.prompts import RECOMMENDATION, Prompts, load_prompts
from minionerec.errors import InputError, Problems
from minionerec.flags import AdapterFlags, PromptFlags, engine
from minionerec.sasrec_files import WEIGHTS_FILE
from minionerec.validation import ADAPTER, FLAGS, RUN, TRAINER_STATE, check_values
from minionerec.version import __version__

RUN_FILE = "minionerec.json"  # the resolved configuration of the run that wrote the checkpoint
ADAPTER_FILE = "adapter_config.json"
PENALTY_FILE = "penalty-"  # starts the name of a file that evaluate.py adds: no part of the model
NAME_BASE = "name it with --base_model"
RECORDED_ITEMS = 64  # enough to tell catalogues apart, few next to an adapter
RECOMMENDS_WRONGLY = "what it recommends is wrong; give the file of its training, or train on this catalogue"
LEARNED_OTHERS = (
    "what it has learned about a SID is about another item; give rows and index with the SIDs of its training, or "
    "start from the base that it was trained on"
)
# What runs of 0.1 did, by the flags that it lacked. A new flag that its runs can resume with belongs here too.
LACKED_IN_0_1: dict[str, dict[str, object]] = {
    "sft": {
        "optim": "adamw_torch_fused",
        "pack_rows": 0,
        "sid_init": "random",
        "sid_learning_rate": 0.0,
        "eval_sample": -1,
        "cf_path": "",
    },
    "rl": {
        "optim": "adamw_torch_fused",
        "best_by": "ndcg",
        "reward_weights": "",
        "sft_weight": 0.0,
        "average_weights": False,
        "listwise": False,
        "eval_sample": -1,
    },
}


def is_adapter(path: str) -> bool:
    """Whether a folder holds a PEFT adapter rather than a whole model."""
    return os.path.isfile(os.path.join(path, ADAPTER_FILE))


DATA_FLAGS = ("train_file", "eval_file", "info_file", "sid_index_path", "item_meta_path", "ada_path", "cf_path")


def run_record(
    command: str,
    method: str,
    flags: dict,
    prompts: Prompts,
    base_fingerprint: str | None,
    catalogue: Catalogue,
) -> dict:
    """What a run writes into each of its checkpoints, as `Checkpoint.run`."""
    tokens, items = catalogue.sid_tokens, list(catalogue.items.items())
    return {
        "command": command,
        "method": method,
        "version": __version__,
        "engine": engine(),
        "processes": world.size(),
        "flags": flags,
        "prompts": prompts.to_json(),
        "base_fingerprint": base_fingerprint,
        "sid_tokens": f"{len(tokens)} tokens, {sha256(' '.join(tokens).encode()).hexdigest()[:12]}",
        "items": {name: item.sid for name, item in items[:: max(1, len(items) // RECORDED_ITEMS)][:RECORDED_ITEMS]},
        "data": {name: digest(file) for name in DATA_FLAGS if os.path.isfile(file := _file_of(flags.get(name) or ""))},
    }


def _file_of(path: str) -> str:
    """The file that tells whether the content of a path has changed: of the folder of a SASRec model its weights."""
    return os.path.join(path, WEIGHTS_FILE) if os.path.isdir(path) else path


def digest(path: str) -> str:
    """The content of a file, in words."""
    return f"a file of {os.path.getsize(path)} bytes, {sha256_of(path)[:12]}"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of this project, any other model folder, or the name of a hub model, which says nothing.

    Attributes:
        path: the folder or name.
        adapter: the configuration of a PEFT adapter; None for a whole model.
        run: the resolved configuration of the run that wrote it (command, method, release, engine, processes, flags,
            prompts, fingerprint of the base, SID tokens, SIDs of some items, content of the files, seconds and peak
            memory of training), as this release records it; empty where there is none.
    """

    path: str
    adapter: dict | None = None
    run: dict = field(default_factory=dict)

    @classmethod
    def read(cls, path: str) -> "Checkpoint":
        """Raises InputError where a value that a command would use is of another type or range."""
        problems = Problems()
        adapter = problems.attempt(_read_adapter, path) if is_adapter(path) else None
        run = problems.attempt(_read_run, path)
        problems.check()
        return cls(path, adapter, run or {})

    @property
    def flags(self) -> dict:
        """The flags of the run that wrote it, as far as they are recorded."""
        return self.run.get("flags", {})

    @property
    def release(self) -> tuple[int, int]:
        """The release that wrote it, as (0, 2) for 0.2.1: later ones of the same pair read the same files."""
        return release_of(self.run.get("version", "0.1.0"))

    @property
    def cutoff_len(self) -> int:
        """Tokens of a prompt and its response at most, as in its training; sft.py's default where it says nothing."""
        return self.flags.get("cutoff_len", 512)

    @property
    def adapter_flags(self) -> AdapterFlags:
        """Those of its adapter: method, storage of the base, shape. Defaults where nothing is recorded."""
        known = {f.name for f in fields(AdapterFlags)}
        return AdapterFlags(**{name: value for name, value in self.flags.items() if name in known})

    @property
    def adapter_shape(self) -> dict:
        """The flags that its adapter keeps when it is continued: as recorded, else as PEFT's configuration says."""
        adapter = self.adapter or {}
        named = {"lora_r": "r", **{name: name for name in ("lora_alpha", "use_rslora", "use_dora")}}
        known = {flag: adapter[name] for flag, name in named.items() if name in adapter}
        modules = adapter.get("target_modules") or []  # a text is an expression
        modules = [modules] if isinstance(modules, str) else sorted(modules)
        if targets := [*modules, *(adapter.get("target_parameters") or [])]:
            known["lora_target_modules"] = ",".join(targets)
        known |= self.flags
        return {name: known[name] for name in AdapterFlags.SHAPE if name in known}

    @property
    def base_fingerprint(self) -> str | None:
        """`model.loading.fingerprint` of the base it was trained on, where that is recorded."""
        return self.run.get("base_fingerprint")

    @property
    def engine(self) -> tuple[str, int]:
        """The engine that wrote its optimizer state (`flags.engine`) and over how many processes, 0 if that is unknown:
        as recorded, or as the files of an older release tell."""
        if "engine" in self.run and "processes" in self.run:
            return self.run["engine"], self.run["processes"]
        names = [name for folder in Path(self.path).glob("global_step*") for name in os.listdir(folder)]
        shards = [name for name in names if name.endswith("optim_states.pt")]
        if shards:  # under ZeRO-3 the weights are shards as well
            return "ZeRO-3" if any("zero_pp" in n and "model_states" in n for n in names) else "ZeRO-2", len(shards)
        return "FSDP" if any(Path(self.path).glob("optimizer[._][b0]*")) else "", 0

    @property
    def sid_rows_only(self) -> bool:
        """Whether its adapter is a checkpoint from the middle of a --freeze_LLM run."""
        return self.adapter is not None and self.adapter.get("peft_type") != "LORA"

    @property
    def weights_of_base(self) -> list[str]:
        """The tensors of its adapter that take the place of weights of the base, such as biases or a whole embedding,
        which PEFT may save too. No checkpoint of a run here would hold them."""
        added = ("lora_", "trainable_tokens_delta", *((self.adapter or {}).get("modules_to_save") or ()))
        return [name for name, _ in _shapes(self.path) if not any(part in name for part in added)]

    def base(self, remedy: str = NAME_BASE) -> str:
        """The base model that an adapter names; a whole model is its own. Raises InputError where the adapter names
        none, or a folder that is gone."""
        if self.adapter is None:
            return self.path
        base = self.adapter.get("base_model_name_or_path")
        if not base:
            raise InputError(f"{self.path}: the adapter names no base; {remedy}")
        if os.path.isabs(base) and not os.path.isdir(base):
            raise InputError(f"{self.path}: its base {base} was not found; {remedy}")
        return base

    @cached_property
    def recorded_prompts(self) -> Prompts | None:
        """The wording it was trained with. Raises InputError where that would not do as a prompt file."""
        if self.run.get("prompts") is None:
            return None
        try:
            return Prompts.from_json(self.run["prompts"], f"{os.path.join(self.path, RUN_FILE)}, prompts")
        except InputError as error:
            remedy = "correct it there, or give rl.py and evaluate.py --category and a --prompt_file"
            raise InputError([f"{problem}; {remedy}" for problem in error.problems]) from None

    def prompts(
        self, category: str, prompt_file: str | None = None, tasks: str = "all", default: tuple[str, ...] = ()
    ) -> Prompts:
        """The wording that a later command uses with it: of `prompt_file` where one is given, else what it recorded,
        else the built-in one. Tasks it was not trained on come in the built-in wording, but in its own template and
        category, and with what it writes after a SID. Arguments as in `load_prompts`."""
        category = category if category.strip() else ""
        if not category and self.run.get("prompts") is None:
            recorded_none = f", and {self.path} recorded none" if self.path else ""
            raise InputError(f"--category is missing{recorded_none}; say what the items are")
        known = None if prompt_file and category else self.recorded_prompts
        prompts = load_prompts(category or (known.category if known else ""), prompt_file, tasks, default)
        if prompt_file or known is None:
            return prompts
        responses = {task.response for task in known.tasks.values() if task.ending is not None}
        wordings = {}
        for name, task in prompts.tasks.items():
            if task.ending is not None and len(responses) == 1:
                task = replace(task, response=next(iter(responses)))
            wordings[name] = known.tasks.get(name, task)
        return replace(known, tasks=wordings)

    def notes_on_wording(self, prompts: Prompts, category: str, prompt_file: str | None) -> list[str]:
        """A warning for each way in which `prompts`, which `category` and `prompt_file` gave, may not be what it was
        trained with."""
        try:
            known = self.recorded_prompts
        except InputError as error:
            return [f"warning: {problem}" for problem in error.problems]
        if known is None:
            unknown = f"warning: {self.path} does not record the wording it was trained with; the built-in one is used"
            return [] if prompt_file else [f"{unknown}, unless --prompt_file gives another"]
        notes = [] if prompt_file else self.differing_flags({"category": category}, ("category",))
        differ = [name for name, task in prompts.tasks.items() if known.tasks.get(name, task) != task]
        if prompt_file and (differ or known.template != prompts.template):
            what = f"tasks {', '.join(differ)}" if differ else "template"
            trained = f"the one {self.path} was trained with"
            notes.append(f"warning: the wording of --prompt_file differs from {trained}: {what}")
        if RECOMMENDATION not in known.tasks:
            taught = ", ".join(known.tasks)
            asked = f"was trained on {taught} only, and is asked for {RECOMMENDATION}"
            notes.append(f"warning: {self.path} {asked}")
        return notes

    def notes_on_catalogue(
        self, sid_of_item: Iterable[tuple[str, str]], of: str, then: str = RECOMMENDS_WRONGLY
    ) -> list[str]:
        """A warning if items have other SIDs in a catalogue, pairs of item id and SID from the file that `of` names,
        than in its training. Its tokenizer may know them all: data that were prepared again have the same tokens, and
        SIDs that stand for other items. Items that were added since, and left out, do not count. `then` is what comes
        of it, and the remedy."""
        known = self.run.get("items", {})
        found = {item: sid for item, sid in sid_of_item if item in known}
        other = [item for item, sid in found.items() if sid != known[item]]
        if not other:
            return []
        return [
            f"warning: {of} belongs to a different catalogue than {self.path}: {len(other)} of {len(found)} items that "
            f"were compared have other SIDs there, such as {shorten(other[0])}, so {then}"
        ]

    def differing_flags(self, flags: dict, names: tuple[str, ...]) -> list[str]:
        """A warning for each flag of these names that had another value in the run that wrote it, or, where that is not
        recorded, in its adapter."""
        known = self.adapter_shape | self.flags
        return [
            f"warning: --{name} {flags[name]} is ignored: {self.path} was trained with {known[name]}"
            for name in names
            if flags.get(name) not in ("", None) and known.get(name, flags[name]) != flags[name]
        ]

    def check_trainer_state(self, names: set[str]) -> None:
        """Raises InputError where a run cannot resume from its trainer state: a value has another type, or its name is
        not one of `names`."""
        file, remedy = os.path.join(self.path, "trainer_state.json"), "resume from another checkpoint"
        state = check_values(file, read_json(file), TRAINER_STATE, remedy)
        unknown = sorted(set(state) - names)
        if unknown:
            raise InputError(f"{file}: {shorten(unknown, 60)} are not values of a trainer state; {remedy}")


def _read_adapter(path: str) -> dict:
    """The configuration of a PEFT adapter. Raises InputError where it cannot be used, or where a rank is higher than
    those of the saved weights: PEFT would allocate it before it compares the two."""
    file = os.path.join(path, ADAPTER_FILE)
    config = check_values(file, read_json(file), ADAPTER, "save the adapter again with PEFT, or train it again")
    found = [shape[0] for name, shape in _shapes(path) if ".lora_A" in name and shape]
    rank, pattern = config.get("r") or 0, config.get("rank_pattern") or {}
    if pattern:  # r may be that of no layer
        rank = max([*pattern.values(), rank if rank > 1024 else 0])
    if found and rank > max(found):
        raise InputError(f"{file}: has rank {rank}, and its weights have {max(found)} at most; correct it there")
    return config


def _shapes(path: str) -> list[tuple[str, list[int]]]:
    """Names and shapes of an adapter's tensors, from the head of their file; nothing where that cannot be read."""
    try:
        with open(os.path.join(path, "adapter_model.safetensors"), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(min(length, 100_000_000)))
        return [(name, tensor["shape"]) for name, tensor in head.items() if name != "__metadata__"]
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError):
        return []  # loading it says what is wrong


def _read_run(path: str) -> dict:
    """The record of a run, empty where there is none. Its prompts are checked when they are asked for."""
    file = os.path.join(path, RUN_FILE)
    if not os.path.isfile(file):
        return {}
    remedy = "correct it there, or remove the file and give the flags"
    run = check_values(file, read_json(file), RUN, remedy)
    check_values(f"{file}, flags", run.get("flags", {}), FLAGS, remedy)
    return _migrated(file, run)


def _migrated(file: str, run: dict) -> dict:
    """The record of an older release as this one would have written it. Raises InputError for one of a newer release,
    which may mean something else by what it says."""
    release = release_of(run.get("version", "0.1.0"))
    if release > release_of(__version__):
        written = f"was written by release {run['version']} of minionerec-lora"
        raise InputError(f"{file}: {written}, and this is {__version__}; update it")
    lacked = LACKED_IN_0_1.get(run.get("command", ""), {}) if release < (0, 2) else {}
    return {**run, "flags": {**lacked, **run.get("flags", {})}} if lacked else run


def release_of(version: str) -> tuple[int, int]:
    """Major and minor number: (0, 2) of 0.2.0."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


# --- Which folders are checkpoints ------------------------------------------------------------------------------------


# A name of the hub, its owner's before a slash: ASCII letters and digits, single marks between them.
HUB_NAME = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)


def check_model(problems: Problems, name: str, path: str) -> None:
    """A folder that holds a model, or something that can be the name of a hub model."""
    if not path:
        problems.add(f"--{name} is missing; give a folder with a model, or the name of a hub model")
    elif os.path.isdir(path):
        if not any(os.path.isfile(os.path.join(path, file)) for file in ("config.json", ADAPTER_FILE)):
            final = os.path.join(path, "final_checkpoint")
            meant = f"did you mean {final}?" if os.path.isdir(final) else "is it a model?"
            problems.add(f"--{name} {path}: the folder has no config.json and no {ADAPTER_FILE}; {meant}")
    elif not HUB_NAME.fullmatch(path) or os.path.exists(path):
        what = "is a file, not a folder" if os.path.isfile(path) else "no such folder"
        problems.add(f"--{name} {path}: {what}")


def check_adapter(problems: Problems, path: str) -> None:
    """A folder that holds an adapter."""
    if not is_adapter(path):
        final = os.path.join(path, "final_checkpoint")
        meant = f"did you mean {final}?" if is_adapter(final) else "give the folder of an adapter checkpoint"
        problems.add(f"--adapter {path}: no {ADAPTER_FILE} there; {meant}")


WITH_BASE = "give the folder of the base as --{0}, and this one as --adapter"


def read_model(
    problems: Problems, name: str, path: str, adapter: str, wording: PromptFlags
) -> tuple[Checkpoint | None, str | None, Prompts | None]:
    """The checkpoint that flags name, where its base is, and the wording in which it is asked to recommend: `path`
    (--`name`) is a whole model or an adapter, whose base is then found, or the base of the adapter at `adapter`
    (--adapter). None where there are problems."""
    before = len(problems)
    check_model(problems, name, path)
    if adapter:
        check_adapter(problems, adapter)
    if adapter and is_adapter(path):
        problems.add(f"--{name} {path}: is an adapter, not a model; name the base of --adapter {adapter}")
    checkpoint = problems.attempt(Checkpoint.read, adapter or path)
    base: str | None = path
    if checkpoint and not adapter:
        base = problems.attempt(checkpoint.base, WITH_BASE.format(name))
    if checkpoint is None or len(problems) > before:  # a wrong path is no reason to ask for --category
        return checkpoint, base, None
    prompts = problems.attempt(checkpoint.prompts, wording.category, wording.prompt_file, RECOMMENDATION)
    return checkpoint, base, prompts


def check_base(problems: Problems, base_model: str) -> None:
    """A model that an adapter can stand on."""
    check_model(problems, "base_model", base_model)
    if is_adapter(base_model):
        problems.add(f"--base_model {base_model}: is an adapter, not a model; name the base it was trained on")


def is_complete(checkpoint: str) -> bool:
    """Whether a checkpoint was written to its end: it has a whole trainer state, which comes last."""
    try:
        with open(os.path.join(checkpoint, "trainer_state.json"), encoding="utf-8") as file:
            state = json.load(file)
            return isinstance(state, dict) and "global_step" in state
    except (OSError, ValueError):
        return False


def newest_checkpoint(output_dir: str) -> str | None:
    """The complete checkpoint of the latest step under `output_dir`, or None. checkpoint-0 holds only the weights that
    the run started from."""
    found = []
    for name in os.listdir(output_dir) if os.path.isdir(output_dir) else []:
        step = name.removeprefix("checkpoint-")
        if name != step and step.isdigit() and int(step) and is_complete(os.path.join(output_dir, name)):
            found.append((int(step), os.path.join(output_dir, name)))
    return max(found)[1] if found else None
