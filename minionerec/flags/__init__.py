"""The flags that commands share: each is defined, explained, checked and turned into settings here, once.

The flags of a command are a frozen dataclass made of groups. Those of sft.py and rl.py are in this folder, the others
in the file of their command. `command` makes a function of them callable in two ways, and both are typed: with the
dataclass, and with the flat keywords that Fire and `--help` see.

    @dataclass(frozen=True, kw_only=True)
    class SFTFlags(TrainingFlags):
        base_model: str = flag("", "folder or hub name of the model to start from.")

    @command(SFTFlags)
    def train(flags: SFTFlags) -> dict:
        "Fine-tunes a causal LM."

    train(SFTFlags(base_model="out/base", use_lora=True))
    train(base_model="out/base", use_lora=True)

Only the standard library is imported.
"""

import difflib
import inspect
import json
import math
import os
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from importlib.util import find_spec
from typing import Generic, Literal, ParamSpec, Protocol, TypeVar, cast, overload

from minionerec import locks, world
from minionerec.cards import unknown_card
from minionerec.errors import Problems

# --- What flags are made of -------------------------------------------------------------------------------------------

V = TypeVar("V")
Check = Callable[[V], str | None]  # what is wrong with a value, or None


def flag(default: V, help: str, check: Check[V] | None = None) -> V:
    """A field of a `Flags` class: its default, its line of help, and what is wrong with a value taken by itself."""
    return field(default=default, metadata={"help": help, "check": check})


def above_zero(value: float) -> str | None:
    return None if value > 0 else "must be above 0"


def all_or_above_zero(value: int) -> str | None:
    return None if value == -1 or value > 0 else "must be above 0, or -1 for all rows"


def one_or_more(value: int) -> str | None:
    return None if value >= 1 else "must be 1 or more"


def zero_or_more(value: float) -> str | None:
    return None if value >= 0 else "must be 0 or more"


def number_or_auto(value: int | str) -> str | None:
    """A size that may be left to the command."""
    return None if isinstance(value, str) else above_zero(value)


def seed_range(value: int) -> str | None:
    """What the libraries' random generators take."""
    return None if 0 <= value < 2**32 else "must be from 0 to 4294967295"


def fraction_of_training(value: float) -> str | None:
    return above_zero(value) or (None if value < 1 else "is a fraction of the training; give a number below 1")


def one_of(*choices: str, why: str = "") -> Check[str]:
    """A check that a text is one of `choices`; `why` ends the message."""
    return lambda value: None if value in choices else f"must be one of {', '.join(choices)}{why}"


@dataclass(frozen=True, kw_only=True)
class Flags:
    """A group of flags. Subclasses are frozen, keyword-only dataclasses whose fields come from `flag`."""

    def check(self, problems: Problems) -> None:
        """Adds what is wrong with each value. Groups extend it by what does not fit together."""
        for f in fields(self):
            value = getattr(self, f.name)
            wrong = f.metadata["check"] and f.metadata["check"](value)
            if wrong:
                problems.add(f"--{f.name} {repr(value) if isinstance(value, str) else value}: {wrong}")

    def problems(self) -> Problems:
        """What is wrong with the flags by themselves; what is wrong with their files can be added."""
        problems = Problems()
        self.check(problems)
        return problems

    def check_output(self, problems: Problems, name: str, what: str, *more: str) -> None:
        """The flag `name` is the path of a file that the command makes or replaces; `what` it is, for the message. No
        flag may name it, or one of the paths `more` that are written with it, as an input."""
        path = getattr(self, name)
        check_new_file(problems, name, path, what)
        for f in fields(self):
            other = getattr(self, f.name)
            if f.name == name or not isinstance(other, str) or not os.path.isfile(other):
                continue
            if any(os.path.exists(made) and os.path.samefile(made, other) for made in (path, *more)):
                problems.add(f"--{name} {path}: would overwrite --{f.name} {other}; name another file")

    def to_dict(self) -> dict[str, object]:
        """The flags by name, as a checkpoint records them."""
        return asdict(self)


