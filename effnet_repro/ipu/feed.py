"""What the host feeds to IPUs: micro-batches with everything random drawn for them, and images to validate on."""

from typing import Dict, Tuple

import numpy as np

from effnet_repro.augment import draw_mixing
from effnet_repro.config import Case
from effnet_repro.data import DataSet, validation_batches
from effnet_repro.ipu.layout import compute_dtype
from effnet_repro.ops import NumpyOps, TrainContext
from effnet_repro.scaling import ModelSpec, blocks


def mask_rates(
    spec: ModelSpec,  # The network
) -> Dict[str, float]:  # Residual block -> probability that its branch is dropped, where above 0
    """Return the residual blocks whose branch stochastic depth may drop, in the order of the network."""
    return {b.name: b.drop_path_rate for b in blocks(spec) if b.residual and b.drop_path_rate}


def draw_masks(
    spec: ModelSpec,  # The network
    micro_batch_size: int,  # Images, m
    seed: int,  # Of the run
    update: int,  # Number of the weight update
    micro_batch: int,  # Number within the step, over all replicas
) -> Dict[
    str, np.ndarray
]:  # "drop_path" (m, branches) and "dropout" (m, features), uint8, 1 = keep
    """Draw what one micro-batch keeps: a byte per image and branch, and per image and feature of the head.

    Ours: as bytes they are 2 % of the images' traffic. What never drops is left out.
    """
    context, rates = TrainContext(NumpyOps(), seed, update, micro_batch), mask_rates(spec)
    drawn = {}
    if rates:
        rate = np.array(list(rates.values()), "float32")
        drawn["drop_path"] = context.mask(
            "pipeline", "drop_path", rate, (micro_batch_size, len(rate))
        )
    if spec.dropout_rate:
        shape = (micro_batch_size, spec.head_filters)
        drawn["dropout"] = context.mask("pipeline", "dropout", spec.dropout_rate, shape)
    return {kind: (mask > 0).astype("uint8") for kind, mask in drawn.items()}


class FedMasks:
    """Stands in for `TrainContext` inside a stage: the masks came with the images, and are handed to the segments.

    - `ops`: tensor operations.
    - `spec`: the network; each of its residual blocks has a column of "drop_path".
    - `masks`: "drop_path" (m, branches) and "dropout" (m, features), tensors of uint8, 1 = keep.
    """

    def __init__(self, ops, spec, masks):  # masks: "drop_path" and "dropout", tensors of uint8
        self.ops, self.masks, self.statistics = ops, masks, {}
        self.columns = {name: i for i, name in enumerate(mask_rates(spec))}

    def mask(self, segment, kind, rate, shape):  # float32, of `shape`
        kept = self.masks[kind]
        if kind == "drop_path":
            kept = kept[:, self.columns[segment]]
        kept = self.ops.reshape(self.ops.cast(kept, "float32"), shape)
        return kept * (1.0 / (1.0 - rate))


class Draws:
    """Everything random of the micro-batches of a run, as NumPy arrays: their mixing and their masks.

    The draws depend on seed, training step and micro-batch alone, so every process can make its own. The mixing of a
    step is drawn for all its micro-batches at once, and kept until another step is asked for.
    """

    def __init__(self, case: Case, spec: ModelSpec, seed: int):
        self.case, self.spec, self.seed, self.mixing = case, spec, seed, {}

    def of(self, update: int, micro_batch: int) -> Dict[str, np.ndarray]:
        """Return name -> array for one micro-batch, numbered over all replicas, without what the case switches off."""
        case = self.case
        drawn = draw_masks(self.spec, case.micro_batch_size, self.seed, update, micro_batch)
        if case.mixes:
            here = case.micro_batch_size // case.mix_groups[1]  # groups of a micro-batch
            for name, v in self._mixing_of(update).items():
                drawn[name] = (v if here == 1 else v.reshape(-1, here, *v.shape[1:]))[micro_batch]
        return drawn

    def _mixing_of(self, update):
        if update not in self.mixing:
            names = ("mixup_alpha", "cutmix_lambda")
            how = {name: getattr(self.case, name) for name in names}
            groups, size = self.case.mix_groups
            how.update(seed=self.seed, update=update, groups=groups, group_size=size)
            self.mixing = {update: draw_mixing(**how)}
        return self.mixing[update]


