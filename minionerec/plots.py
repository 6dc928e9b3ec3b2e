"""Curves of a training run."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def plot_curves(history: list[dict], path: str) -> None:
    """Draws training loss, validation loss and learning rate over steps from a Trainer's log history to a PNG file.

    `history` entries hold `step` and any of `loss`, `eval_loss`, `learning_rate`; others are left out.
    """
    figure, (losses, rates) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, key, label in (
        (losses, "loss", "training"),
        (losses, "eval_loss", "validation"),
        (rates, "learning_rate", "learning rate"),
    ):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None, markersize=3)
    losses.set(xlabel="optimizer step", ylabel="cross-entropy per response token (nats)")
    rates.set(xlabel="optimizer step", ylabel="learning rate")
    if losses.lines:
        losses.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
