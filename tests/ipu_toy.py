"""A toy program for the stand-in: one weight, images of one number, and whatever options a test gives."""

import sys

import numpy as np
import tensorflow as tf

tf1 = tf.compat.v1


def ipu():
    return sys.modules["tensorflow.python.ipu"]


def configure(ipus=2, **options):
    config = ipu().config.IPUConfig()
    config.auto_select_ipus = ipus
    for name, value in options.items():
        part, *path = name.split("__")
        at = config
        for step in path:
            at, part = getattr(at, part), step
        setattr(at, part, value)
    config.configure_ipu_system()
    return config


def elements(n=64, start=0):
    "A queue of the numbers start, start + 1, ..., each a vector of one"
    values = np.arange(start, start + n, dtype="float32")[:, None]
    return ipu().ipu_infeed_queue.IPUInfeedQueue(tf.data.Dataset.from_tensor_slices(values))


def outfeed(**kwargs):
    return ipu().ipu_outfeed_queue.IPUOutfeedQueue(**kwargs)


def first(x):
    w = tf1.get_variable("w", [1], initializer=tf1.ones_initializer())
    return [x * w]


def last(y):
    return [tf.reduce_sum(y)]


def sgd(loss, rate=1.0, reduce=True):
    "Gradient descent on the mean over replicas"
    opt = tf1.train.GradientDescentOptimizer(rate)
    if reduce:
        opt = ipu().cross_replica_optimizer.CrossReplicaOptimizer(opt)
    return ipu().pipelining_ops.OptimizerFunctionOutput(opt, loss)


class Toy:
    "Loss w * x summed: the gradient of w is the image itself"

    def __init__(self, stages=(first, last), ga=4, n=64, **options):
        ops = ipu().pipelining_ops
        self.infeed = elements(n)
        self.outfeed = options.pop("outfeed_queue", None) or outfeed()
        given = dict(
            gradient_accumulation_count=ga,
            infeed_queue=self.infeed,
            outfeed_queue=self.outfeed,
            optimizer_function=sgd,
        )
        given.update(options)
        given = {k: v for k, v in given.items() if v is not ...}
        with ipu().scopes.ipu_scope("/device:IPU:0"):
            self.step = ipu().ipu_compiler.compile(lambda: ops.pipeline(list(stages), **given), [])
        self.report = self.outfeed.dequeue() if self.outfeed.enqueued else None
        self.start = [tf1.global_variables_initializer(), self.infeed.initializer]

    def session(self):
        session = tf1.Session()
        session.run(self.start)
        return session

    def weight(self, session):
        return float(session.run(tf1.global_variables()[0])[0])