def _typed(values: Mapping[str, object], by_name: Mapping[str, Field]) -> dict[str, object]:
    """Values with the types of their flags: paths become text, ints floats, False and None no text. Raises InputError
    with all others, as the command line does for text."""
    problems, typed = Problems(), {}
    for name, value in values.items():
        kind = by_name[name].type
        kinds = typing.get_args(kind) or (kind,)
        words = [word for one in kinds for word in typing.get_args(one)]  # of a Literal
        kinds = tuple(one for one in kinds if not typing.get_args(one))
        if isinstance(value, os.PathLike) and str in kinds:
            value = os.fspath(value)
        elif type(value) is int and float in kinds:
            value = float(value)
        elif type(None) in kinds and (value is False or value in ("False", "false", "None")):  # not 0.0
            value = None
        if type(value) not in kinds and value not in words:
            named = ["None" if one is type(None) else one.__name__ for one in kinds]
            wanted = " or ".join([*named, *map(repr, words)])
            problems.add(f"--{name} {value!r}: must be {wanted}, not {type(value).__name__}")
        typed[name] = value
    problems.check()
    return typed


P = ParamSpec("P")
F = TypeVar("F", bound=Flags)
C = TypeVar("C", bound=Flags, contravariant=True)
R = TypeVar("R", covariant=True)


class Command(Protocol, Generic[P, C, R]):
    """What `command` makes: a function of an object of flags, or of the keywords P that such an object is made of."""

    @overload
    def __call__(self, flags: C, /) -> R: ...
    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...


