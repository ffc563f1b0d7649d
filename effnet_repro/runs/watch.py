"""Shows a run while it trains: a progress bar, TensorBoard's events, a figure, and a line for each epoch."""

import contextlib
import logging
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from effnet_repro.messages import BestEffort, say
from effnet_repro.paths import utf8_path
from effnet_repro.runs.metrics import save_curves
from effnet_repro.runs.recorder import Recorder, describe_epoch

LOG = logging.getLogger(__name__)


def _installed(package):
    "Whether a package is there; one that something odd was done to is, and says what is wrong when it is used"
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return True


def _free_lock():
    "Free the lock of all bars: tqdm keeps it where it cannot print, and other threads would wait for it"
    with contextlib.suppress(Exception):
        sys.modules["tqdm"].tqdm.get_lock().release()


class ProgressBar:
    """A bar on stderr that counts training steps. Nothing is drawn where tqdm is missing or the terminal is gone.

    - `total`: training steps of the whole run.
    - `done`: how many of them are done already.
    - `shown`: False = draw nothing.
    """

    def __init__(self, total: int, done: int, shown: bool):
        self.bar, self.effort = None, BestEffort("progress bar", LOG)
        if sys.stderr is None or not _installed("tqdm"):  # a POD's environment may not have it
            return
        with self.effort:
            from tqdm import tqdm

            how = dict(unit="step", mininterval=2, dynamic_ncols=True)
            self.bar = tqdm(total=total, initial=done, disable=not shown, **how)
        if self.effort.failed:
            _free_lock()

    def _draw(self, change, *values, **named):
        with self.effort:
            try:
                getattr(self.bar, change)(*values, **named)
                return
            except OSError:  # the terminal is gone: nobody needs to be told
                pass
        self._give_up()

    def _give_up(self):
        "Draw no more"
        self.bar.disable, self.bar = True, None
        _free_lock()

    def advance(self, steps: int):
        """Count training steps."""
        if self.bar is not None:
            self._draw("update", steps)

    def show(self, loss: float, images_per_s: float):
        """Show the newest loss, and the speed unless it is not a number."""
        if self.bar is not None:
            speed = {"images_per_s": f"{images_per_s:.0f}"} if images_per_s == images_per_s else {}
            self._draw("set_postfix", loss=f"{loss:.3f}", **speed, refresh=False)

    def close(self):
        """Leave the bar as it is."""
        if self.bar is not None:
            self._draw("close")


class Events:
    """TensorBoard's scalars by training step; nothing is written where TensorBoard is not installed."""

    def __init__(self, folder: Path):
        self.folder, self.writer, self.effort = folder, None, BestEffort("events", LOG, quiet=True)

    def write(self, row: dict):
        """Write the numbers of a row of metrics.csv. What goes wrong is one warning, and no more is written."""
        if self.effort.failed or not _installed("tensorboard"):
            return
        if "tensorflow" not in sys.modules:  # with this name TensorBoard leaves TensorFlow alone
            sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
        with self.effort:
            from tensorboard.summary import Writer

            self.writer = self.writer or Writer(utf8_path(self.folder))
            for name, value in row.items():
                if name not in ("epoch", "update"):
                    self.writer.add_scalar(name, float(value), row["update"])
            self.writer.flush()


class Watch:
    """What is shown of every epoch: the row's events, the figure drawn anew, and the row as a line.

    A figure takes about half a second, which is as long as an epoch of a small set on a GPU. So it is drawn again only
    once 20 times as long has passed as the last one took, and at the end of the run (`close`).
    """

    def __init__(self, run_dir: Path):
        self.events, self.figure = Events(run_dir / "events"), BestEffort("figure", LOG, quiet=True)
        self.run_dir, self.stale, self.due = (
            run_dir,
            False,
            0.0,
        )  # When the next figure may be drawn

    def show_epoch(self, recorder: Recorder, row: dict):
        """Show a row. Errors in here never end a run."""
        self.events.write(row)
        self.stale = True
        if time.monotonic() >= self.due:
            self._draw()
        say(describe_epoch(row, recorder.course, recorder.newest))

    def _draw(self):
        begin, self.stale = time.monotonic(), False
        with self.figure:
            save_curves(self.run_dir)
        now = time.monotonic()
        self.due = now + 20 * (now - begin)

    def close(self):
        """Draw the epochs that the figure does not show yet."""
        if self.stale:
            self._draw()
