"""Calls a model's compiled training step, one step at a time, as `model.fit` does, without its epochs and callbacks.

Keras compiles the step (`make_train_function`); so a step costs what it costs in `model.fit`.
"""

from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np

from effnet_repro.training.device import has_other_processes
from effnet_repro.training.step import TrainingModel, on_all_devices


def compiled_steps(model: TrainingModel, stream):
    """Return an object that does the training steps of a model with the batches of `stream.updates`, in order.

    Its `do()` starts one step and returns its logs as the backend's arrays, which may still be computed. Between
    steps the model's variables hold old values, or none; `sync()` gives them the newest.
    """
    kind = JaxSteps if keras.backend.backend() == "jax" else TensorFlowSteps
    return kind(model, stream)


class TensorFlowSteps:
    """Steps that assign to the model's variables."""

    def __init__(self, model: TrainingModel, stream):
        model.make_train_function()
        self.model, self.batches = model, iter(stream)

    def do(self) -> dict:
        """Start a step and return its logs."""
        return self.model.train_function(self.batches)

    def sync(self):
        """Do nothing: the variables are up to date."""

    def close(self):
        """Do nothing: there is no thread."""


def state_variables(model: TrainingModel) -> tuple:
    """Return the model's variables in the order of the state that a training step on JAX takes and returns."""
    slots, metrics = model.optimizer.variables, model.metrics_variables
    return model.trainable_variables, model.non_trainable_variables, slots, metrics


class JaxSteps:
    """Steps from one state to the next. A step takes over the memory of the state before.

    While a step is being started, a thread takes the next batch from the stream and sends it to the devices: on GPUs
    both take milliseconds of Python, about as long as a small step.
    """

    def __init__(self, model: TrainingModel, stream):
        model.make_train_function()
        self.model, self.batches, self.waiting = model, iter(stream), None
        self.place, self.ahead = _placement(), None
        if self.place is not None:
            known = keras.distribution.distribution()  # each thread has its own
            set_it = keras.distribution.set_distribution
            self.ahead = ThreadPoolExecutor(1, "next batch", set_it, (known,))
        self.variables = state_variables(model)
        place = on_all_devices if has_other_processes() else lambda value: value
        self.state = tuple([place(v.value) for v in some] for some in self.variables)

    def do(self) -> dict:
        """Start a step and return its logs; their way to the host begins as soon as they are there."""
        batch = self._next() if self.waiting is None else self.waiting.result()
        if self.ahead is not None:
            self.waiting = self.ahead.submit(self._next)
        logs, self.state = self.model.train_function(self.state, iter([batch]))
        for value in logs.values():
            value.copy_to_host_async()
        return logs

    def _next(self):
        batch = next(self.batches)
        return batch if self.place is None else self.place(batch)

    def sync(self):
        """Give the variables the newest state."""
        for variables, values in zip(self.variables, self.state):
            for variable, value in zip(variables, values):
                variable.assign(value if value.is_fully_addressable else value.addressable_data(0))

    def close(self):
        """Wait for the batch that is being made, and end the thread."""
        if self.ahead is not None:
            self.ahead.shutdown(cancel_futures=True)


def _placement():
    "A function that sends a batch to JAX's devices; None on a single CPU, where there is no way to go"
    import jax

    distribution = keras.distribution.distribution()
    layout = lambda value: distribution.get_data_layout(np.shape(value)).backend_layout
    send = jax.device_put
    if has_other_processes():  # what is here is a part of the batch
        send = lambda part: jax.tree.map(lambda value: _of_all(value, layout), part)
    elif distribution is not None:
        send = lambda part: jax.device_put(part, jax.tree.map(layout, part))
    elif jax.default_backend() == "cpu":
        return None

    def place(data):  # the pixels of a resident set are there already, whole on every device
        (batch,) = data
        stays = {n: batch[n] for n in ("pixels",) if n in batch}
        return ({**send({n: v for n, v in batch.items() if n not in stays}), **stays},)

    return place


def _of_all(value, layout):
    "The array of all processes that this process has a part of; one that is whole already stays"
    import jax

    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return value
    return jax.make_array_from_process_local_data(layout(value), value)


class Unread:
    """What the logs of a step say, as an array of (1, 2): loss and accuracy. NumPy waits for them.

    `explained` returns a context for what may go wrong while it waits.
    """

    def __init__(self, logs: dict, explained):
        self.logs, self.explained = logs, explained

    def __len__(self):
        return 1

    def __array__(self, dtype=None, copy=None):
        with self.explained():
            values = [float(self.logs[name]) for name in ("loss", "accuracy")]
        return np.array([values], dtype)
