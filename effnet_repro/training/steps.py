"""A model's compiled training step, called one step at a time: what `model.fit` does, less its epochs and callbacks.

Keras compiles the step (`make_train_function`); so a step costs what it costs in `model.fit`.
"""

from collections import deque
from itertools import islice

import keras
import numpy as np

from effnet_repro.training.step import TrainingModel


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


class JaxSteps:
    """Steps from one state to the next. A step takes over the memory of the state before."""

    def __init__(self, model: TrainingModel, stream):
        model.make_train_function()
        self.model, self.batches = model, _on_devices(stream)
        slots, metrics = model.optimizer.variables, model.metrics_variables
        self.variables = (model.trainable_variables, model.non_trainable_variables, slots, metrics)
        self.state = tuple([v.value for v in some] for some in self.variables)

    def do(self) -> dict:
        """Start a step and return its logs; their way to the host begins as soon as they are there."""
        logs, self.state = self.model.train_function(self.state, self.batches)
        for value in logs.values():
            value.copy_to_host_async()
        return logs

    def sync(self):
        """Give the variables the newest state."""
        for variables, values in zip(self.variables, self.state):
            for variable, value in zip(variables, values):
                variable.assign(value)


def _on_devices(stream):
    "The batches of a stream on JAX's devices, whose transfers begin one batch early"
    import jax

    distribution = keras.distribution.distribution()
    if distribution is None and jax.default_backend() == "cpu":
        return stream  # there is no way to go

    def place(value):
        if distribution is None:
            return jax.device_put(value)
        layout = distribution.get_data_layout(np.shape(value)).backend_layout
        return jax.device_put(value, layout)

    return _one_early(jax.tree.map(place, batch) for batch in stream)


def _one_early(batches):
    "The same batches, each of which is taken before the one before it is given out"
    waiting = deque(islice(batches, 1))
    for batch in batches:
        waiting.append(batch)
        yield waiting.popleft()
    yield from waiting


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
