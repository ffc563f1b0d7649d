"""Trained weights measured on every validation image, on every IPU."""

from dataclasses import replace
from typing import Callable, Dict, Optional

import numpy as np

from effnet_repro import averaging
from effnet_repro import checkpoint as checkpoints
from effnet_repro.classes import match_classes
from effnet_repro.config import Case, case_from_dict, say_earlier
from effnet_repro.data import DataSet, open_data
from effnet_repro.ipu.feed import validation_stream
from effnet_repro.ipu.layout import compute_dtype, machine_options
from effnet_repro.ipu.poprun import count_ipus, gather
from effnet_repro.ipu.program import assign
from effnet_repro.ipu.sdk import Graphcore, IPUOps, configure, infeed, outfeed
from effnet_repro.messages import BestEffort
from effnet_repro.network import check_matches, fold_proxies, params, run, spec_of_arrays
from effnet_repro.paths import local_path
from effnet_repro.runs import Scores, check_init, measured_data, score, write_scores
from effnet_repro.scaling import ModelSpec


class ValidationProgram:
    """A network on every IPU of this process: images in, logits out.

    One IPU holds a whole network for inference, so there is no pipeline: a loop on every IPU, each with its own batch.
    Several sets of weights share one program.
    """

    def __init__(
        self,
        graphcore: Graphcore,  # The SDK; the machine is configured for one IPU a replica
        spec: ModelSpec,  # The network, folded
        stream,  # From `validation_stream`
        compute: str = "float16",  # Type of activations
    ):
        self.graphcore, self.variables = graphcore, {}
        iterations, self.runs, dataset = stream
        self.graph = graphcore.tf.Graph()
        with self.graph.as_default():
            ops, v1 = IPUOps(graphcore), graphcore.v1
            self.queue, out = infeed(graphcore, dataset(), "validation"), outfeed(graphcore, "out")

            def body(images, labels, mask):
                for p in params(spec):
                    zeros = v1.zeros_initializer()
                    how = dict(trainable=False, use_resource=True)
                    made = v1.get_variable(p.name, p.shape, "float32", zeros, **how)
                    self.variables[p.name] = made
                weights = {n: ops.cast(v, "float32") for n, v in self.variables.items()}
                logits = run(ops, spec, weights, ops.cast(images, compute))
                return out.enqueue([logits, labels, mask])

            loop = graphcore.ipu.loops.repeat
            self.step = graphcore.compile(lambda: loop(iterations, body, [], self.queue))
            self.report = out.dequeue()
            graphcore.ipu.utils.move_variable_initialization_to_cpu()
            self.session = v1.Session(graph=self.graph)
        self.session.run(self.queue.initializer)

    def run(self, weights: Dict[str, np.ndarray]):  # Yields logits (n, classes), labels, mask (n,)
        """Apply weights to all images; the first run has fillers only, and compiles."""
        assign(self.session, [(v, weights[n]) for n, v in self.variables.items()])
        for _ in range(self.runs):
            self.session.run(self.step)
            logits, labels, mask = (np.asarray(v) for v in self.session.run(self.report))
            yield logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), mask.reshape(-1)

    def close(self):
        """Give back the queue and its images."""
        self.session.run(self.queue.deleter)
        self.session.close()


def inference_weights(spec: ModelSpec, arrays: Dict[str, np.ndarray]) -> Dict[str, np.ndarray]:
    """Return the weights among `arrays`, by full name, with their proxy statistics folded.

    Raises ValueError for weights of another network than `spec`.
    """
    own = {n: w for n, w in arrays.items() if not n.startswith(("slots/", checkpoints.AVERAGE))}
    check_matches(own, params(spec_of_arrays(spec, own)))
    return fold_proxies(own) if spec.proxy_norm and not spec.folded else own


