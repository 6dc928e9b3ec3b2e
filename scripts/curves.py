"""Prints the validation losses of SFT runs over epochs as a Markdown table, and plots them.

python scripts/curves.py --runs "full=out/full,LoRA=out/lora_42,LoRA=out/lora_43" --figure out/curves.png
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from minionerec import cli
from minionerec.data.files import read_json
from minionerec.errors import InputError, Problems
from minionerec.flags import check_new_file
from minionerec.validation import is_number
from scripts.table import folders_of


def curves(runs: str = "", figure: str = "") -> None:
    """Prints the validation losses of SFT runs over epochs.

    Args:
        runs: name=folder of every run, separated by commas; a folder contains metrics.json. Folders with the same name
            are the seeds of one run, and their mean is printed.
        figure: PNG file for the plot.
    """
    problems = Problems()
    losses = {
        name: [found for folder in folders if (found := problems.attempt(_losses, folder))]
        for name, folders in folders_of(problems, runs).items()
    }
    if figure:
        check_new_file(problems, "figure", figure, "the plot")
    problems.check()

    # Runs are evaluated at slightly different epochs: round them, but keep the evaluations of a run apart.
    all_runs = [seed for seeds in losses.values() for seed in seeds]
    digits = next(
        n for n in range(1, 20) if all(len({round(epoch, n) for epoch in run}) == len(run) for run in all_runs)
    )
    losses = {name: [{round(epoch, digits): seed[epoch] for epoch in seed} for seed in losses[name]] for name in losses}

    # The mean over seeds, where all of them were evaluated.
    means = {
        name: {epoch: sum(seed[epoch] for seed in seeds) / len(seeds) for epoch in set.intersection(*map(set, seeds))}
        for name, seeds in losses.items()
    }
    for name in (name for name, curve in means.items() if not curve):
        problems.add(f"--runs: the seeds of {name!r} were evaluated at no epoch together; name them apart")
    problems.check()
    epochs = sorted({epoch for curve in means.values() for epoch in curve})
    print("| after epochs | " + " | ".join(f"{epoch:g}" for epoch in epochs) + " |")
    print("|---" * (1 + len(epochs)) + "|")
    for name, curve in means.items():
        cells = (f"{curve[epoch]:.3f}" if epoch in curve else "" for epoch in epochs)
        print(f"| {name} | " + " | ".join(cells) + " |")
    if figure:
        from minionerec.plots import plot_runs

        os.makedirs(os.path.dirname(figure) or ".", exist_ok=True)
        plot_runs(means, figure, "epoch", "validation loss (nats per response token)")


def _losses(folder: str) -> dict[float, float]:
    """Epoch -> validation loss of a run. Raises InputError if there is none."""
    path = os.path.join(folder, "metrics.json")
    if not os.path.isfile(path):
        raise InputError(f"--runs: {folder} has no metrics.json; give the folder of an SFT run")
    metrics: object = read_json(path)
    history = metrics.get("history") if isinstance(metrics, dict) else None
    losses = {
        entry["epoch"]: entry["eval_loss"]
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, dict) and all(is_number(entry.get(name)) for name in ("epoch", "eval_loss"))
    }
    if not losses:
        raise InputError(f"--runs: {path} holds no validation loss; it must be that of an SFT run")
    return losses


if __name__ == "__main__":
    cli.run(curves)