def command(kind: Callable[P, F]) -> Callable[[Callable[[F], R]], Command[P, F, R]]:
    """Makes a function of one object of `kind`, a `Flags` class, callable with the flat keywords of its flags too. Its
    signature and the `Args` of its documentation are theirs: those of the command itself first, then group by group."""
    group = cast(type[F], kind)
    by_name = {f.name: f for f in fields(group)}
    order = dict.fromkeys(name for part in group.__mro__ for name in inspect.get_annotations(part))
    ordered = [by_name[name] for name in order]
    signature = inspect.Signature(
        [
            inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
            for f in ordered
        ]
    )
    args = "\n".join(f"    {f.name}: {f.metadata['help']}" for f in ordered)

    def decorate(function: Callable[[F], R]) -> Command[P, F, R]:
        def called(*given: object, **values: object) -> R:
            if given and (values or len(given) > 1 or not isinstance(given[0], group)):
                raise TypeError(f"{function.__name__}() takes keyword arguments, or {group.__name__} alone")
            if given:
                values = {name: getattr(given[0], name) for name in by_name}
            unknown = [name for name in values if name not in by_name]
            if unknown:
                close = difflib.get_close_matches(unknown[0], by_name, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{function.__name__}() got an unexpected keyword argument {unknown[0]!r}{hint}")
            with locks.releasing():
                return function(group(**_typed(values, by_name)))

        called.__name__ = called.__qualname__ = function.__name__
        called.__module__ = function.__module__
        called.__doc__ = f"{inspect.getdoc(function)}\n\nArgs:\n{args}\n"
        called.__signature__ = signature  # type: ignore[attr-defined]
        return cast("Command[P, F, R]", called)

    return decorate


# --- Groups -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class PromptFlags(Flags):
    """How prompts are worded."""

    category: str = flag(
        "",
        "what the items are, for the prompts; known Amazon categories are spelled out, other text is used as given. It "
        "can be left out with a checkpoint that records its prompts.",
    )
    prompt_file: str | None = flag(
        None, "JSON that replaces the wording of the prompts, including the wording that a checkpoint records."
    )


HEAVIEST = 1000  # weight of a second recommender; its scores alone would decide long before


def weight_of_blend(value: float) -> str | None:
    """What is wrong with the weight of a second recommender."""
    return None if 0 <= value <= HEAVIEST else f"must be from 0 to {HEAVIEST}"


def penalty_of_seen(value: float) -> str | None:
    """What is wrong with a penalty on items of the history."""
    return None if 0 <= value < math.inf else "must be a number from 0"


@dataclass(frozen=True, kw_only=True)
class ScoreFlags(Flags):
    """What changes the model's scores: a second recommender, and a penalty on items of the history."""

    blend: str = flag(
        "",
        "folder of a SASRec model that ranks with the model; scripts/train_sasrec.py trains it, on the same info_file.",
    )
    blend_weight: float | Literal["auto"] = flag(
        "auto",
        "weight of blend: its log-probabilities are multiplied by this. auto takes the weight that evaluate.py chose "
        "and recorded.",
        lambda value: None if value == "auto" else weight_of_blend(value),
    )
    seen_penalty: float | Literal["auto"] = flag(
        0.0,
        "subtracted from the scores of SIDs in the history (nats), which a model tends to find too likely. auto takes "
        "the penalty that evaluate.py chose and recorded for the model, or for the model with blend.",
        lambda value: None if value == "auto" else penalty_of_seen(value),
    )

    @property
    def automatic(self) -> list[str]:
        """The flags of the numbers that evaluate.py chooses."""
        names = ["blend_weight"] if self.blend and self.blend_weight == "auto" else []
        return names + (["seen_penalty"] if self.seen_penalty == "auto" else [])

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.blend_weight != "auto" and not self.blend:
            problems.add("--blend_weight has no effect without --blend")


@dataclass(frozen=True, kw_only=True)
class DataFlags(PromptFlags):
    """The files that a training reads."""

    train_file: str = flag("", "CSV of training interactions.")
    eval_file: str = flag("", "CSV of validation interactions; the best checkpoint on them is kept.")
    eval_sample: int = flag(
        -1,
        "how many rows of eval_file to validate on, chosen at random by seed; -1 for all. Every evaluation uses the "
        "same rows.",
        all_or_above_zero,
    )
    sid_index_path: str = flag("", "JSON of item id to SID tokens.")
    item_meta_path: str = flag("", "JSON of item id to title and description.")
    tasks: str = flag(
        "all",
        "tasks of the table in minionerec/data/prompts.py: all, or names separated by commas. The original's SFT has "
        "sid_history_to_sid, sid_history_to_title, title_to_sid and sid_to_title; its RL takes at most 10,000 rows of "
        "title_history_to_sid.",
    )


def _report_to(value: str) -> str | None:
    if value not in ("none", "tensorboard", "wandb"):
        return "must be none, tensorboard or wandb"
    spec = None if value == "none" else find_spec(value)
    installed = spec and spec.origin  # a folder wandb/, where it leaves its logs, is found as a package without one
    return None if value == "none" or installed else f"{value} is not installed; pip install {value}"


def _existing_checkpoint(value: str | None) -> str | None:
    exists = value in (None, "True", "true") or os.path.isdir(str(value))
    return None if exists else "no such folder; True takes the newest one"


def memory_gb(text: str) -> float:
    """A size such as 12GB (1e9 bytes) or 12GiB (2^30 bytes), in GB. Raises ValueError for anything else."""
    text = text.upper()
    return float(text.removesuffix("GIB")) * 2**30 / 1e9 if text.endswith("GIB") else float(text.removesuffix("GB"))


def _memory_size(value: str) -> str | None:
    try:
        good = not value or 0 < memory_gb(value) < float("inf")
    except ValueError:
        good = False
    return None if good else "must be a size such as 12GB or 12GiB"


@dataclass(frozen=True, kw_only=True)
class RunFlags(Flags):
    """A training run: where it writes, how it resumes, who follows it. Resuming ignores changes of most of these."""

    output_dir: str = flag("", "folder for checkpoints, final_checkpoint, metrics.json and curves.png.")
    seed: int = flag(42, "seed of every random choice.", seed_range)
    resume_from_checkpoint: str | None = flag(
        None, "a checkpoint folder, or True for the newest one in output_dir.", _existing_checkpoint
    )
    wandb_project: str = flag("", "Weights & Biases project to report to, if wandb is installed.")
    wandb_run_name: str = flag("", "name of the run in the trackers.")
    report_to: str = flag("none", "where to report: none, tensorboard or wandb.", _report_to)
    ddp_timeout: int = flag(
        1800, "seconds that a process waits for the others, such as while the first one tokenizes.", above_zero
    )
    dry_run: bool = flag(
        False, "check the input, print examples, steps, the predicted peak memory and the estimated time, and stop."
    )
    gpu_memory: str = flag(
        "",
        "with dry_run: memory of the card to check, such as 12GB or 12GiB; by default that of the device found.",
        _memory_size,
    )
    gpu: str = flag(
        "",
        "with dry_run: name of the card to check, such as 'RTX 4090', instead of its memory; the time of a step and an "
        "epoch is then estimated for it, too.",
        unknown_card,
    )

    @property
    def tracker(self) -> str:
        """Where the run reports."""
        return "wandb" if self.wandb_project and not _report_to("wandb") else self.report_to

    @property
    def notes(self) -> list[str]:
        """A line, or none, about a project that gets no report: MiniOneRec's sft.sh always names one."""
        wrong = self.wandb_project and _report_to("wandb")
        return [f"--wandb_project {self.wandb_project}: {wrong}; the run is not tracked there"] if wrong else []

    def check(self, problems: Problems) -> None:
        super().check(problems)
        for name in ("gpu_memory", "gpu"):
            if getattr(self, name) and not self.dry_run:
                problems.add(f"--{name} {getattr(self, name)} has no effect without --dry_run True")
        if self.gpu and self.gpu_memory:
            problems.add(f"--gpu {self.gpu} includes its memory; drop --gpu_memory {self.gpu_memory}, or --gpu")
        if not self.dry_run:  # which writes nothing
            world.check_world(problems)
            check_output_dir(problems, self.output_dir, self.resume_from_checkpoint)

    def hold_output_dir(self) -> None:
        """Keeps other runs out of the output folder until the command ends. Raises InputError if one is in it."""
        if not self.dry_run:
            locks.hold("output_dir", self.output_dir, locks.lock_of_folder)


# The Trainer's optimizers that need no further package: how many states they keep per weight, and the bits of each.
OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "paged_adamw_32bit"), (2, 32)),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), (2, 8)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "adagrad", "rmsprop", "rmsprop_bnb_32bit"), (1, 32)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), (1, 8)),
    "sgd": (0, 32),
}


