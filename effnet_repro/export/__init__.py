"""Trained networks as files of other programs: ONNX, SavedModel, LiteRT, StableHLO and Keras.

`export` does it in one call. `subject` says what is exported, `layers` writes the network's one definition as a list of
layers, `onnx_file`, `tensorflow_files`, `stablehlo_file` and `keras_file` know a format each, `int8` quantizes,
`agreement` compares a file with the network, and `card` writes the model card.
"""

from effnet_repro.export.agreement import TOLERANCE, Agreement, Disagreement
from effnet_repro.export.exporting import FORMATS, Exported, export, export_format, read_metadata
from effnet_repro.export.subject import Subject, check_sizes, read_subject

__all__ = [
    "FORMATS",
    "TOLERANCE",
    "Agreement",
    "Disagreement",
    "Exported",
    "Subject",
    "check_sizes",
    "export",
    "export_format",
    "read_metadata",
    "read_subject",
]
