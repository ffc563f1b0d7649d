"""The curves of a run: `metrics.csv`, read and drawn."""

import logging
from pathlib import Path

from effnet_repro.runs.tables import read_rows

LOG = logging.getLogger(__name__)


def read_metrics(
    run_dir,  # A run folder
):  # A pandas DataFrame with a row per epoch
    """Read a run's metrics.csv. ValueError, which names the line, where it is damaged."""
    import pandas as pd

    path = Path(run_dir) / "metrics.csv"
    wrong = read_rows(path)[1]
    if wrong:
        raise ValueError(f"{wrong[0]} The training command, given again, writes it anew.")
    return pd.read_csv(path)


def plot_run(
    run_dir,  # A run folder
):  # Three axes: loss, accuracy, learning rate
    "Draw the curves of a run"
    import matplotlib.pyplot as plt

    m = read_metrics(run_dir)
    fig, axes = plt.subplots(1, 3, figsize=(10, 2.8), layout="constrained")
    valid = m.dropna(subset=["validation_top1"]) if "validation_top1" in m else m.iloc[:0]
    for ax, train, test in (
        (axes[0], "loss", "validation_loss"),
        (axes[1], "accuracy", "validation_top1"),
    ):
        ax.plot(m.epoch, m[train], marker="o", ms=3, label="training (augmented)")
        if len(valid):
            ax.plot(valid.epoch, valid[test], marker="s", ms=3, label="validation")
        ax.set(xlabel="epoch", title=train)
        ax.legend(frameon=False, fontsize=8)
    axes[1].set_ylim(0, 1)
    axes[2].plot(m.epoch, m.learning_rate, marker="o", ms=3)
    axes[2].set(xlabel="epoch", title="learning rate at the epoch's end", ylim=(0, None))
    for ax in axes:
        ax.locator_params("x", integer=True, min_n_ticks=1)
        ax.spines[["top", "right"]].set_visible(False)
    return axes


def save_curves(
    run_dir: Path,  # A run folder
):  # None; writes curves.png, where Matplotlib and pandas are installed
    "Draw the curves of a run into its folder"
    try:
        import matplotlib.pyplot as plt
        import pandas  # noqa: F401
    except ImportError:  # a POD's virtual environment has neither
        return
    figure = plot_run(run_dir)[0].figure
    try:
        figure.savefig(str(run_dir / "curves.png"), dpi=120)
    except OSError as e:  # no reason to stop
        LOG.warning("No figure: %s", e)
    plt.close(figure)
