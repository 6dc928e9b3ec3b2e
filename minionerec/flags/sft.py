"""The flags of sft.py that are not those of every training."""

from dataclasses import dataclass
from typing import Literal

from minionerec import world
from minionerec.errors import Problems
from minionerec.flags import (
    TrainingFlags,
    above_zero,
    all_or_above_zero,
    check_batch,
    check_cache,
    flag,
    fraction_of_training,
    number_or_auto,
    one_of,
    zero_or_more,
)


@dataclass(frozen=True, kw_only=True)
class SFTFlags(TrainingFlags):
    """The flags of sft.py."""

    base_model: str = flag("", "folder or hub name of the model to start from.")
    sample: int = flag(
        -1,
        "how many rows of each source to train on, chosen at random; -1 for all. eval_sample limits the validation "
        "rows (the original limits them by this flag too).",
        all_or_above_zero,
    )
    batch_size: int = flag(128, "rows of an optimizer step, over all processes.", above_zero)
    micro_batch_size: int | Literal["auto"] = flag(
        4,
        "rows per forward pass on one process; auto for as many as the memory of the GPU is predicted to hold (on a "
        "CPU at most 8, or 16 with use_qlora). The gradient does not depend on it. It is halved when memory runs out.",
        number_or_auto,
    )
    num_epochs: int = flag(
        10,
        "passes over the training rows at most; the run stops after three evaluations without improvement.",
        above_zero,
    )
    learning_rate: float = flag(
        3e-4,
        "peak learning rate, reached after a warm-up of 20 steps, or of a tenth of a run below 200 steps (the "
        "original: always 20); it then falls linearly.",
        above_zero,
    )
    sid_learning_rate: float = flag(
        0.0,
        "learning rate of the embedding rows of SID tokens, which start untrained; 0 for learning_rate. Full "
        "fine-tuning of a pre-trained model needs it: the rate that suits its weights is too small for new rows.",
        zero_or_more,
    )
    cutoff_len: int = flag(
        512,
        "tokens of a row at most; the oldest items of a history are dropped first (the original cuts the beginning of "
        "the prompt).",
        lambda value: "must be 32 or more to hold a prompt" if value < 32 else None,
    )
    group_by_length: bool = flag(
        False,
        "put rows of similar length into the same optimizer step; rows of a step are always sorted by length. No "
        "effect on token trees (pack_rows), which the original does not have.",
    )
    pack_rows: int = flag(
        -1,
        "compute the prefixes that rows of an optimizer step share only once (token trees), and put up to this many "
        "rows with much in common, such as those of one user, into the same step. -1: a 32nd of batch_size. 1: steps "
        "stay random. 0: every row is computed separately, as it also is for models whose attention takes no tree "
        "mask; only then does group_by_length have an effect.",
        lambda value: "must be 0 or more, or -1 for a 32nd of --batch_size" if value < -1 else None,
    )
    freeze_LLM: bool = flag(
        False,
        "train only the SID rows of the embedding matrices (the original keeps an untied output head frozen).",
    )
    train_from_scratch: bool = flag(False, "start from random weights, with base_model's configuration.")
    sid_init: str = flag(
        "text",
        "how the rows of new SID tokens start: text (the mean of the title tokens of their items), mean (of all "
        "tokens of the base), or random, as in the original.",
        one_of("text", "mean", "random"),
    )
    cf_path: str = flag(
        "",
        "folder of a SASRec model (scripts/train_sasrec.py) to learn from: each training row is followed by one with "
        "the same history, whose target is sampled from the 20 items that SASRec finds most likely (not in the "
        "original).",
    )
    eval_step: float = flag(
        0.05, "how often to evaluate and save, as a fraction of the training.", fraction_of_training
    )

    @property
    def method(self) -> str:
        """full, freeze_LLM, lora or qlora."""
        return "freeze_LLM" if self.freeze_LLM else super().method

    @property
    def micro_rows(self) -> int:
        """`micro_batch_size` as a number; of auto, the largest up to 8, or 16, that divides the rows of a process."""
        if self.micro_batch_size != "auto":
            return self.micro_batch_size
        most = 16 if self.use_qlora else 8
        return max(rows for rows in range(1, most + 1) if self.batch_size % (rows * world.size()) == 0 or rows == 1)

    @property
    def rows_together(self) -> int:
        """`pack_rows` as a number of rows."""
        return max(self.batch_size // 32, 1) if self.pack_rows == -1 else self.pack_rows

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.adapted and (self.freeze_LLM or self.train_from_scratch):
            problems.add(
                "--freeze_LLM and --train_from_scratch train without an adapter; drop --use_lora / --use_qlora"
            )
        if self.freeze_LLM and self.train_from_scratch:
            problems.add(
                "--freeze_LLM and --train_from_scratch exclude each other: a frozen random model learns nothing"
            )
        if not self.category.strip():
            problems.add("--category is missing; say what the items are, such as Industrial_and_Scientific")
        check_batch(problems, self.batch_size, self.micro_rows)
        check_cache(problems)
