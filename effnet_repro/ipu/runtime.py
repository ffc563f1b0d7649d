"""IPUs as the runtime of a run: a pipelined program driven a device loop at a time, its weights, its scores."""

import functools
import math
from dataclasses import replace
from typing import Dict, List, Optional

import numpy as np

from effnet_repro.data import DataSet, training_batches
from effnet_repro.ipu.feed import element_stream
from effnet_repro.ipu.layout import ipus_per_replica, machine_options
from effnet_repro.ipu.poprun import broadcast, gather
from effnet_repro.ipu.program import TrainingProgram, get_state, set_state
from effnet_repro.ipu.sdk import Graphcore, configure, describe_tensorflow
from effnet_repro.ipu.validation import Measurement
from effnet_repro.network import check_matches, initial_weights, params
from effnet_repro.recipe import learning_rate
from effnet_repro.runs import Runtime, Scores, Task, describe_machine
from effnet_repro.scaling import ModelSpec


class IPURuntime(Runtime):
    """Trains a case as a pipeline on IPUs, alone or as one of the processes that `poprun` started.

    - `graphcore`: the SDK.
    - `task`: its case is laid out for the IPUs that there are.
    - `connection`: "ALWAYS"; "ON_DEMAND" takes the IPUs only while a program runs; "PRE_COMPILE" has none.

    One program fits on the machine at a time: training and validation give way to each other.
    """

    backend = "graphcore"

    def __init__(self, graphcore: Graphcore, task: Task, connection: str = "ALWAYS"):
        self.graphcore, self.task, self.connection = graphcore, task, connection
        self.case, self.precision = task.case, task.case.precision
        self.process = graphcore.instances
        self.program: Optional[TrainingProgram] = None
        self.measurement: Optional[Measurement] = None

    @property
    def ipus(self) -> int:
        """IPUs over all processes."""
        return self.case.num_replicas * ipus_per_replica(self.case.num_stages)

    def settle(self, data: DataSet, run_dir) -> DataSet:
        """Say that TensorFlow decodes the images: an infeed takes a `tf.data.Dataset`."""
        return replace(data, decoder="tensorflow")

    def begin(self, data: DataSet, step: int, arrays: Optional[Dict[str, np.ndarray]]):
        """Take the arrays of the first process. The program is built with the first step.

        Raises RuntimeError when processes begin at different steps.
        """
        self.data, self.step = data, step
        self.spec = ModelSpec.from_case(self.case, num_classes=data.num_classes)
        given = arrays or initial_weights(self.spec, self.task.options.seed)
        own = {n: w for n, w in given.items() if not n.startswith("slots/")}
        check_matches(own, params(self.spec))
        if self.process[1] > 1:
            self._configure()
            if len({int(part[0]) for part in self.gather(np.int32([step]))}) > 1:
                where = self.task.run_dir
                raise RuntimeError(
                    f"{where}: processes see different checkpoints. Use one shared folder."
                )
            given = broadcast(self.graphcore, given)
        self.arrays = given

    def _configure(self):
        "Configure the machine for training"
        case, graphcore = self.case, self.graphcore
        each = ipus_per_replica(case.num_stages)
        local = None if graphcore.popdist else case.num_replicas // self.process[1] * each
        configure(graphcore, machine_options(case, local, self.connection), each)
        if case.stochastic_rounding:  # 16-bit weights must round alike in every replica
            alike = dict(experimental_identical_replicas=case.precision == "16.16")
            graphcore.ipu.utils.reset_ipu_seed(self.task.options.seed, **alike)

    def build(self) -> TrainingProgram:
        """Build the training program and give it the weights; the stream of images begins at the next step."""
        case, spec, seed, first = self.case, self.spec, self.task.options.seed, self.step
        if self.measurement is not None:
            self.measurement.close()
            self.measurement = None
        self._configure()

        def dataset():
            how = dict(seed=seed, first_update=first, area_min=case.crop_area_min)
            how.update(preprocessing=case.train_preprocessing, image_resize=case.image_resize)
            size, batch = case.image_size, case.global_batch_size
            images = training_batches(self.data, size, batch, shard=self.process, **how)
            return element_stream(case, spec, images, seed, first, self.process)

        self.course = replace(self.task, data=self.data).course()
        program = TrainingProgram(self.graphcore, case, spec, dataset, self.steps_of_a_run())
        set_state(program, self.arrays)
        self.program = program
        return program

    def steps_of_a_run(self) -> int:
        """Return the most steps that one program run may do: it ends with every device loop, epoch and training."""
        ends = self.case.device_loop, self.course.steps_per_epoch, self.course.last_step, self.step
        return functools.reduce(math.gcd, ends)

    def advance(self, n: int) -> np.ndarray:
        """Run the program once: the steps of a device loop, or a part of it that ends with the epoch, too."""
        program = self.program or self.build()
        values = program.run(learning_rate(self.case, self.step, self.course.schedule))
        self.step += len(values)
        return values

    def state(self) -> Dict[str, np.ndarray]:
        """Return weights and slots, float32."""
        return self.arrays if self.program is None else get_state(self.program)

    def scores(self, arrays=None, between=lambda: None) -> Scores:
        """Measure on every validation image, each IPU with a network of its own."""
        if self.program is not None:
            self.arrays = self.state()
            self._close_program()
        if self.measurement is None:
            case = self.case
            what = (case, self.spec, self.data, case.image_size)
            self.measurement = Measurement(self.graphcore, *what, self.ipus)
        weights = {n: w for n, w in self.arrays.items() if not n.startswith("slots/")}
        return self.measurement.scores({**weights, **(arrays or {})}, between)

    def gather(self, values: np.ndarray) -> List[np.ndarray]:
        """Return the values of every process."""
        return [part[0] for part in gather(self.graphcore, [values])]

    def environment(self) -> dict:
        """Describe the machine."""
        return describe_machine("graphcore", f"{self.ipus} IPUs, {describe_tensorflow()}")

    def _close_program(self):
        self.program.close()
        self.program = None

    def close(self):
        """Give back the programs' queues and images."""
        if self.program is not None:
            self._close_program()
        if self.measurement is not None:
            self.measurement.close()
            self.measurement = None
