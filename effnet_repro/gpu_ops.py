"""The GPU's operations under their earlier name: they are in `effnet_repro.kernels`."""

from effnet_repro.kernels.conv import grouped_conv, patches
from effnet_repro.kernels.ops import XLA_FLAGS, GPUOps, add_xla_flags, jax_ops

__all__ = ["XLA_FLAGS", "GPUOps", "add_xla_flags", "grouped_conv", "jax_ops", "patches"]
