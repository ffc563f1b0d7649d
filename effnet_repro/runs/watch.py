"""What is seen of a run while it trains: the progress bar, TensorBoard's events, the figure and a line an epoch."""

import contextlib
import sys
from pathlib import Path
from types import ModuleType

from effnet_repro.messages import say
from effnet_repro.runs.metrics import save_curves
from effnet_repro.runs.recorder import Recorder, describe_epoch


class ProgressBar:
    """A bar on stderr that counts training steps. Nothing is drawn where tqdm is missing or the terminal is gone.

    - `total`: training steps of the whole run.
    - `done`: how many of them are done already.
    - `shown`: False = draw nothing.
    """

    def __init__(self, total: int, done: int, shown: bool):
        self.bar = None
        with contextlib.suppress(ImportError):  # a POD's virtual environment may not have it
            from tqdm import tqdm

            how = dict(unit="update", mininterval=2, dynamic_ncols=True)
            self.bar = tqdm(total=total, initial=done, disable=not shown, **how)

    def _draw(self, change, *values, **named):
        with contextlib.suppress(OSError):  # the terminal is gone: the training is not
            getattr(self.bar, change)(*values, **named)

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
        self.folder, self.writer = folder, None

    def write(self, row: dict):
        """Write the numbers of a row of metrics.csv."""
        if "tensorflow" not in sys.modules:  # with this name TensorBoard leaves TensorFlow alone
            sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))
        try:
            from tensorboard.summary import Writer
        except ImportError:
            return
        self.writer = self.writer or Writer(str(self.folder))
        for name, value in row.items():
            if name not in ("epoch", "update"):
                self.writer.add_scalar(name, float(value), row["update"])
        self.writer.flush()


def show_epoch(recorder: Recorder, row: dict, events: Events):
    """Write a row's events, draw the figure anew, and print the row."""
    events.write(row)
    save_curves(recorder.run_dir)
    say(describe_epoch(row, recorder.course, recorder.newest))
