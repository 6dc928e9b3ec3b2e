"""Plots the curves of a training run or of several, and what runs reach against what they cost."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from minionerec.output import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The label of each panel, and its curves: key of the log history -> name in the legend.
Panels = dict[str, dict[str, str]]

SFT_PANELS: Panels = {
    "cross-entropy per response token (nats)": {"loss": "training", "eval_loss": "validation"},
    "learning rate": {"learning_rate": "learning rate"},
}
RL_PANELS: Panels = {
    "reward": {"reward": "mean", "reward_std": "standard deviation"},
    "reward by name": {
        f"rewards/{name}/mean": name for name in ("rule", "rank_penalty", "prefix", "semantic", "collaborative")
    },
    "validation": {"eval_HR@10": "HR@10", "eval_NDCG@10": "NDCG@10", "eval_MRR": "MRR"},
    "KL from the reference (nats per token)": {"kl": "KL"},
    "fraction of groups without advantage": {"frac_reward_zero_std": "fraction"},
}


def _pyplot() -> ModuleType:
    """matplotlib's pyplot, without a window. Imported only when a run plots, at its end: the import is slow."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: "Figure", path: str) -> None:
    """Writes a figure to a PNG file and frees its memory."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    _pyplot().close(figure)


def plot_curves(history: Sequence[Mapping[str, float]], path: str, panels: Panels) -> None:
    """Plots values of a Trainer's log history over optimizer steps, with the panels side by side, to a PNG file.

    The entries of `history` have `step` and any of the keys of `panels`; a panel without values stays empty.
    """
    plt = _pyplot()
    figure, all_axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (label, keys) in zip(all_axes, panels.items(), strict=True):
        for key, name in keys.items():
            points = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
            if points:
                evaluated = key.startswith("eval_")
                axes.plot(*zip(*points, strict=True), label=name, marker="o" if evaluated else None, markersize=3)
        axes.set(xlabel="optimizer step", ylabel=label)
        if len(axes.lines) > 1:
            axes.legend()
    _save(figure, path)


def plot_runs(curves: dict[str, dict[float, float]], path: str, x: str, y: str) -> None:
    """Plots one curve per run to a PNG file. `curves` maps the name of a run to its points; `x` and `y` are labels."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points.items()), strict=True), label=name, marker="o", markersize=3)
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
    _save(figure, path)


def plot_costs(
    metric: str,
    values: Mapping[str, tuple[float, float, float]],
    costs: Mapping[str, Mapping[str, float]],
    path: str,
) -> None:
    """Plots a metric of runs against what they cost, with a panel for each kind of cost side by side, to a PNG file.

    Args:
        values: of the metric, by the name of a run, as (value, low, high).
        costs: label of a panel -> name of a run -> its cost, above 0; a run without one is a dashed line.
    """
    plt = _pyplot()
    figure, all_axes = plt.subplots(1, len(costs), figsize=(5 * len(costs), 4), layout="constrained", squeeze=False)
    for axes, (label, cost_of) in zip(all_axes[0], costs.items(), strict=True):
        for i, (name, (value, low, high)) in enumerate(values.items()):
            if name in cost_of:
                errors = [[value - low], [high - value]]
                axes.errorbar(cost_of[name], value, yerr=errors, fmt="o", capsize=3, color=f"C{i}", label=name)
            else:
                axes.axhline(value, linestyle="--", linewidth=1, color=f"C{i}", label=name)
        axes.set(xlabel=label, ylabel=metric, xscale="log")
    all_axes[0][0].legend(fontsize="small")
    _save(figure, path)
