"""Prints one Markdown table of training runs that were evaluated into their own folders, under the popularity baseline.

python scripts/table.py --train_file train.csv --test_data_path test.csv --runs "base=out/base,LoRA SFT=out/lora"
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli
from minionerec.data import Problems, count_rows, read_interactions
from minionerec.metrics import popularity, rank_of, ranking_metrics

RANKING = ("HR@1", "HR@5", "HR@10", "NDCG@5", "NDCG@10", "MRR")
COSTS = ("trainable", "time (s)", "peak memory (GB)", "checkpoint (MB)")


def table(train_file: str = "", test_data_path: str = "", runs: str = "") -> None:
    """Prints the table.

    Args:
        train_file: CSV of training interactions, for the popularity baseline.
        test_data_path: CSV of the test interactions the runs were evaluated on.
        runs: name=folder of every run, separated by commas; a folder holds metrics.json and result.metrics.json.
    """
    problems = Problems()
    problems.attempt(count_rows, train_file, "train_file", titles=False)
    problems.attempt(count_rows, test_data_path, "test_data_path", titles=False)
    folders = dict(run.split("=", 1) for run in runs.split(",") if "=" in run)
    if not folders:
        problems.add(f"--runs {runs!r}: give name=folder pairs, separated by commas")
    for folder in folders.values():
        for name in ("metrics.json", "result.metrics.json"):
            if not os.path.isfile(os.path.join(folder, name)):
                problems.add(f"--runs: {os.path.join(folder, name)}: no such file; train and evaluate the run first")
    problems.check()

    top = popularity((row.sid for row in read_interactions(train_file, "train_file", titles=False)), 20)
    tests = read_interactions(test_data_path, "test_data_path", titles=False)
    lines = [("popularity", ranking_metrics([rank_of(row.sid, top) for row in tests], 20), ["", "", "", ""])]
    for name, folder in folders.items():
        with open(os.path.join(folder, "result.metrics.json"), encoding="utf-8") as file:
            ranking = json.load(file)
        with open(os.path.join(folder, "metrics.json"), encoding="utf-8") as file:
            cost = json.load(file)
        costs = [
            f"{cost['trainable_parameters']:,}",
            f"{cost['seconds']:.0f}",
            f"{cost['peak_memory_gb']:.2f}",
            f"{cost['checkpoint_mb']:.1f}",
        ]
        lines.append((name, ranking, costs))
    print("| | " + " | ".join(RANKING + COSTS) + " |")
    print("|---" * (1 + len(RANKING + COSTS)) + "|")
    for name, ranking, costs in lines:
        values = [f"{ranking[metric]:.4f}" if metric in ranking else "" for metric in RANKING]
        print(f"| {name} | " + " | ".join(values + costs) + " |")


if __name__ == "__main__":
    cli.run(table)
