"""A trained network, applied fast to images, and measured on all of a validation split."""

import functools
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Callable, Dict, Optional

import numpy as np

from effnet_repro.data import DataSet
from effnet_repro.data.threads import core_count
from effnet_repro.distributed import ALONE, Processes
from effnet_repro.efficientnet import current_ops, xla_pays
from effnet_repro.network import fold_proxies, params, run
from effnet_repro.ops import TFCPUOps
from effnet_repro.runs import Scores, refuse_unmeasurable, score
from effnet_repro.scaling import ModelSpec
from effnet_repro.training.compiled import compile_once
from effnet_repro.training.device import has_jax_gpu
from effnet_repro.training.stream import validation_stream


def num_parts(n, cores):
    "The most equal parts of `n` images, one or more each, that `cores` can take at once"
    return max((k for k in range(1, min(n, cores) + 1) if n % k == 0), default=1)


class Evaluator:
    """Applies networks of one specification to images, and measures them; the weights may change.

    What is compiled is kept here, so a run that validates after every epoch keeps one evaluator.
    """

    def __init__(self, spec: ModelSpec, precision: str = "float32"):
        self.spec, self.precision = spec, precision
        self._ops, self._cores = current_ops(), core_count()
        self._folds = spec.proxy_norm and not spec.folded
        self._applied = replace(spec, folded=True) if self._folds else spec
        self._forward = self._compile()
        self._on_one_core = functools.lru_cache(maxsize=8)(self._compile_on_one_core)

    def _compile(self):
        "A compiled function of (weights, images)"
        ops, cast = self._ops, lambda images: self._ops.cast(images, self.precision)
        forward = lambda weights, images: run(ops, self._applied, weights, cast(images))
        if ops.name == "jax":
            return self._kept(forward) if has_jax_gpu() else ops.jax.jit(forward)
        return ops.tf.function(forward, autograph=False, jit_compile=xla_pays())

    def _kept(self, forward):
        "A function for a GPU, compiled once for each shape of images, whichever thread asks first"
        known, one = {}, threading.Lock()
        key = [repr(self._applied), self.precision]

        def call(weights, images):
            with one:
                shape = tuple(images.shape), str(images.dtype)
                if shape not in known:
                    known[shape] = compile_once(forward, (weights, images), key)
            return known[shape](weights, images)

        return call

    def prepare(self, image_size: int, data: DataSet) -> Optional[threading.Thread]:
        """Compile in a thread what `evaluate` will need of a GPU, while it trains; None where that has no use."""
        if not has_jax_gpu() or not data.validation_count:
            return None
        jax, batch = self._ops.jax, self._batch(None, data)
        zeros = lambda: {p.name: np.zeros(p.shape, "float32") for p in params(self._applied)}
        images = np.zeros((batch, image_size, image_size, 3), "uint8")
        work = lambda: self._forward(jax.device_put(zeros()), jax.device_put(images))
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def _batch(self, wish, data):
        "Images at a time"
        return max(1, min(wish or (512 if has_jax_gpu() else 64), data.validation_count))

    def _compile_on_one_core(self, shapes, shape, dtype):
        "A compiled function of images of that shape and of weights, in the thread that calls it"
        ops, graph = self._ops, self._ops.tf.Graph()
        v1 = ops.tf.compat.v1
        with graph.as_default():
            weights = {name: v1.placeholder("float32", s) for name, s in shapes}
            images = v1.placeholder(dtype, shape)
            logits = run(ops, self._applied, weights, ops.cast(images, self.precision))
        here = v1.ConfigProto(inter_op_parallelism_threads=-1, intra_op_parallelism_threads=1)
        session = v1.Session(graph=graph, config=here)
        return session.make_callable(logits, [images, *weights.values()])

    def predictor(
        self,
        weights: Dict[str, np.ndarray],  # Full name -> array
    ):  # A function from images (N, S, S, 3) uint8 to logits (N, classes), NumPy
        "Make a fast function that applies the network with these weights"
        starter = self._starter(weights)
        return lambda images: np.asarray(starter(images))

    def _starter(self, weights):
        "A function that begins to apply the network: its logits may still be computed"
        ops = self._ops
        weights = fold_proxies(weights) if self._folds else weights
        tensors = {n: ops.asarray(w) for n, w in weights.items()}
        whole = lambda images: self._forward(tensors, ops.asarray(images))
        if not isinstance(ops, TFCPUOps):
            return whole
        arrays = [tensors[p.name].numpy() for p in params(self._applied)]
        shapes = tuple((p.name, a.shape) for p, a in zip(params(self._applied), arrays))
        threads = ThreadPoolExecutor(self._cores)

        def core_by_core(images):
            images = np.asarray(images)
            parts = np.split(images, num_parts(len(images), self._cores))
            if len(parts) == 1:
                return whole(images)
            step = self._on_one_core(shapes, parts[0].shape, images.dtype.name)
            return np.concatenate(list(threads.map(lambda part: step(part, *arrays), parts)))

        return core_by_core

    def evaluate(
        self,
        weights: Dict[str, np.ndarray],  # Full name -> array
        data: DataSet,  # Its validation images are used
        image_size: int,  # Side to test at, pixels
        batch: Optional[int] = None,  # Images at a time; None = 512 on a GPU, else 64
        image_resize: str = "published",  # Or "modern": as the network was trained, see `29_transforms`
        between: Optional[Callable[[], None]] = None,  # Called before each batch; may raise
        processes: Processes = ALONE,  # Each measures its part of the images
    ) -> Scores:
        "Measure weights on every validation image; ValueError when the numbers of classes differ"
        classes = self.spec.num_classes
        refuse_unmeasurable(classes, data)
        start, ahead = self._starter(weights), 2 if has_jax_gpu() else 0
        each = self._batch(batch, data)
        stream = validation_stream(data, image_size, each, image_resize, processes.shard)

        def measured():
            begun = deque()  # the device has its next batch before Python waits for this one
            for images, labels, mask in stream:
                if between is not None:
                    between()
                begun.append((start(images), labels, mask))
                while len(begun) > ahead:
                    yield begun.popleft()
            yield from begun

        logits = ((np.asarray(y), labels, mask) for y, labels, mask in measured())
        return score(logits, classes, image_size, data.root, processes)


def predictor(
    spec: ModelSpec,  # The network
    weights: Dict[str, np.ndarray],  # Full name -> array
    precision: str = "float32",  # Type to compute in
):  # A function from images (N, S, S, 3) uint8 to logits (N, classes), NumPy
    "Make a fast function that applies a trained network; for several weights keep an `Evaluator`"
    return Evaluator(spec, precision).predictor(weights)


def evaluate(
    spec: ModelSpec,  # The network
    weights: Dict[str, np.ndarray],  # Full name -> array
    data: DataSet,  # Its validation images are used
    image_size: int,  # Side to test at, pixels
    batch: Optional[int] = None,  # Images at a time; None = 512 on a GPU, else 64
    precision: str = "float32",  # Type to compute in
    **how,  # `image_resize` and `between`, as of `Evaluator.evaluate`
) -> Scores:
    "Measure weights on every validation image; for several weights keep an `Evaluator`"
    return Evaluator(spec, precision).evaluate(weights, data, image_size, batch, **how)
