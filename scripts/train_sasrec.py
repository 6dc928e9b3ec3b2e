"""Trains and evaluates SASRec: the classical baseline, and the model of --blend and of --reward_type sasrec.

    python scripts/train_sasrec.py --train_file train.csv --eval_file valid.csv --test_data_path test.csv \\
        --info_file info.txt --output_dir out/sasrec
"""

import os
import sys
import time
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli, locks, sasrec_files
from minionerec.data.files import count_rows, read_info_items, read_interactions
from minionerec.errors import Problems
from minionerec.flags import Flags, above_zero, check_new_folder, command, flag, same_rows, seed_range
from minionerec.metrics import format_metrics, rank_of, ranking_metrics, watched_cutoff
from minionerec.output import whole_folder, writing

LENGTH = 50  # items of a ranking


@dataclass(frozen=True, kw_only=True)
class SASRecFlags(Flags):
    """The files, and how long which model trains on them."""

    train_file: str = flag("", "CSV of training interactions.")
    eval_file: str = flag("", "CSV of validation interactions.")
    info_file: str = flag("", "the catalogue: a line per item with SID, title and item id, separated by tabs.")
    output_dir: str = flag("", "folder for the model, metrics.json, result.json and result.metrics.json.")
    test_data_path: str = flag("", "CSV of test interactions; if given, the model is evaluated on it.")
    hidden_size: int = flag(64, "width of the model.", above_zero)
    num_epochs: int = flag(60, "passes over the training file at most.", above_zero)
    batch_size: int = flag(256, "histories per optimizer step.", above_zero)
    learning_rate: float = flag(1e-3, "learning rate of Adam.", above_zero)
    dropout: float = flag(
        0.3,
        "dropout between the layers.",
        lambda value: None if 0 <= value < 1 else "must be at least 0 and less than 1",
    )
    seed: int = flag(42, "seed of every random choice.", seed_range)
    num_models: int = flag(
        1,
        "models to train, each from a seed of its own, whose log-probabilities are averaged. Three rank clearly better "
        "than one, and take three times as long.",
        above_zero,
    )

    def check(self, problems: Problems) -> None:
        super().check(problems)
        if self.hidden_size % 2:
            problems.add(f"--hidden_size {self.hidden_size}: must be even, for two heads")
        check_new_folder(problems, self.output_dir)


@command(SASRecFlags)
def train_sasrec(flags: SASRecFlags) -> dict[str, float]:
    """Trains SASRec on the training file, and keeps the epoch with the best NDCG@10 on the validation file. Several
    models are averaged."""
    problems = flags.problems()
    items = problems.attempt(read_info_items, flags.info_file) or []
    sids = list(dict.fromkeys(item.sid for item in items)) or None
    for name in ("train_file", "eval_file", "test_data_path"):
        path = getattr(flags, name)
        if path or name != "test_data_path":
            problems.attempt(count_rows, path, name, sids, titles=False)
    problems.check()
    assert sids  # nothing was wrong
    for note in same_rows(flags.train_file, flags.eval_file):
        print(note)
    locks.hold("output_dir", flags.output_dir, locks.lock_of_new)

    import torch

    from minionerec import sasrec
    from minionerec.model import device
    from minionerec.process_memory import peak_memory_gb
    from minionerec.saving import write_json
    from minionerec.training.finish import folder_size_mb

    def events(path: str, flag: str) -> tuple[list[list[str]], list[str]]:
        rows = list(read_interactions(path, flag, sids, titles=False))
        return [row.sid_history for row in rows], [row.sid for row in rows]

    length = min(LENGTH, len(sids))

    def ranked(model: sasrec.Recommender, path: str, flag: str) -> list[dict]:
        """The rankings of a file, in the form of result.json."""
        histories, targets = events(path, flag)
        rankings = zip(histories, targets, model.rankings(histories, length), strict=True)
        return [{"input": history, "output": sid, "predict": ranking} for history, sid, ranking in rankings]

    def score(results: list[dict]) -> dict[str, float]:
        return ranking_metrics([rank_of(row["output"], row["predict"]) for row in results], length)

    histories, targets = events(flags.train_file, "train_file")
    watched = f"NDCG@{watched_cutoff(len(sids))}"

    def validated(model: sasrec.Recommender) -> float:
        return score(ranked(model, flags.eval_file, "eval_file"))[watched]

    def trained(number: int) -> tuple[sasrec.SASRec, int]:
        """A model from the seed of this number, from 0, as after its best epoch, and that epoch."""
        torch.manual_seed(flags.seed + number)
        model = sasrec.SASRec(sids, flags.hidden_size, dropout=flags.dropout).to(device.local_device())
        which = f"model {number + 1} of {flags.num_models}, " if flags.num_models > 1 else ""

        def end_of_epoch(epoch: int, loss: float) -> float:
            value = validated(model)
            print(f"{which}epoch {epoch}: loss {loss:.3f}, validation {watched} {value:.4f}")
            return value

        sizes = flags.num_epochs, flags.batch_size, flags.learning_rate, flags.seed + number
        return model, sasrec.train(model, histories, targets, *sizes, end_of_epoch)

    started = time.perf_counter()
    models, best_epochs = zip(*map(trained, range(flags.num_models)), strict=True)
    model = models[0] if flags.num_models == 1 else sasrec.Ensemble(models)
    best = validated(model)
    seconds = time.perf_counter() - started
    results = ranked(model, flags.test_data_path, "test_data_path") if flags.test_data_path else []
    with writing(flags.output_dir), whole_folder(flags.output_dir) as partial:
        sasrec.save(model, partial, sasrec_files.fingerprint((item.id, item.sid) for item in items), flags.train_file)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        metrics = {
            "method": "sasrec",
            "trainable_parameters": parameters,
            "total_parameters": parameters,
            "seconds": seconds,
            "peak_memory_gb": peak_memory_gb(),
            "checkpoint_mb": folder_size_mb(partial),
            f"best_eval_{watched}": best,
            "best_epochs": best_epochs,
        }
        write_json(os.path.join(partial, "metrics.json"), metrics)
        if results:
            write_json(os.path.join(partial, "result.json"), results)
            write_json(os.path.join(partial, "result.metrics.json"), score(results))
    if results:
        print(format_metrics(score(results)))
    return metrics


if __name__ == "__main__":
    cli.run(train_sasrec)