@dataclass(frozen=True, kw_only=True)
class AdapterFlags(Flags):
    """What trains: all weights, or a LoRA adapter on a frozen base that is stored in 16, 8 or 4 bits; and how."""

    use_lora: bool = flag(False, "train a LoRA adapter and the SID rows; the base stays frozen.")
    use_qlora: bool = flag(False, "LoRA on a base stored in 4 bits (NF4).")
    lora_r: int = flag(16, "rank of a new adapter; that of an expert is lora_r / experts per token.", one_or_more)
    lora_alpha: int = flag(32, "scale of a new adapter; its output is multiplied by lora_alpha / lora_r.", one_or_more)
    lora_dropout: float = flag(
        0.05,
        "dropout on the input of a new adapter in SFT; RL runs without dropout and only records the value.",
        lambda value: None if 0 <= value < 1 else "must be at least 0 and below 1",
    )
    lora_target_modules: str = flag(
        "all",
        "all (linear layers and experts), qkv (attention projections q, k, v, o), or names separated by commas.",
        lambda value: None if value.strip() else "give all, qkv, or layer names separated by commas",
    )
    use_rslora: bool = flag(False, "scale the adapter by lora_alpha / sqrt(lora_r) instead.")
    use_dora: bool = flag(False, "weight-decomposed adapter (DoRA).")
    init_lora_weights: str = flag(
        "True",
        "start of a new adapter: True (B is zero), gaussian or orthogonal.",
        one_of(
            *("True", "gaussian", "orthogonal"),
            why="; PEFT's other starts change the base weights, and the adapter would no longer fit the published base",
        ),
    )
    load_in_8bit: bool = flag(False, "with use_lora: store the base in 8 bits.")
    gradient_checkpointing: bool = flag(False, "recompute activations in the backward pass: less memory, more time.")
    optim: str = flag(
        "adamw_torch_fused",
        "optimizer of the Trainer, such as adamw_torch, adamw_8bit (its states in 8 bits) or paged_adamw_8bit (which "
        "also moves them to the CPU when a GPU is full).",
        one_of(*OPTIMIZERS),
    )

    # What an adapter is from its first step to its last: a checkpoint's own values win over a later command's.
    SHAPE = ("lora_r", "lora_alpha", "lora_target_modules", "use_rslora", "use_dora")
    OF_AN_ADAPTER = (*SHAPE, "lora_dropout", "init_lora_weights")

    @property
    def adapted(self) -> bool:
        """Whether an adapter trains."""
        return self.use_lora or self.use_qlora

    @property
    def method(self) -> str:
        """full, lora or qlora."""
        return "qlora" if self.use_qlora else "lora" if self.use_lora else "full"

    @property
    def bits(self) -> int:
        """Bits of a stored weight of the base: 4, 8, or 16 for a base that is not quantized."""
        return 4 if self.use_qlora else 8 if self.load_in_8bit else 16

    def optimizer_bytes(self, count: int) -> float:
        """Bytes of the optimizer's states for a tensor of `count` weights. In 8 bits, each block of 256 has a float32
        scale; bitsandbytes keeps tensors below 4096 weights in 32 bits."""
        states, bits = OPTIMIZERS[self.optim]
        return states * count * (1 + 4 / 256 if bits == 8 and count >= 4096 else 4)

    def lora_settings(self) -> dict[str, object]:
        """The arguments of `peft.LoraConfig` that do not depend on the model."""
        return {
            "r": self.lora_r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "init_lora_weights": True if self.init_lora_weights == "True" else self.init_lora_weights,
        }

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if not self.adapted:
            given = [name for name in self.OF_AN_ADAPTER if getattr(self, name) != getattr(type(self), name)]
            problems.extend(f"--{name} has no effect without --use_lora True or --use_qlora True" for name in given)
        if self.use_lora and self.use_qlora:
            problems.add("--use_lora and --use_qlora exclude each other; keep one (QLoRA is LoRA on a 4-bit base)")
        if self.init_lora_weights == "orthogonal" and self.lora_r % 2:
            problems.add(f"--init_lora_weights orthogonal: needs an even rank, not --lora_r {self.lora_r}")
        if self.init_lora_weights == "orthogonal" and self.bits < 16:
            problems.add(
                f"--init_lora_weights orthogonal: PEFT has none for a base in {self.bits} bits; take gaussian, or True"
            )
        if self.load_in_8bit and not self.use_lora:
            already = "; QLoRA's base has 4 bits already" if self.use_qlora else ", which is missing"
            problems.add(f"--load_in_8bit stores the base of --use_lora True in 8 bits{already}")


