"""Measures the phases of sft.py from the command to the end of the first training step.

The command runs twice, with an empty cache of tokenized examples and with the cache of the first run, and is stopped
after its first step. A phase ends where sft.py calls a certain function. CPU seconds are of all phases together; they
depend less on what else the machine does.

    python -m benchmarks.startup --base_model out/base --train_file train.csv --eval_file valid.csv \\
        --sid_index_path Industrial_and_Scientific.index.json --item_meta_path Industrial_and_Scientific.item.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

PHASES = ("checks", "imports", "tokenizer and base", "adapter", "examples", "trainer", "first step")


def run_marked(marks_file: str, flags: list[str]) -> None:
    """Runs sft.py in this process, writes the time (seconds since 1970) at which each of PHASES ended and the
    CPU seconds of all, and exits."""
    from minionerec.errors import Problems
    from minionerec.process_memory import importing

    marks: list[float] = []

    def marked(function: Callable[..., Any], before: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if before:
                marks.append(time.time())
                return function(*args, **kwargs)
            result = function(*args, **kwargs)
            marks.append(time.time())
            return result

        return call

    check = Problems.check

    def checked(problems: Problems) -> None:
        check(problems)
        marks.append(time.time())
        Problems.check = check
        with importing():  # as sft.py does
            import lora_utils
            from minionerec.data import examples
            from minionerec.model import loading
            from minionerec.training import sft_trainer

        loading.load_tokenizer = marked(loading.load_tokenizer, before=True)
        loading.add_sid_tokens = marked(loading.add_sid_tokens, before=True)
        lora_utils.trainable_report = marked(lora_utils.trainable_report)
        examples.tokenized_dataset = marked(examples.tokenized_dataset)
        sft_trainer.SFTTrainer.train = marked(sft_trainer.SFTTrainer.train, before=True)
        step = sft_trainer.SFTTrainer.training_step

        def first_step(*args: Any, **kwargs: Any) -> None:
            step(*args, **kwargs)
            marks.append(time.time())
            del marks[4]  # after the training examples; the phase ends after the validation examples
            with open(marks_file, "w", encoding="utf-8") as file:
                json.dump([marks, time.process_time()], file)
            os._exit(0)

        sft_trainer.SFTTrainer.training_step = first_step

    Problems.check = checked
    import sft

    sys.argv = ["sft.py", *flags]
    from minionerec import cli

    cli.run(sft.train)


def startup(
    base_model: str = "",
    train_file: str = "",
    eval_file: str = "",
    sid_index_path: str = "",
    item_meta_path: str = "",
    category: str = "Industrial_and_Scientific",
    use_lora: bool = True,
    use_qlora: bool = False,
) -> None:
    """Prints the seconds of every phase, with a cold and with a warm cache of tokenized examples.

    Args:
        base_model: folder or hub name of the model to start from.
        train_file: CSV of training interactions.
        eval_file: CSV of validation interactions.
        sid_index_path: JSON of item id to SID tokens.
        item_meta_path: JSON of item id to title and description.
        category: what the items are, for the prompts.
        use_lora: run LoRA; without use_lora and use_qlora, full fine-tuning.
        use_qlora: run QLoRA.
    """
    flags = {**locals(), "use_lora": use_lora and not use_qlora}
    from benchmarks.common import print_json, print_table

    table = []
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            marks_file = os.path.join(folder, f"{cache}.json")
            argv = [f"--{name}={value}" for name, value in flags.items()]
            argv += [f"--output_dir={os.path.join(folder, cache)}", "--batch_size=8", "--micro_batch_size=8"]
            started = time.time()
            run = subprocess.run(
                [sys.executable, "-m", "benchmarks.startup", "--marks", marks_file, *argv],
                env={**os.environ, "HF_DATASETS_CACHE": os.path.join(folder, "cache")},
                cwd=ROOT,
                stdout=subprocess.DEVNULL,
            )
            if not os.path.exists(marks_file):
                sys.exit(run.returncode)  # sft.py has printed why
            with open(marks_file, encoding="utf-8") as file:
                ends, cpu = json.load(file)
            seconds = [end - start for start, end in zip([started, *ends], ends, strict=False)]
            phases = dict(zip(PHASES, seconds, strict=True))
            table.append({"cache": cache, **phases, "all": ends[-1] - started, "CPU s": cpu})
    print_table(table)
    print_json("startup", table=table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--marks"]:
        run_marked(sys.argv[2], sys.argv[3:])
    else:
        from minionerec import cli

        cli.run(startup)
