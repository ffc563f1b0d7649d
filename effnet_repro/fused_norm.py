"""The norm's kernels under their earlier name: they are in `effnet_repro.kernels`."""

from effnet_repro.kernels.norm import fused_norm, fused_proxy
from effnet_repro.kernels.product_norm import fused_product_norm
from effnet_repro.kernels.tiles import GROUP, by_groups, by_pixels, interpreted, launch

__all__ = [
    "GROUP",
    "by_groups",
    "by_pixels",
    "fused_norm",
    "fused_product_norm",
    "fused_proxy",
    "interpreted",
    "launch",
]
