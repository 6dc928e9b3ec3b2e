import matplotlib.pyplot as plt
import pytest

from minionerec import plots


@pytest.fixture(autouse=True)
def undrawn() -> None:
    """All curves are drawn here."""


@pytest.fixture
def figures(monkeypatch) -> list[plt.Figure]:
    """The figures that are saved, still open to look at."""
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    yield saved
    plt.close("all")


def test_curves_are_the_values_of_the_log(figures):
    """A panel for each label, a line for each key that has values, at the steps that have them."""
    history = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0, "eval_loss": 2.5}, {"step": 4, "eval_loss": 2.0}]
    plots.plot_curves(history, "curves.png", plots.SFT_PANELS)
    losses, rates = figures[0].axes
    assert {line.get_label(): line.get_xydata().tolist() for line in losses.lines} == {
        "training": [[1, 3], [2, 2]],
        "validation": [[2, 2.5], [4, 2]],
    }
    assert not rates.lines and [axes.get_ylabel() for axes in (losses, rates)] == list(plots.SFT_PANELS)


def test_runs_and_costs_show_what_they_are_given(figures):
    plots.plot_runs({"a": {2.0: 0.5, 1.0: 0.75}}, "runs.png", "epoch", "loss")
    values = {"a": (0.5, 0.25, 1.0), "free": (0.125, 0.0, 0.25)}
    plots.plot_costs("HR@10", values, {"time (s)": {"a": 10.0}, "memory (GB)": {"a": 2.0}}, "costs.png")
    assert figures[0].axes[0].lines[0].get_xydata().tolist() == [[1, 0.75], [2, 0.5]]
    for axes, cost in zip(figures[1].axes, (10.0, 2.0), strict=True):
        (interval,) = axes.collections
        assert interval.get_segments()[0].tolist() == [[cost, 0.25], [cost, 1.0]]
        ((point, *_),) = axes.containers
        assert point.get_xydata().tolist() == [[cost, 0.5]]
        assert [line.get_ydata()[0] for line in axes.lines if line.get_linestyle() == "--"] == [0.125]


def test_a_figure_is_a_png_file(tmp_path):
    plots.plot_runs({"a": {1.0: 2.0}}, str(tmp_path / "runs.png"), "epoch", "loss")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG") and not plt.get_fignums()
