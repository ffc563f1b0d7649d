"""Files of keras.applications, and models of ours that Keras saved.

The networks of `keras.applications` are our `B0-G1-BN` to `B7-G1-BN`. Keras itself opens the file; its size
and classes are read off the shapes first, since Keras must know them. The case is kept where Keras does not
read.
"""

import contextlib
import io
import json
import math
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

from effnet_repro.checkpoint import atomic_write, explain_writing
from effnet_repro.config import case_to_dict, list_some
from effnet_repro.convert.recognize import case_for
from effnet_repro.convert.weights import (
    CASE_KEY,
    Found,
    case_in,
    names_in,
    needed,
    object_in,
    quantized,
)
from effnet_repro.network import params
from effnet_repro.outside import (
    MOST_CLASSES,
    check_archive,
    check_numbers,
    file_kind,
    head_of,
    kind_of,
)
from effnet_repro.scaling import SIZE_TABLE, ModelSpec


def _h5_shapes(path):
    "Name -> shape of the weights in an HDF5 file, or in the one inside a .keras archive"
    h5py, shapes = needed("h5py", "A Keras file"), {}

    def note(name, item):
        if getattr(item, "shape", None) is not None:  # a data set, and not an empty one
            check_numbers(path, math.prod(item.shape))
            if name.startswith("optimizer"):
                return
            shapes[name] = item.shape
            kinds = (
                "f" if len(item.shape) in (2, 4) else "fiu"
            )  # counters and states of chance are whole
            if item.dtype.kind not in kinds:
                raise ValueError(quantized(path, item.dtype, name))

    if path.suffix == ".keras" and kind_of(head_of(path)) == "a ZIP archive":
        check_archive(path)
    try:
        data = path
        if path.suffix == ".keras":
            with zipfile.ZipFile(str(path)) as archive:
                data = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(data if isinstance(data, io.BytesIO) else str(data), "r") as file:
            file.visititems(note)
    except (OSError, zipfile.BadZipFile, zlib.error, LookupError, RuntimeError, EOFError) as e:
        raise ValueError(
            f"{path} is not a whole Keras file: cut off while copying, or another kind of file "
            f"(it is {file_kind(path)}; {(str(e).splitlines() or [type(e).__name__])[0][:200]})."
        ) from None
    check_numbers(path, sum(math.prod(shape) for shape in shapes.values()))
    return shapes


_WIDTHS = ("units", "filters", "input_dim", "output_dim", "num_classes")


def _check_config(path, text):
    "Raise `ValueError` for a model whose layers are wider than any of an EfficientNet: Keras makes them at once"
    waiting = [object_in(text, f"config.json in {path}")]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            for name, value in one.items():
                if name in _WIDTHS and isinstance(value, (int, float)) and value > MOST_CLASSES:
                    raise ValueError(
                        f"{path} asks for {name}={value:,}: it is no EfficientNet of ours or Keras'."
                    )
        waiting += one.values() if isinstance(one, dict) else one if isinstance(one, list) else []


def _check_layers(path, shapes):
    """Raise `ValueError` for a whole model whose configuration cannot belong to its arrays.

    Keras makes every layer before it reads an array, so what the configuration asks for takes memory first.
    """
    if path.suffix == ".keras":
        with zipfile.ZipFile(str(path)) as archive:
            if "config.json" not in archive.namelist():
                raise ValueError(
                    f"{path} is not a whole Keras file: there is no config.json in it."
                )
            text = archive.read("config.json")
    else:
        with needed("h5py", "A Keras file").File(str(path), "r") as file:
            text = file.attrs.get("model_config", "{}")
    _check_config(path, text)
    if len(shapes) < 100:
        raise ValueError(f"{path} holds {len(shapes)} arrays: it is no EfficientNet.")


def _keras_network(path, shapes):
    "The network whose kernels are those of a Keras file; 0 classes where it has no classifier"
    flat = lambda kernels: sorted(sorted(s) for s in kernels if len(s) == 4)
    kernels, dense = flat(shapes), [s for s in shapes if len(s) == 2]
    for size in (s for s in SIZE_TABLE if s.startswith("B")):
        spec = ModelSpec.from_name(f"{size}-G1-BN", num_classes=0, input_norm="keras")
        if flat(p.shape for p in params(spec)) == kernels:
            heads = [s for s in dense if s[0] == spec.head_filters]
            if len(dense) > 1 or len(heads) != len(dense):
                raise ValueError(
                    f"{path} has an EfficientNet-{size} under other layers than one classifier: "
                    f"{list_some(map(str, dense))}. Save the keras.applications model alone."
                )
            return replace(spec, num_classes=heads[0][1] if heads else 0)
    raise ValueError(
        f"{path} is not a file of keras.applications' EfficientNetB0 to B7: it has {len(kernels)} "
        "convolution kernels that fit none of them."
    )


