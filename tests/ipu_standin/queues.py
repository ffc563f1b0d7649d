"""Infeed and outfeed queues."""

import enum

import numpy as np
import tensorflow as tf

from .machine import ProcessAbort, machine

tf1 = tf.compat.v1


class _Infeed:
    def _set_up(self, dataset, prefetch_depth=None):
        if prefetch_depth is not None and not 0 < prefetch_depth <= 255:
            raise ValueError("prefetch_depth must be between 1 and 255")
        spec = tf.data.experimental.get_structure(dataset)
        for part in tf.nest.flatten(spec):
            if not part.shape.is_fully_defined():
                raise ValueError(
                    f"The shape {part.shape} is not fully defined. If the dataset was batched, "
                    "use `drop_remainder=True`."
                )
        self._iterator = tf1.data.make_initializable_iterator(dataset)
        self._element, self.deleter = self._iterator.get_next(), tf1.no_op("deleter")
        self._flat, self._initializer_taken, self.dequeued = tf.nest.flatten(spec), False, False

    @property
    def initializer(self):
        if self._initializer_taken:
            raise ValueError("The IPUInfeedQueue `initializer` function can only be accessed once.")
        self._initializer_taken = True
        return self._iterator.initializer

    @property
    def number_of_tuple_elements(self):
        return len(self._flat)

    def get_next(self):
        raise ValueError("IPUInfeedQueue.get_next is obsolete.")

    def arguments(self):
        "Positional and keyword arguments for stage 0 or a loop's body"
        self.dequeued = True
        element = self._element
        if isinstance(element, dict) and all(isinstance(k, str) for k in element):
            return (), dict(element)
        if isinstance(element, tuple):
            if len(element) == 1 and isinstance(element[0], dict):
                return (), dict(element[0])
            return tuple(element), {}
        return (element,), {}


def make_infeed_class(at_least):
    if at_least("2.5"):

        class IPUInfeedQueue(_Infeed):
            def __init__(
                self, dataset, device_ordinal=None, prefetch_depth=None, optimise_latency=False
            ):
                self._set_up(dataset, prefetch_depth)
    elif at_least("2.4"):

        class IPUInfeedQueue(_Infeed):
            def __init__(self, dataset, device_ordinal=None, prefetch_depth=None):
                self._set_up(dataset, prefetch_depth)
    elif at_least("2.2"):

        class IPUInfeedQueue(_Infeed):
            def __init__(
                self,
                dataset,
                feed_name=None,
                device_ordinal=0,
                replication_factor=1,
                data_to_prefetch=1,
                prefetch_depth=None,
            ):
                self._set_up(dataset, prefetch_depth)
    else:

        class IPUInfeedQueue(_Infeed):
            def __init__(
                self,
                dataset,
                feed_name,
                device_ordinal=0,
                replication_factor=1,
                data_to_prefetch=1,
                prefetch_depth=None,
            ):
                self._set_up(dataset, prefetch_depth)

    return IPUInfeedQueue


class IPUOutfeedMode(enum.Enum):
    ALL, LAST = "all", "last"


class _Outfeed:
    def _set_up(self, outfeed_mode):
        outfeed_mode = IPUOutfeedMode.ALL if outfeed_mode is None else outfeed_mode
        if not isinstance(outfeed_mode, IPUOutfeedMode):
            raise ValueError("outfeed_mode must be an IPUOutfeedMode")
        self.mode, self.structure, self.entries, self.ever_ran = outfeed_mode, None, [], False

    @property
    def enqueued(self):
        return self.structure is not None

    def enqueue(self, tensors):
        if self.enqueued:
            raise ValueError("An outfeed can only be enqueued once.")
        self.structure = tf.nest.map_structure(tf.convert_to_tensor, tensors)
        program = machine().building
        program.enqueues.append(self)
        return program.marker(tf.nest.flatten(self.structure))

    def push(self, replicas):
        "What every replica enqueued at one time: a list of flat lists of arrays"
        columns = zip(*replicas)
        self.entries.append(
            [np.stack(c) if len(replicas) > 1 else np.asarray(c[0]) for c in columns]
        )

    def _drain(self, shapes):
        m, self_entries = machine_of(self), self.entries
        kinds = [t.dtype.as_numpy_dtype for t in tf.nest.flatten(self.structure)]
        if m.config and m.config["device_connection.type"].name == "PRE_COMPILE":
            lead = (1,) if self.mode is IPUOutfeedMode.ALL else ()
            return [np.zeros(lead + tuple(s), k) for s, k in zip(shapes, kinds)]
        self.entries = []
        if self.mode is IPUOutfeedMode.LAST:
            if not self_entries:
                raise RuntimeError("Outfeed in LAST mode is empty.")
            return [np.asarray(v, k) for v, k in zip(self_entries[-1], kinds)]
        if not self_entries:  # drained, or the program never ran
            return [np.zeros((0, *s), k) for s, k in zip(shapes, kinds)]
        return [np.stack(c).astype(k) for c, k in zip(zip(*self_entries), kinds)]

    def dequeue(self, wait_for_completion=False):
        if not self.enqueued:
            raise ValueError("Trying to dequeue an outfeed which has not been enqueued.")
        flat, self._machine = tf.nest.flatten(self.structure), machine()

        def drain():
            lead = (self.replicas,) if getattr(self, "replicas", 1) > 1 else ()
            return self._drain([lead + tuple(t.shape) for t in flat])

        values = tf.numpy_function(drain, [], [t.dtype for t in flat])
        return tf.nest.pack_sequence_as(self.structure, list(values))


def machine_of(queue):
    return queue._machine


def make_outfeed_class(at_least):
    if at_least("2.5"):
        depth = 3 if at_least("2.6") else 1

        class IPUOutfeedQueue(_Outfeed):
            def __init__(
                self,
                outfeed_mode=None,
                device_ordinal=None,
                buffer_depth=depth,
                optimise_latency=False,
            ):
                self._set_up(outfeed_mode)
    elif at_least("2.4"):

        class IPUOutfeedQueue(_Outfeed):
            def __init__(self, outfeed_mode=None, device_ordinal=None, buffer_depth=1):
                self._set_up(outfeed_mode)
    elif at_least("2.2"):

        class IPUOutfeedQueue(_Outfeed):
            def __init__(
                self,
                feed_name=None,
                outfeed_mode=None,
                device_ordinal=0,
                replication_factor=None,
                io_batch_size=1,
            ):
                self._set_up(outfeed_mode)
    else:

        class IPUOutfeedQueue(_Outfeed):
            def __init__(
                self,
                feed_name,
                outfeed_mode=None,
                device_ordinal=0,
                replication_factor=None,
                io_batch_size=1,
            ):
                self._set_up(outfeed_mode)

    return IPUOutfeedQueue


def abort(why):
    raise ProcessAbort(f"{why} On hardware the process aborts here, without a Python exception.")
