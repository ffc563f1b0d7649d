"""Files of keras.applications, and models of ours that Keras saved.

The networks of `keras.applications` are our `B0-G1-BN` to `B7-G1-BN`. Keras itself opens the file; its size
and classes are read off the shapes first, since Keras must know them. The case is kept where Keras does not
read.
"""

import io
import json
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

from effnet_repro.checkpoint import explain_writing, write_file
from effnet_repro.config import case_from_dict, case_to_dict, list_some
from effnet_repro.convert.recognize import case_for
from effnet_repro.convert.weights import CASE_KEY, Found, needed
from effnet_repro.network import params
from effnet_repro.scaling import SIZE_TABLE, ModelSpec


def _h5_shapes(path):
    "Name -> shape of the weights in an HDF5 file, or in the one inside a .keras archive"
    h5py, shapes = needed("h5py", "A Keras file"), {}

    def note(name, item):
        if hasattr(item, "shape") and not name.startswith("optimizer"):
            shapes[name] = item.shape

    try:
        data = path
        if path.suffix == ".keras":
            with zipfile.ZipFile(str(path)) as archive:
                data = io.BytesIO(archive.read("model.weights.h5"))
        with h5py.File(data if isinstance(data, io.BytesIO) else str(data), "r") as file:
            file.visititems(note)
    except (OSError, zipfile.BadZipFile, KeyError, RuntimeError) as e:
        raise ValueError(
            f"{path} is not a whole Keras file: cut off while copying, or another kind of file "
            f"({str(e).splitlines()[0][:200]})."
        ) from None
    return shapes


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


def _put_case(path, case):
    "Keep a case in a Keras file: an entry of the archive, or an attribute of the HDF5 file; Keras reads neither"
    text = json.dumps(case_to_dict(case))
    if path.suffix == ".keras":
        with zipfile.ZipFile(str(path), "a") as archive:
            archive.writestr(f"{CASE_KEY}.json", text)
        return
    with needed("h5py", "A Keras file").File(str(path), "a") as file:
        file.attrs[CASE_KEY] = text


def _case_in_keras(path):
    "What `_put_case` kept, or None"
    if path.suffix == ".keras":
        with zipfile.ZipFile(str(path)) as archive:
            if f"{CASE_KEY}.json" not in archive.namelist():
                return None
            text = archive.read(f"{CASE_KEY}.json")
    else:
        with needed("h5py", "A Keras file").File(str(path), "r") as file:
            text = file.attrs.get(CASE_KEY)
    return text and case_from_dict(json.loads(text))


def find_keras(path):
    "Read a Keras file as `Found`"
    keras = needed("keras", "A Keras file")
    from effnet_repro import efficientnet

    shapes, source, case = _h5_shapes(path), str(path), _case_in_keras(path)
    if path.suffix == ".keras" or any(n.startswith("model_weights/") for n in shapes):
        source = keras.models.load_model(str(path), compile=False)
        if any(isinstance(layer, efficientnet.SegmentLayer) for layer in source.layers):
            spec, arrays = efficientnet.spec_of(source), efficientnet.get_weights(source)
            affine = arrays.pop("input/scale", None), arrays.pop("input/shift", None)
            affine = affine if spec.input_norm == "keras" else None
            return Found(arrays, affine=affine, case=case or case_for(spec))
    spec = _keras_network(path, list(shapes.values()))
    arrays = efficientnet.from_keras_applications(spec, source)
    affine = arrays.pop("input/scale"), arrays.pop("input/shift")
    return Found(arrays, affine=affine, case=case)


def write_keras(path, weights):
    "Write `Weights` as a Keras file, whole or not at all; returns notes"
    needed("keras", "A Keras file")
    from effnet_repro.efficientnet import to_keras_applications

    whole = path.suffix == ".keras"
    if not whole and not path.name.endswith(".weights.h5"):
        raise ValueError(
            f"Keras writes weights to *.weights.h5 and models to *.keras. Received: {path.name}."
        )
    model = to_keras_applications(weights.spec, weights.arrays)
    with explain_writing(path), tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / path.name  # Keras asks for its own endings, and writes in place
        model.save(str(file)) if whole else model.save_weights(str(file))
        _put_case(file, weights.case)
        write_file(path, file.read_bytes())
    return ("Keras' model ends with a softmax; ours gives logits.",) if whole else ()