def _put_case(path, weights):
    "Keep case and class names in a Keras file: entries of the archive, or attributes; Keras reads neither"
    kept = {CASE_KEY: case_to_dict(weights.case), _NAMES_KEY: list(weights.class_names)}
    if path.suffix == ".keras":
        with zipfile.ZipFile(str(path), "a") as archive:
            for name, value in kept.items():
                archive.writestr(f"{name}.json", json.dumps(value))
        return
    with needed("h5py", "A Keras file").File(str(path), "a") as file:
        for name, value in kept.items():
            text = json.dumps(value)
            if len(text) < 2**15:  # an attribute has 64 KiB at most
                file.attrs[name] = text


_NAMES_KEY = "effnet_repro/class_names"


def _kept_in_keras(path):
    "Case and class names that `_put_case` kept, None where there are none"
    if path.suffix == ".keras":
        with zipfile.ZipFile(str(path)) as archive:
            names = archive.namelist()
            read = lambda key: archive.read(f"{key}.json") if f"{key}.json" in names else None
            case, classes = read(CASE_KEY), read(_NAMES_KEY)
    else:
        with needed("h5py", "A Keras file").File(str(path), "r") as file:
            case, classes = file.attrs.get(CASE_KEY), file.attrs.get(_NAMES_KEY)
    what = f"{CASE_KEY} in {path}"
    said = {} if case is None else {"case": object_in(case, what)}
    if classes is not None:
        with contextlib.suppress(ValueError, TypeError):  # then there are no names
            said["class_names"] = json.loads(classes)
    return case_in(said, path), names_in(said, path)


def _load_model(keras, path):
    try:
        return keras.models.load_model(str(path), compile=False)
    except MemoryError:
        raise
    except Exception as e:  # of a damaged configuration Keras raises whatever its layers raise
        text = " ".join(str(e).split())[:200] or type(e).__name__
        raise ValueError(f"{path} is a Keras file that Keras cannot load ({text}).") from None


def find_keras(path):
    "Read a Keras file as `Found`"
    keras = needed("keras", "A Keras file")
    from effnet_repro import efficientnet

    shapes, source = _h5_shapes(path), str(path)
    case, names = _kept_in_keras(path)
    if path.suffix == ".keras" or any(n.startswith("model_weights/") for n in shapes):
        _check_layers(path, shapes)
        source = _load_model(keras, path)
        if any(isinstance(layer, efficientnet.SegmentLayer) for layer in source.layers):
            spec, arrays = efficientnet.spec_of(source), efficientnet.get_weights(source)
            affine = arrays.pop("input/scale", None), arrays.pop("input/shift", None)
            affine = affine if spec.input_norm == "keras" else None
            return Found(arrays, affine=affine, case=case or case_for(spec), class_names=names)
    spec = _keras_network(path, list(shapes.values()))
    arrays = efficientnet.from_keras_applications(spec, source)
    affine = arrays.pop("input/scale"), arrays.pop("input/shift")
    return Found(arrays, affine=affine, case=case, class_names=names)


def write_keras(path, weights):
    "Write `Weights` as a Keras file, whole or not at all; returns notes"
    needed("keras", "A Keras file")
    from effnet_repro.efficientnet import to_keras_applications

    whole = path.suffix == ".keras"
    model = to_keras_applications(weights.spec, weights.arrays)
    with explain_writing(path), tempfile.TemporaryDirectory() as folder:
        # Keras asks for its own endings, writes in place, and may not know the letters of the name.
        file = Path(folder) / ("model.keras" if whole else "model.weights.h5")
        model.save(str(file)) if whole else model.save_weights(str(file))
        _put_case(file, weights)
        atomic_write(path, file.read_bytes())
    return ("Keras' model ends with a softmax; ours gives logits.",) if whole else ()
