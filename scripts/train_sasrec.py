"""Trains and evaluates SASRec: the classical baseline, and the model of --blend and of --reward_type sasrec.

    python scripts/train_sasrec.py --train_file train.csv --eval_file valid.csv --test_data_path test.csv \\
        --info_file info.txt --output_dir out/sasrec
"""

import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli, locks, sasrec_files
from minionerec.data.files import count_rows, read_info_items, read_interactions
from minionerec.errors import Problems
from minionerec.flags import check_new_folder, check_positive, same_rows, seed_range
from minionerec.metrics import format_metrics, rank_of, ranking_metrics, watched_cutoff
from minionerec.output import whole_folder, writing

LENGTH = 50  # items of a ranking


@locks.releasing()
def train_sasrec(
    train_file: str = "",
    eval_file: str = "",
    info_file: str = "",
    output_dir: str = "",
    test_data_path: str = "",
    hidden_size: int = 64,
    num_epochs: int = 60,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    dropout: float = 0.3,
    seed: int = 42,
    num_models: int = 1,
) -> dict[str, float]:
    """Trains SASRec on the training file, and keeps the epoch with the best NDCG@10 on the validation file. Several
    models are averaged.

    Args:
        train_file: CSV of training interactions.
        eval_file: CSV of validation interactions.
        info_file: the catalogue: a line per item with SID, title and item id, separated by tabs.
        output_dir: folder for the model, metrics.json, result.json and result.metrics.json.
        test_data_path: CSV of test interactions; if given, the model is evaluated on it.
        hidden_size: width of the model.
        num_epochs: passes over the training file at most.
        batch_size: histories per optimizer step.
        learning_rate: learning rate of Adam.
        dropout: dropout between the layers.
        seed: seed of every random choice.
        num_models: models to train, each from a seed of its own, whose log-probabilities are averaged. Three rank
            clearly better than one, and take three times as long.
    """
    problems = Problems()
    check_positive(problems, hidden_size=hidden_size, num_epochs=num_epochs, batch_size=batch_size)
    check_positive(problems, learning_rate=learning_rate, num_models=num_models)
    if hidden_size % 2:
        problems.add(f"--hidden_size {hidden_size}: must be even, for two heads")
    if not 0 <= dropout < 1:
        problems.add(f"--dropout {dropout}: must be at least 0 and less than 1")
    check_new_folder(problems, output_dir)
    items = problems.attempt(read_info_items, info_file) or []
    sids = list(dict.fromkeys(item.sid for item in items)) or None
    for flag, path in (("train_file", train_file), ("eval_file", eval_file), ("test_data_path", test_data_path)):
        if path or flag != "test_data_path":
            problems.attempt(count_rows, path, flag, sids, titles=False)
    if wrong := seed_range(seed):
        problems.add(f"--seed {seed}: {wrong}")
    problems.check()
    assert sids  # nothing was wrong
    for note in same_rows(train_file, eval_file):
        print(note)
    locks.hold("output_dir", output_dir, locks.lock_of_new)

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

    histories, targets = events(train_file, "train_file")
    watched = f"NDCG@{watched_cutoff(len(sids))}"

    def validated(model: sasrec.Recommender) -> float:
        return score(ranked(model, eval_file, "eval_file"))[watched]

    def trained(number: int) -> tuple[sasrec.SASRec, int]:
        """A model from the seed of this number, from 0, as after its best epoch, and that epoch."""
        torch.manual_seed(seed + number)
        model = sasrec.SASRec(sids, hidden_size, dropout=dropout).to(device.local_device())
        which = f"model {number + 1} of {num_models}, " if num_models > 1 else ""

        def end_of_epoch(epoch: int, loss: float) -> float:
            value = validated(model)
            print(f"{which}epoch {epoch}: loss {loss:.3f}, validation {watched} {value:.4f}")
            return value

        sizes = num_epochs, batch_size, learning_rate, seed + number
        return model, sasrec.train(model, histories, targets, *sizes, end_of_epoch)

    started = time.perf_counter()
    models, best_epochs = zip(*map(trained, range(num_models)), strict=True)
    model = models[0] if num_models == 1 else sasrec.Ensemble(models)
    best = validated(model)
    seconds = time.perf_counter() - started
    results = ranked(model, test_data_path, "test_data_path") if test_data_path else []
    with writing(output_dir), whole_folder(output_dir) as partial:
        sasrec.save(model, partial, sasrec_files.fingerprint((item.id, item.sid) for item in items), train_file)
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
