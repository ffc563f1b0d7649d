"""Checkpoints of the published code, Keras files and PyTorch state dicts become ours, and ours any of them.

`convert` does it in one call. `formats` tells what a file is, `tf1`, `keras_files`, `torch_files` and `ours`
read and write one format each (`torch_names` and `torch_others` know PyTorch's names), `recognize` finds the
network by its shapes, and `settle` checks what was found and names it as we do.
"""

from effnet_repro.convert.conversion import convert, read
from effnet_repro.convert.formats import FORMATS, check_name, format_of, target_format
from effnet_repro.convert.ours import write_ours
from effnet_repro.convert.recognize import case_for, network_of
from effnet_repro.convert.tf1 import read_tf1, write_tf1
from effnet_repro.convert.torch_files import TorchOptions
from effnet_repro.convert.torch_names import timm_name, to_state_dict, torch_name
from effnet_repro.convert.weights import Weights

__all__ = [
    "FORMATS",
    "TorchOptions",
    "Weights",
    "case_for",
    "check_name",
    "convert",
    "format_of",
    "network_of",
    "read",
    "read_tf1",
    "target_format",
    "timm_name",
    "to_state_dict",
    "torch_name",
    "write_ours",
    "write_tf1",
]
