"""A trained network, applied fast to images, and measured on all of a validation split."""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Callable, Dict, Optional

import numpy as np

from effnet_repro.data import DataSet
from effnet_repro.data.threads import core_count
from effnet_repro.efficientnet import current_ops, xla_pays
from effnet_repro.network import fold_proxies, params, run
from effnet_repro.ops import TFCPUOps
from effnet_repro.runs import Scores, score
from effnet_repro.scaling import ModelSpec
from effnet_repro.training.stream import validation_stream


@functools.lru_cache(maxsize=8)
def _forward(spec, precision):
    "A compiled function of (weights, images), the same one for every epoch of a run"
    ops = current_ops()
    forward = lambda weights, images: run(ops, spec, weights, ops.cast(images, precision))
    if ops.name == "jax":
        return ops.jax.jit(forward)
    return ops.tf.function(forward, autograph=False, jit_compile=xla_pays())


@functools.lru_cache(maxsize=8)
def _forward_on_one_core(spec, precision, shapes, shape, dtype):
    "A compiled function of pictures of that shape and of weights, in the thread that calls it"
    ops, graph = current_ops(), current_ops().tf.Graph()
    v1 = ops.tf.compat.v1
    with graph.as_default():
        weights = {name: v1.placeholder("float32", s) for name, s in shapes}
        images = v1.placeholder(dtype, shape)
        logits = run(ops, spec, weights, ops.cast(images, precision))
    here = v1.ConfigProto(inter_op_parallelism_threads=-1, intra_op_parallelism_threads=1)
    session = v1.Session(graph=graph, config=here)
    return session.make_callable(logits, [images, *weights.values()])


def num_parts(n, cores):
    "The most equal parts of `n` pictures, one or more each, that `cores` can take at once"
    return max((k for k in range(1, min(n, cores) + 1) if n % k == 0), default=1)


def predictor(
    spec: ModelSpec,  # The network
    weights: Dict[str, np.ndarray],  # Full name -> array
    precision: str = "float32",  # Type to compute in
):  # A function from pictures (N, S, S, 3) uint8 to logits (N, classes), NumPy
    "Make a fast function that applies a trained network"
    ops, cores = current_ops(), core_count()
    if spec.proxy_norm and not spec.folded:
        spec, weights = replace(spec, folded=True), fold_proxies(weights)
    step, tensors = _forward(spec, precision), {n: ops.asarray(w) for n, w in weights.items()}
    whole = lambda images: np.asarray(step(tensors, ops.asarray(images)))
    if not isinstance(ops, TFCPUOps):
        return whole
    arrays = [tensors[p.name].numpy() for p in params(spec)]
    shapes = tuple((p.name, a.shape) for p, a in zip(params(spec), arrays))
    threads = ThreadPoolExecutor(cores)

    def core_by_core(images):
        images = np.asarray(images)
        parts = np.split(images, num_parts(len(images), cores))
        if len(parts) == 1:
            return whole(images)
        step = _forward_on_one_core(spec, precision, shapes, parts[0].shape, images.dtype.name)
        return np.concatenate(list(threads.map(lambda part: step(part, *arrays), parts)))

    return core_by_core


def evaluate(
    spec: ModelSpec,  # The network
    weights: Dict[str, np.ndarray],  # Full name -> array
    data: DataSet,  # Its validation pictures are used
    image_size: int,  # Side to test at, pixels
    batch: int = 64,  # Pictures at a time
    precision: str = "float32",  # Type to compute in
    image_resize: str = "published",  # Or "modern": as the network was trained, see `29_transforms`
    between: Optional[Callable[[], None]] = None,  # Called before each batch; may raise
) -> Scores:
    "Measure weights on every validation picture"
    classes = spec.num_classes
    if classes != data.num_classes:
        raise ValueError(
            f"The network has {classes} classes, the data {data.num_classes} ({data.root}). "
            "Validate on the data set that it was trained on."
        )
    predict = predictor(spec, weights, precision)
    batch = max(1, min(batch, data.validation_count))
    stream = validation_stream(data, image_size, batch, image_resize)

    def measured(images, labels, mask):
        if between is not None:
            between()
        return predict(images), labels, mask

    return score((measured(*one) for one in stream), classes, image_size, data.root)
