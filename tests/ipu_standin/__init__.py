"""Graphcore's TensorFlow API on a CPU: its semantics and its refusals, for tests. Not shipped.

`install(sdk="3.4")` puts modules under the published names (`tensorflow.python.ipu`, `popdist`, ...)
until the block ends. Programs run in ordinary v1 graphs and sessions of stock TensorFlow: the stand-in
intercepts `Session.run`, and drives a compiled program micro-batch by micro-batch, replica by replica,
as the machine would. Nothing here was compared with an IPU: it follows a written contract, whose
sentences and the tests that hold them are listed in `contract.csv`.
"""

from .install import install, poprun
from .machine import Machine, ProcessAbort, ReplicasDiverged, machine

__all__ = ["install", "poprun", "Machine", "ProcessAbort", "ReplicasDiverged", "machine"]
