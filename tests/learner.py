"""A network that is compiled once and learns again and again: what benchmarks of many trainings share.

A training step is the one of `effnet-train` (`training.compiled_steps`). Seed, rate, schedule, weight decay and
mixing are arguments of the compiled program, so trainings that differ in nothing else share it; network, batch, image
size, trained parts and stochastic depth belong to it.

    learner = Learner(case, data.num_classes, batch=128)
    arrays = learner.learn(learner.begin(seed), data, steps=600, seed=seed, rate=0.002, weight_decay=0.05)
    judged = learner.judge(arrays, data)  # top-1, loss, and which images are right

Both backends; the images stay on a GPU under JAX.
"""

import math
import time
from typing import Dict, NamedTuple, Optional, Sequence

import numpy as np

from effnet_repro.config import for_one_device, override
from effnet_repro.network import initial_weights

# A network of four blocks, for rehearsals
FOUR_BLOCKS = dict(
    net_stages=("r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o24", "r1_k5_s2_i24_o40"), top_filters=128
)
TOGETHER = 500  # Images that are judged at a time


class Judged(NamedTuple):
    "What weights are worth on the validation images"

    top1: float
    loss: float  # Cross entropy in nats, without label smoothing
    right: np.ndarray  # (n,) bool: whether each image's class was the first guess