def draws(
    case: Case,  # In the layout to run
    spec: ModelSpec,  # Its network
    seed: int,  # Of the run
    update: int,  # Number of the weight update
    micro_batch: int,  # Number within the step, over all replicas
) -> Dict[str, np.ndarray]:  # Name -> array: mixing and masks, without what the case switches off
    """Draw everything random of one micro-batch; who draws many keeps a `Draws`."""
    return Draws(case, spec, seed).of(update, micro_batch)


def element_stream(
    case: Case,  # In the layout to run
    spec: ModelSpec,  # Its network
    batches,  # tf.data.Dataset of (images uint8, labels int32) in batches of this process's update
    seed: int = 0,  # Of the run
    first_update: int = 0,  # Update of the first batch
    shard: Tuple[int, int] = (0, 1),  # (index, count) of this process
):  # tf.data.Dataset of dictionaries, one a micro-batch
    """Return the infeed's dataset: one element is one micro-batch of one replica.

    Each element is a dictionary: "images" (m, side, side, 3), uint8, or the type of activations without 8-bit input;
    "labels" (m,), int32; and what `draws` gives. Micro-batch j of a step goes to replica j mod R, since a queue
    hands an element to each replica in turn; of `count` processes, the one with `index` gets every `count`-th.
    """
    import tensorflow as tf

    index, count = shard
    mine = case.gradient_accumulation * case.num_replicas // count  # micro-batches of a step
    random = Draws(case, spec, seed)

    def drawn(j):
        update, own = divmod(int(j), mine)
        return list(random.of(update, own * count + index).values())

    example = random.of(0, 0)
    kinds = [tf.as_dtype(v.dtype) for v in example.values()]

    def add(j, micro_batch):
        element = dict(zip(("images", "labels"), micro_batch))
        if example:
            values = tf.numpy_function(drawn, [j], kinds)
            for (name, like), value in zip(example.items(), values):
                element[name] = tf.ensure_shape(value, like.shape)
        if not case.eight_bit_io:
            element["images"] = tf.cast(element["images"], compute_dtype(case))
        return element

    def cut(images, labels):  # whole micro-batches: taking single images apart costs more
        side = (case.image_size, case.image_size, 3)
        images = tf.reshape(images, (mine, case.micro_batch_size, *side))
        return images, tf.reshape(labels, (mine, case.micro_batch_size))

    micro_batches = batches.map(cut).unbatch()
    return micro_batches.enumerate(first_update * mine).map(add).prefetch(8)


def validation_stream(
    data: DataSet,  # Its validation images are read
    image_size: int,  # Side, pixels
    batch: int,  # Images of an element
    replicas: int,  # Of this process
    shard: Tuple[int, int] = (0, 1),  # (index, count) of this process
    most_runs: int = 8,  # Program runs for the images
    image_resize: str = "published",  # Or "modern": see `29_transforms`
):  # (elements for each replica and run, runs with the first, function that makes the dataset)
    """Plan the reading of every validation image.

    Returns (elements for each replica and run, runs, function that makes the dataset).

    The first run has fillers only: it compiles the program. All replicas get as many elements, the last ones blank
    where the images do not divide; a mask of zeros says so. The dataset repeats, a round for each set of weights.
    """
    most = -(-data.validation_count // shard[1])
    elements = -(-most // batch)
    each = -(-elements // replicas)  # elements of a replica
    iterations = -(-each // most_runs)
    runs = -(-each // iterations)

    def dataset():
        import tensorflow as tf

        names = ("images", "labels", "mask")
        real = validation_batches(data, image_size, batch, shard=shard, image_resize=image_resize)
        fixed = lambda *v: {n: tf.ensure_shape(t, (batch, *t.shape[1:])) for n, t in zip(names, v)}
        real = real.map(fixed)
        blank = tf.data.Dataset.from_tensors(
            {n: np.zeros(s.shape, s.dtype.as_numpy_dtype) for n, s in real.element_spec.items()}
        )
        spare = iterations * runs * replicas - elements
        return (
            blank.repeat(iterations * replicas)
            .concatenate(real.concatenate(blank.repeat(spare)))
            .repeat()
        )

    return iterations, 1 + runs, dataset