@dataclass(frozen=True, kw_only=True)
class DeviceFlags(Flags):
    """How a device computes."""

    compile: bool = flag(
        True,
        "on a GPU, record passes whose shapes recur as CUDA graphs, which saves the time to start kernels; a pass that "
        "cannot be recorded runs eagerly. No effect on a CPU.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(DataFlags, RunFlags, AdapterFlags, DeviceFlags):
    """What sft.py and rl.py share."""

    @property
    def notes(self) -> list[str]:
        return super().notes + (same_rows(self.train_file, self.eval_file) if self.chooses_best else [])

    @property
    def chooses_best(self) -> bool:
        """Whether the run keeps the checkpoint that is best on the validation file."""
        return True


def same_rows(train_file: str, eval_file: str) -> list[str]:
    """A warning, or none, about a run that validates on the file it trains on."""
    if not (os.path.isfile(train_file) and os.path.isfile(eval_file) and os.path.samefile(train_file, eval_file)):
        return []
    return [f"warning: --eval_file {eval_file} is the training file, so the best checkpoint is the one that repeats it"]


def engine() -> str:
    """The engine that accelerate was told to train with: ZeRO-1, ZeRO-2 or ZeRO-3 of DeepSpeed, FSDP, or empty."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return f"ZeRO-{_zero_stage()}"
    return "FSDP" if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" else ""


def _zero_stage() -> str:
    """The stage that accelerate was told, or that stands in the DeepSpeed file it was given."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    try:
        with open(file, encoding="utf-8") as opened:
            return str(json.load(opened)["zero_optimization"]["stage"])
    except (OSError, ValueError, KeyError, TypeError):  # accelerate and DeepSpeed say what is wrong with the file
        return os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")


# --- Checks that other commands make too ------------------------------------------------------------------------------

# Bytes; file systems take 255 and 4096. What is added is 54 at most: `.partial.json` of a file of recommendations, or
# `.metrics.json` of one of rankings, and what `whole_file` adds while it is written.
LONGEST_NAME, LONGEST_PATH = 200, 3900


def check_batch(problems: Problems, batch_size: int, micro_batch_size: int) -> None:
    """The global batch must be a whole number of micro-batches on every process."""
    rows = micro_batch_size * world.size()
    if batch_size > 0 and rows > 0 and batch_size % rows:
        of_processes = f" x {world.size()} processes" if world.size() > 1 else ""
        problems.add(
            f"--batch_size {batch_size} is not a multiple of --micro_batch_size {micro_batch_size}{of_processes}; try "
            f"--batch_size {math.ceil(batch_size / rows) * rows}"
        )


def check_output_dir(problems: Problems, output_dir: str, resume: str | None) -> None:
    """A run never overwrites another one. `resume` is `--resume_from_checkpoint`."""
    if not output_dir:
        problems.add("--output_dir is missing; give a folder for the checkpoints")
    elif not locks.check_free(problems, "output_dir", output_dir, locks.lock_of_folder):
        return
    elif os.path.isdir(output_dir):
        names = sorted(os.listdir(output_dir))
        held = [name for name in names if name.startswith(("checkpoint-", "final_checkpoint"))]
        own = any(name.startswith("checkpoint-") for name in held)
        if resume not in (None, "True", "true"):
            own = os.path.realpath(os.path.dirname(os.path.abspath(resume))) == os.path.realpath(output_dir)
        if held and resume is None:
            problems.add(
                f"--output_dir {output_dir}: holds another run ({held[0]}); name another folder, remove this one, or "
                "continue it with --resume_from_checkpoint True"
            )
        elif held and not own:
            other = f"is not of {resume}" if resume not in ("True", "true") else "has no checkpoint to resume from"
            problems.add(
                f"--output_dir {output_dir}: holds a run ({held[0]}) that {other}; name another folder, or remove this "
                "one"
            )
    if output_dir:
        check_writable(problems, output_dir)


def check_cache(problems: Problems) -> None:
    """The folder in which the examples of a training are cached must be writable."""
    if wrong := not_writable(examples_cache()):
        problems.add(f"HF_DATASETS_CACHE {examples_cache()}: {wrong}; set it to a folder for the cache of examples")


def examples_cache() -> str:
    """The folder in which examples are cached, in that of Hugging Face datasets (HF_DATASETS_CACHE)."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(home, "huggingface")
    datasets = os.environ.get("HF_DATASETS_CACHE") or os.path.join(home, "datasets")
    return os.path.join(os.path.expanduser(datasets), "minionerec")


def check_new_folder(problems: Problems, output_dir: str) -> None:
    """A folder that a command makes as a whole: it must not exist yet."""
    if not output_dir:
        problems.add("--output_dir is missing; give the name of a new folder")
    elif not locks.check_free(problems, "output_dir", output_dir, locks.lock_of_new):
        return
    elif os.path.lexists(output_dir):  # a link that leads nowhere too
        problems.add(f"--output_dir {output_dir}: exists already; name another folder, or remove it")
    else:
        check_writable(problems, output_dir)


def check_new_file(problems: Problems, name: str, path: str, what: str) -> None:
    """A file that a command makes as a whole, or replaces; `what` it is, for the message."""
    if not path or path.endswith(os.sep) or os.path.isdir(path):
        problems.add(f"--{name} {path!r}: give the path of a file for {what}")
    elif os.path.dirname(os.path.abspath(path)) == "/dev" or (os.path.exists(path) and not os.path.isfile(path)):
        # A finished file takes the place of what has its name, and /dev/null is needed.
        problems.add(f"--{name} {path}: is a device or a pipe, not a file; give the path of a file for {what}")
    elif (
        _fits(problems, name, path)
        and locks.check_free(problems, name, path, locks.lock_of_new)
        and (wrong := not_writable(os.path.dirname(os.path.abspath(path))))
    ):
        problems.add(f"--{name} {path}: {wrong}")


def _fits(problems: Problems, name: str, path: str) -> bool:
    """A path that is short enough for a file system, with what is written under it and next to it."""
    parts = os.path.abspath(path).split(os.sep)
    fits = max(len(os.fsencode(part)) for part in parts) <= LONGEST_NAME and len(os.fsencode(path)) <= LONGEST_PATH
    if not fits:
        problems.add(f"--{name} {path[:50]}...: is too long for a file system; give a shorter path")
    return fits


def check_writable(problems: Problems, output_dir: str) -> None:
    """A folder that can be made, or written to where it exists."""
    if _fits(problems, "output_dir", output_dir) and (wrong := not_writable(output_dir)):
        problems.add(f"--output_dir {output_dir}: {wrong}")


def not_writable(path: str) -> str:
    """Why a folder can neither be made nor written to; empty if it can."""
    above = os.path.realpath(path)  # a link may lead to a folder that does not exist yet
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above):
        return f"{above} is a file, not a folder"
    return "" if os.access(above, os.W_OK | os.X_OK) else f"{above} cannot be written to"
