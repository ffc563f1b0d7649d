"""The curves of a run: `metrics.csv`, read and drawn."""

import contextlib
import io
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from effnet_repro.checkpoint import atomic_write
from effnet_repro.paths import local_path
from effnet_repro.runs.tables import read_rows


def read_metrics(
    run_dir,  # A run folder
):  # A pandas DataFrame with a row per epoch
    """Read a run's metrics.csv. ValueError, which names the line, where it is damaged."""
    import pandas as pd

    path = local_path(run_dir, "run_dir") / "metrics.csv"
    wrong = read_rows(path)[1]
    if wrong:
        raise ValueError(f"{wrong[0]} The training command, given again, writes it anew.")
    return pd.read_csv(path)


def _columns(run_dir):
    "The table as columns of numbers, without pandas: name -> list, not a number where a cell is empty"
    rows, wrong = read_rows(local_path(run_dir, "run_dir") / "metrics.csv")
    if wrong:
        raise ValueError(f"{wrong[0]} The training command, given again, writes it anew.")
    number = lambda text: float(text) if text else float("nan")
    return {name: [number(row[name]) for row in rows] for name in (rows[0] if rows else ())}


def _draw(axes, columns):
    "Loss, accuracy and learning rate by epoch, on three axes"
    epoch, nothing = columns["epoch"], [float("nan")] * len(columns["epoch"])
    measured = [v == v for v in columns.get("validation_top1", nothing)]
    for ax, train, test in (
        (axes[0], "loss", "validation_loss"),
        (axes[1], "accuracy", "validation_top1"),
    ):
        ax.plot(epoch, columns[train], marker="o", ms=3, label="training (augmented)")
        if any(measured):
            x, y = ([v for v, m in zip(c, measured) if m] for c in (epoch, columns[test]))
            ax.plot(x, y, marker="s", ms=3, label="validation")
        ax.set(xlabel="epoch", title=train)
        ax.legend(frameon=False, fontsize=8)
    axes[1].set_ylim(0, 1)
    axes[2].plot(epoch, columns["learning_rate"], marker="o", ms=3)
    axes[2].set(xlabel="epoch", title="learning rate at the epoch's end", ylim=(0, None))
    for ax in axes:
        ax.locator_params("x", integer=True, min_n_ticks=1)
        ax.spines[["top", "right"]].set_visible(False)


_ROW = dict(figsize=(10, 2.8), layout="constrained")  # Of three axes


def plot_run(
    run_dir,  # A run folder
):  # Three axes: loss, accuracy, learning rate
    "Draw the curves of a run"
    import matplotlib.pyplot as plt

    columns = _columns(run_dir)
    _, axes = plt.subplots(1, 3, **_ROW)
    _draw(axes, columns)
    return axes


def save_curves(
    run_dir: Path,  # A run folder
):  # None; writes curves.png, where Matplotlib is installed
    """Draw the curves of a run into its folder, whatever backend and settings the user's Matplotlib has.

    Raises whatever drawing raises: a run hands that to `BestEffort`.
    """
    if find_spec("matplotlib") is None:  # a POD's virtual environment has none
        return
    with plain_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure, png = Figure(**_ROW), io.BytesIO()
        FigureCanvasAgg(figure)
        _draw(figure.subplots(1, 3), _columns(run_dir))
        figure.savefig(png, dpi=120, format="png")
    atomic_write(Path(run_dir) / "curves.png", png.getvalue())


@contextlib.contextmanager
def plain_matplotlib():  # A context
    """Import Matplotlib without the backend that MPLBACKEND names, and draw with its own default settings within.

    PyCharm, Colab and Jupyter export backends that exist only inside them, and a user's settings may ask for LaTeX.
    """
    wanted = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    try:
        import matplotlib
    except UnicodeDecodeError:  # it reads the user's settings, whatever is done with them
        raise ValueError(
            "A file matplotlibrc, here or in Matplotlib's folder of settings, is not text in UTF-8. Move it away."
        ) from None
    finally:
        if wanted is not None:
            os.environ["MPLBACKEND"] = wanted
    if wanted is not None:
        with contextlib.suppress(ValueError):  # for figures of the user's own, later
            matplotlib.rcParams["backend"] = wanted
    default = matplotlib.rcParamsDefault
    own = {n: default[n] for n in default if not n.startswith(("backend", "interactive"))}
    with matplotlib.rc_context(own):
        yield
