"""Keras as the runtime of a run: its training step driven one by one, its weights as arrays, its scores."""

import contextlib
from typing import Dict, Optional

import keras
import numpy as np

from effnet_repro import __version__
from effnet_repro.config import Case
from effnet_repro.data import DataSet, step_images
from effnet_repro.data.gpu_reader import TRIALS
from effnet_repro.distributed import ALONE, Processes, explain_loss
from effnet_repro.efficientnet import build_model, get_weights, set_weights
from effnet_repro.network import segments
from effnet_repro.recipe import steps_per_epoch, total_updates, trained_segments
from effnet_repro.runs import Runtime, Scores
from effnet_repro.scaling import ModelSpec
from effnet_repro.training.decoding import settle_decoder
from effnet_repro.training.device import choose_precision, environment, plain_keras
from effnet_repro.training.estimation import CostWatch, say_estimate
from effnet_repro.training.evaluation import Evaluator
from effnet_repro.training.state import set_slots, training_state
from effnet_repro.training.step import Program, TrainingModel, use_devices
from effnet_repro.training.steps import Unread, compiled_steps
from effnet_repro.training.stream import explain_failures, updates


def make_program(case: Case, data: DataSet, precision: str, seed: int) -> Program:
    """Return what a training step needs to know; `precision` may be "auto"."""
    spec = ModelSpec.from_case(case, num_classes=data.num_classes)
    trained = trained_segments([s.name for s in segments(spec)], case.variable_filter)
    return Program(case, spec, trained, choose_precision(precision), seed)


class KerasRuntime(Runtime):
    """Trains a network with Keras, on all devices of this process.

    - `case`: laid out for one process.
    - `seed`: of weights, order, crops, mixing and masks.
    - `precision`: type to compute in; "auto" is bfloat16 on a GPU under JAX, else float32.
    - `validates`: whether the run will measure its weights; then a GPU compiles for that while it trains.
    - `processes`: that share each training step and each validation; this one trains on its own devices.
    """

    ahead = 1  # the device has its next step before Python waits for this one

    def __init__(
        self,
        case: Case,
        seed: int,
        precision: str = "auto",
        validates: bool = True,
        processes: Processes = ALONE,
    ):
        self.processes, self.process = processes, processes.shard
        self.shares = processes.count > 1
        self.validates, self.compiling = validates, None
        self.case, self.seed, self.precision = case, seed, choose_precision(precision)
        self.backend = keras.backend.backend()
        self.devices = contextlib.ExitStack()
        self.steps = None  # Of the model, once there was one: see `compiled_steps`
        self.watch = None  # Of the time that steps take, once the run has told what it costs

    def settle(self, data: DataSet, run_dir) -> DataSet:
        """Choose what decodes the images, and say so. ValueError where other processes have other data or versions."""
        data = settle_decoder(data, run_dir, self.lead)
        if self.shares:
            self.processes.compare(self._facts(data))
        return data

    def _facts(self, data):
        "What all processes must have in common"
        import jax

        devices = f"{jax.local_device_count()} x {jax.local_devices()[0].device_kind}"
        versions = {"keras": keras.__version__, "jax": jax.__version__, "effnet_repro": __version__}
        own = dict(training_images=data.fingerprint, decoder=data.decoder, devices=devices)
        own["validation_images"] = data.split_fingerprint("validation")
        return {
            **own,
            **versions,
            "precision": self.precision,
            "seed": self.seed,
            **vars(self.case),
        }

    def lead(self, work):
        """Return what `work` returns in the first process, which reads for all."""
        return self.processes.lead(work)

    def stops(self, step: int, asked: bool) -> bool:
        """Return whether all processes stop after this step."""
        return self.processes.stops(step, asked)

    def begin(self, data: DataSet, step: int, arrays: Optional[Dict[str, np.ndarray]]):
        """Build the network, with these arrays or fresh ones."""
        self.data, self.step = data, step
        self.program = make_program(self.case, data, self.precision, self.seed)
        shared = use_devices(self.case, self.processes.count)
        if not self.shares:
            self.devices.enter_context(shared)
        self.devices.enter_context(plain_keras())
        size = self.case.image_size
        network = build_model(self.program.spec, image_size=size, dtype="float32", seed=self.seed)
        if arrays is not None:
            set_weights(network, {n: a for n, a in arrays.items() if not n.startswith("slots/")})
        self.model = TrainingModel(network, self.program)
        self.evaluator = Evaluator(self.program.spec, self.precision)
        if step:
            set_slots(self.model, arrays, step)
        if self.shares:  # what Keras makes is this process's own; the steps hold what all have
            self.devices.enter_context(shared)

    def advance(self, n: int):
        """Start one training step."""
        if self.steps is None:
            stream = updates(self.case, self.data, self.seed, self.step, self.process)
            self.steps = compiled_steps(self.model, stream)
        with self.explained():
            logs = self.steps.do()
        self.step += 1
        if self.watch is not None:
            if self.watch.seen == 1 and self.validates:  # the training step is compiled
                self.compiling = self.evaluator.prepare(self.case.image_size, self.data)
            self.watch.step()
        return Unread(logs, self.explained)

    def explained(self):
        """Return a context that turns what a backend says about images or memory into one message."""
        case = self.case
        order = lambda u: step_images(self.data, case.global_batch_size, u, self.seed)
        coming = range(self.step, self.step + 4)  # read, but not yet used
        due = lambda: np.concatenate([order(u) for u in coming])
        doing = lambda: (
            f"micro_batch_size={case.micro_batch_size} at {case.image_size} pixels: use less"
        )
        explained = contextlib.ExitStack()
        explained.enter_context(explain_failures(self.data, "train", due, doing))
        explained.enter_context(explain_loss(self.processes))
        return explained

    def _sync(self):
        if self.steps is not None:
            self.steps.sync()

    def state(self) -> Dict[str, np.ndarray]:
        """Return weights and slots."""
        with self.explained():
            self._sync()
            return training_state(self.model)

    def scores(self, arrays=None, between=lambda: None) -> Scores:
        """Measure on every validation image."""
        self._sync()
        case, weights = self.case, {**get_weights(self.model.network), **(arrays or {})}
        how = dict(image_resize=case.image_resize, between=between, processes=self.processes)
        return self.evaluator.evaluate(weights, self.data, case.image_size, **how)

    def environment(self) -> dict:
        """Describe the machine."""
        several = {"processes": self.processes.count} if self.shares else {}
        return {**environment(), **several}

    def findings(self) -> dict:
        """Return which of GPU and cores decode, where that was tried: see `data.gpu_reader`."""
        return {name: self.data.kept[name] for name in (TRIALS,) if name in self.data.kept}

    def say_cost(self):
        """Print how long the run will take, and how much memory."""
        say_estimate(self.case, self.data)
        schedule = steps_per_epoch(self.case, self.data.train_count)
        last = total_updates(self.case, schedule)
        last = min(last, self.case.max_steps or last)
        per_epoch = self.data.train_count // self.case.global_batch_size
        self.watch = CostWatch(self.step, last, per_epoch)

    def close(self):
        """Leave the devices as they were. What still compiles is waited for: an exit meanwhile could crash."""
        if self.compiling is not None:
            self.compiling.join()
        if self.steps is not None:
            self.steps.close()
        self.devices.close()
