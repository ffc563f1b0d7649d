"""What is seen of a run while it trains: the progress bar, TensorBoard, figure and terminal."""

import contextlib

import keras

from effnet_repro.runs import Stopped, describe_epoch, save_curves


class StepWatch(keras.callbacks.Callback):
    "Tells the recorder of steps and epochs, draws the progress bar, and stops when asked"

    def __init__(self, recorder, stop, write_down, progress):
        super().__init__()
        self.recorder, self.stop, self.write_down = recorder, stop, write_down
        self.progress, self.bar, self.unread = progress, None, None

    def on_train_begin(self, logs=None):
        from tqdm import tqdm

        if self.bar is None:
            total = dict(total=self.recorder.course.last_step, initial=self.recorder.step)
            shown = dict(unit="update", mininterval=2, dynamic_ncols=True)
            self.bar = tqdm(**total, **shown, disable=not self.progress)

    def on_epoch_begin(self, epoch, logs=None):
        self.recorder.meter.start_clock()

    def on_train_batch_end(self, batch, logs=None):
        self._read()  # of the step before: the device is busy with this one meanwhile
        self.recorder.meter.tick()
        self.recorder.step, self.unread = self.recorder.step + 1, logs
        self._draw(self.bar.update)
        if self.stop.stop_requested and not self.recorder.ends_epoch():
            self._read()
            raise Stopped

    def on_epoch_end(self, epoch, logs=None):
        self._read()
        self.write_down()
        self.stop.check()

    def _read(self):
        "Wait for the newest step, and hand its loss and accuracy on"
        if self.unread is None:
            return
        loss, accuracy = (float(self.unread[n]) for n in ("loss", "accuracy"))
        self.unread = None
        self.recorder.count(loss, accuracy)
        speed = self.recorder.meter.images_per_s
        shown = {"images_per_s": f"{speed:.0f}"} if speed == speed else {}
        self._draw(self.bar.set_postfix, loss=f"{loss:.3f}", **shown, refresh=False)

    def _draw(self, change, **values):
        with contextlib.suppress(OSError):  # the terminal is gone: the training is not
            change(**values)

    def close(self):
        if self.bar is not None:
            self._draw(self.bar.close)


class Events:
    "TensorBoard scalars, by update; left out where TensorBoard is not installed"

    def __init__(self, folder):
        self.folder, self.writer = folder, None

    def write(self, row):
        try:
            from tensorboard.summary import Writer
        except ImportError:
            return
        self.writer = self.writer or Writer(str(self.folder))
        for name, value in row.items():
            if name not in ("epoch", "update"):
                self.writer.add_scalar(name, float(value), row["update"])
        self.writer.flush()


def show_epoch(recorder, row, events):
    "Write a row's events and the figure, and print it"
    events.write(row)
    save_curves(recorder.run_dir)
    print(describe_epoch(row, recorder.course, recorder.newest), flush=True)