class Learner:
    """A network that is compiled once and learns again and again.

    - `case`: the network, its image size and the recipe; drop path and dropout are compiled in.
    - `classes`: outputs of the classifier.
    - `batch`: images of a training step, in one piece.
    - `parts`: beginnings of the segments that learn, such as ("Top",); None = all.
    - `slows`: whether `learn` may be given a `body_rate`.
    - `norm_batch`: images that share batch norm's statistics, as on a machine with memory for so many; None = all.
    - `clip`: largest norm of all gradients together; None = as they are.
    """

    def __init__(
        self,
        case,
        classes: int,
        batch: int,
        parts: Optional[Sequence[str]] = None,
        slows: bool = False,
        norm_batch: Optional[int] = None,
        clip: Optional[float] = None,
    ):
        from effnet_repro.efficientnet import build_model
        from effnet_repro.training import Evaluator
        from effnet_repro.training.runtime import make_program

        own = {} if parts is None else {"variable_filter": tuple(parts)}
        self.case = for_one_device(override(case, **own), batch, batch)
        program = make_program(self.case, _Classes(classes), "auto", 0)
        # A batch says the seed; this tells kept programs apart.
        program = program._replace(seed=("clip", clip), norm_batch=norm_batch)
        self.spec, self.slows, self.loss = program.spec, slows, math.nan
        network = build_model(self.spec, image_size=case.image_size, dtype="float32")
        self.model = _numbered_model(network, program)
        self.model.optimizer.global_clipnorm = clip
        self.slots = [np.asarray(v.value) for v in self.model.optimizer.variables]
        self.evaluator = Evaluator(self.spec, program.precision)
        self._validation = None, {}

    def begin(self, seed: int) -> Dict[str, np.ndarray]:
        """Return fresh weights."""
        return initial_weights(self.spec, seed)

    def learn(
        self, arrays: Dict[str, np.ndarray], data, steps: int, seed: int, each=None, **numbers
    ):
        """Train from these weights and return the new ones.

        `self.loss` is the last step's; `self.seconds` took all but the first, which compiles or waits for images.

        - `each`: (steps, function): after every so many steps the function is called with the weights.
        - `numbers`: any field of `Case` that is not compiled in; `rate`, the highest learning rate, in place of its
          exponent; `warmup`, the share of the steps that the rate rises for, 0.05 where it is not given.
        """
        from effnet_repro.efficientnet import get_weights, set_weights
        from effnet_repro.training.steps import compiled_steps

        set_weights(self.model.network, arrays)
        for variable, value in zip(self.model.optimizer.variables, self.slots):
            variable.assign(value)
        run = compiled_steps(self.model, self._stream(self._run(data, steps, numbers), data, seed))
        every, call = each or (math.inf, None)
        for step in range(1, steps + 1):
            logs = run.do()
            if step == 1:
                float(logs["loss"])  # waits for it
                began = time.perf_counter()
            if step % every == 0:
                run.sync()
                call(get_weights(self.model.network))
        self.loss, self.seconds = float(logs["loss"]), time.perf_counter() - began
        run.sync()
        return get_weights(self.model.network)

    def judge(
        self, arrays: Dict[str, np.ndarray], data, image_size: Optional[int] = None
    ) -> Judged:
        """Measure weights on every validation image, at the size of the case if no other is given."""
        predict, right, losses = self.evaluator.predictor(arrays), [], []
        for images, labels, mask in self.images(data, image_size or self.case.image_size):
            logits = np.asarray(predict(images), "float64")
            top = logits.max(1)
            own = np.take_along_axis(logits, labels[:, None], 1)[:, 0]
            loss = top + np.log(np.exp(logits - top[:, None]).sum(1)) - own
            real = np.asarray(mask) > 0
            right.append((np.isfinite(logits).all(1) & (logits.argmax(1) == labels))[real])
            losses.append(loss[real])
        right, losses = np.concatenate(right), np.concatenate(losses)
        return Judged(float(right.mean()), float(losses.mean()), right)

    def _run(self, data, steps, numbers):
        "The case of one training"
        numbers = dict(numbers)
        epochs = steps / (data.train_count // self.case.global_batch_size)
        own = dict(epochs=epochs, warmup_epochs=epochs * numbers.pop("warmup", 0.05))
        rate = numbers.pop("rate", None)
        if rate is not None:
            own.update(base_learning_rate_exponent=math.log2(rate / self.case.global_batch_size))
        case = override(self.case, **{**own, **numbers})
        if case.optimizer != "adamw" and case.weight_decay != self.case.weight_decay:
            raise ValueError("Only AdamW's weight decay is an argument of the compiled step.")
        if case.body_rate != 1 and not self.slows:
            raise ValueError("A learner whose body is to be slow is made with slows=True.")
        return case

    def _stream(self, case, data, seed):
        "Training steps with everything that is an argument of the compiled one"
        from effnet_repro.training import updates

        more = dict(seed=np.int32(seed))
        if case.optimizer == "adamw":
            more.update(weight_decay=np.float32(case.weight_decay))
        if self.slows:
            more.update(body_rate=np.float32(case.body_rate))
        stream = updates(case, data, seed)
        if hasattr(stream, "map"):
            return stream.map(lambda batch: {**batch, **more})
        return _with_images(stream, case, more)

    def images(self, data, image_size: int) -> list:
        """Return the validation images, decoded once: a list of (images (n, S, S, 3) uint8, labels, mask)."""
        from effnet_repro.data import validation_arrays

        if self._validation[0] is not data:
            self._validation = data, {}
        known = self._validation[1]
        if image_size not in known:
            each = min(TOGETHER, data.validation_count)
            how = dict(image_resize=self.case.image_resize)
            known[image_size] = list(validation_arrays(data, image_size, each, **how))
        return known[image_size]


class _Classes:
    "As much of a data set as a program asks for"

    def __init__(self, num_classes):
        self.num_classes = num_classes


def _with_images(stream, case, more):
    "Cut the images of a resident set here: the compiled step then fits a set of any size"
    from effnet_repro.data.device import cutter

    for (batch,) in stream:
        if "cuts" in batch:
            pixels, cuts = _filled_up(batch.pop("pixels")), batch.pop("cuts")
            batch["images"] = cutter(case.image_resize)(pixels, cuts, case.image_size)
        yield ({**batch, **more},)


_filled = [None, None]  # Pixels of the last set, and the same with zeros behind them


def _filled_up(pixels):
    "Pixels (P, 3) on the device with zeros behind them: sets of about one size then share the program that cuts"
    import jax.numpy as jnp

    if _filled[0] is not pixels:
        size = max(2**20, 2 ** (len(pixels) - 1).bit_length())
        _filled[:] = pixels, jnp.pad(pixels, ((0, size - len(pixels)), (0, 0)))
    return _filled[1]


def _numbered_model(network, program):
    "A `TrainingModel` whose seed and weight decay come with each batch"
    from effnet_repro.training import TrainingModel

    class Numbered(TrainingModel):
        def train_step(self, *args):
            data, kept = args[-1], (self.program, self.optimizer.weight_decay)
            batch = dict(data[0] if isinstance(data, tuple) else data)
            self.program = kept[0]._replace(seed=batch.pop("seed"))
            self.optimizer.weight_decay = batch.pop("weight_decay", None)
            try:
                data = (batch,) if isinstance(data, tuple) else batch
                return super().train_step(*args[:-1], data)
            finally:
                self.program, self.optimizer.weight_decay = kept

    return Numbered(network, program)