class Measurement:
    """A validation program, built once for any number of sets of weights. It configures the machine anew.

    - `case`: options and precision.
    - `spec`: the network.
    - `data`: its validation images are measured, at `image_size` pixels.
    - `ipus`: over all processes, each a replica with `batch` images at a time.
    """

    def __init__(
        self,
        graphcore: Graphcore,
        case: Case,
        spec: ModelSpec,
        data: DataSet,
        image_size: int,
        ipus: int = 16,
        batch: int = 8,
    ):
        self.graphcore, self.spec, self.data, self.image_size = graphcore, spec, data, image_size
        index, count = graphcore.instances
        configure(graphcore, machine_options(case, None if graphcore.popdist else ipus), 1)
        how = dict(shard=(index, count), image_resize=case.image_resize)
        stream = validation_stream(data, image_size, batch, ipus // count, **how)
        folded = replace(spec, folded=True) if spec.proxy_norm else spec
        self.program = ValidationProgram(graphcore, folded, stream, compute_dtype(case))

    def scores(
        self, arrays: Dict[str, np.ndarray], between: Callable[[], None] = lambda: None
    ) -> Scores:
        """Measure weights, by full name, on every validation image; `between` is called between program runs."""
        batches = self._batches(inference_weights(self.spec, arrays), between)
        return score(batches, self.spec.num_classes, self.image_size, self.data.root)

    def _batches(self, weights, between):
        "Logits, labels and masks of all processes, run by run"
        for part in self.program.run(weights):
            between()
            every = gather(self.graphcore, part)
            yield [np.concatenate(arrays) for arrays in zip(*every)]

    def close(self):
        """Give back the queue and its images."""
        self.program.close()


def evaluate(
    graphcore: Graphcore,  # The SDK
    case: Case,  # Options and precision
    spec: ModelSpec,  # The network
    weights: Dict[str, Dict[str, np.ndarray]],  # Any name -> weights by full name
    data: DataSet,  # Its validation images are used
    image_size: int,  # Side to test at, pixels
    ipus: int = 16,  # IPUs over all processes, each a replica
    batch: int = 8,  # Images of an IPU at a time
) -> Dict[str, Scores]:  # By the same names
    """Measure sets of weights on every validation image, on every IPU.

    Raises ValueError for weights of another network, before anything is built.
    """
    for arrays in weights.values():
        inference_weights(spec, arrays)
    measurement = Measurement(graphcore, case, spec, data, image_size, ipus, batch)
    found = {name: measurement.scores(arrays) for name, arrays in weights.items()}
    measurement.close()
    return found


def validate(
    source,  # A run folder, a checkpoint file or an average
    data_dir=None,  # Folder of images; None = the built-in sample set
    *,
    ipus: Optional[int] = None,  # IPUs over all processes, each a replica
    image_size: Optional[int] = None,  # Side to test at; None = the one it was trained at
    weights: str = "both",  # Of a run folder: "last", "average" or "both"
    data_format: Optional[str] = None,
    batch: int = 8,  # Images of an IPU at a time
    on_corrupt: str = "refuse",  # or "skip": leave damaged images out, see `open_data`
) -> Dict[str, Scores]:  # "last" and "average", or the name of the file
    """Measure trained weights on every validation image, whichever runtime trained them.

    A run folder gets its scores written down. Raises ValueError where the data do not fit the network.
    """
    graphcore, data, source = (
        Graphcore(),
        open_data(data_dir, data_format, on_corrupt=on_corrupt),
        local_path(source, "source"),
    )
    ipus = count_ipus(graphcore, 1, ipus)
    kinds = [weights] if weights != "both" else ["last", "average"]
    if not source.is_dir():
        kinds = ["last"]
    elif weights == "both" and not averaging.has_average(checkpoints.newest_file(source)):
        kinds = ["last"]  # the run ended before its first epoch did
    sets, updates = {}, {}
    for kind in kinds:
        arrays, metadata, path = averaging.load_weights(source, kind)
        case = case_from_dict(metadata["case"])
        data = match_classes(path, metadata, data)
        check_init(path, metadata, data, case)
        name = kind if source.is_dir() else path.name
        sets[name], updates[name] = arrays, averaging.read_update(path, kind)
    say_earlier(source, metadata["case"])
    spec = ModelSpec.from_case(case, num_classes=metadata["num_classes"])
    size = image_size or case.image_size
    scores = evaluate(graphcore, case, spec, sets, data, size, ipus, batch)
    if source.is_dir() and graphcore.instances[0] == 0:
        place = measured_data(data)
        for name, found in scores.items():
            newest = averaging.read_update(source, name) <= updates[name]
            with BestEffort("validation.csv"):
                write_scores(source, name, found, updates[name], place, in_any_case=newest)
    return scores
