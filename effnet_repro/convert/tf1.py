"""Checkpoints of TensorFlow 1, which the published code writes and reads.

The published code names its variables as we do, apart from the proxies, which `effnet_repro.network` packs
and unpacks. A checkpoint is an index and data files, and two files cannot be replaced in one moment. But the
index says how many data files belong to it, and so do their names: `model.ckpt.data-00000-of-00001`. So a
checkpoint that replaces one with a single data file is written with two, and the other way round: new data
files first, then one rename puts the new index in place, then the old data files go. Whenever the writer is
killed, the index that is there finds its own data.
"""

import json
import math
import os
import re
import uuid
from pathlib import Path
from typing import Dict, Optional

import numpy as np

from effnet_repro.checkpoint import explain_writing, sync
from effnet_repro.config import EARLIER, list_some
from effnet_repro.convert.recognize import case_for
from effnet_repro.convert.replace import remove_leftovers
from effnet_repro.convert.weights import CASE_KEY, Found, needed, object_in, text_of
from effnet_repro.network import input_affine, pack, statistics_note, unpack
from effnet_repro.outside import check_numbers
from effnet_repro.paths import utf8_path


def tf1_prefix(path):
    "The beginning that the files of a checkpoint share: given as such, as one of the files, or as their folder"
    path = Path(re.sub(r"\.(index|meta|data-\d{5}-of-\d{5})$", "", str(path)))
    if not path.is_dir():
        return path
    named = re.findall(r'(?m)^model_checkpoint_path: "(.*)"', text_of(path / "checkpoint"))
    found = [path / n for n in named] or indexed(path)
    if len(found) != 1:
        raise ValueError(
            f"{path} holds {len(found)} TensorFlow checkpoints ({list_some(p.name for p in found)}). "
            "Name one, e.g. folder/model.ckpt-100."
        )
    return found[0]


def indexed(folder):
    "Prefixes of the checkpoints in a folder, without what a killed writer left"
    return [p.with_suffix("") for p in sorted(folder.glob("*.index")) if p.name[0] != "."]


def split_variables(names):
    "Weights, and what is not a weight: slots of other variables, and names outside all/"
    names = set(names)
    names.discard(CASE_KEY)
    is_weight = lambda n: n.startswith("all/") and n.rpartition("/")[0] not in names
    weights = sorted(filter(is_weight, names))
    return weights, sorted(names - set(weights))


def read_tf1(
    path,  # Prefix of a checkpoint ("model.ckpt-100"), one of its files, or its folder
):  # (variables, left out): published name -> float32 array, and names of what is not a weight
    "Read the weights of a checkpoint that TensorFlow 1 wrote"
    tf = needed("tensorflow", "A TensorFlow checkpoint")
    prefix = tf1_prefix(path)
    if not Path(f"{prefix}.index").is_file():
        raise FileNotFoundError(
            f"No TensorFlow checkpoint {prefix}: there is no {prefix.name}.index."
        )
    try:
        reader = tf.train.load_checkpoint(utf8_path(prefix))
        kinds = reader.get_variable_to_dtype_map()
        weights, others = split_variables(kinds)
        shapes = reader.get_variable_to_shape_map()
        check_numbers(prefix, sum(math.prod(shapes[n]) for n in weights))
        source = lambda n: n  # 16.16 cases keep the float32 copy of a float16 weight in a slot
        if any(kinds[n] == tf.float16 for n in weights):
            copies = {n.rpartition("/")[0]: n for n in others if "fp32" in n.rpartition("/")[2]}
            source = lambda n: copies.get(n, n)
        variables = {n: np.asarray(reader.get_tensor(source(n)), "float32") for n in weights}
    except (
        tf.errors.OpError,
        RuntimeError,
        ValueError,
        LookupError,
    ) as e:  # what its reader raises
        raise ValueError(
            f"{prefix} is not a whole TensorFlow checkpoint: cut off while copying, or a file of "
            f"another one ({str(e).splitlines()[0][:200]}). Copy the .index and .data files again."
        ) from None
    return variables, others


_DATA = re.compile(r"\.data-(\d{5})-of-(\d{5})")


def _data_files(prefix):
    "Data files of a checkpoint, and of its forerunners: {how many belong together: paths}"
    found = {}
    for path in prefix.parent.glob("*.data-*"):
        name = _DATA.fullmatch(path.name[len(prefix.name) :])
        if name and path.name.startswith(prefix.name):
            found.setdefault(int(name[2]), []).append(path)
    return found


def _counts_in_use(prefix):
    "How many data files the index of a checkpoint names, in a set; every number there when it does not tell"
    index = Path(f"{prefix}.index")
    if not index.exists():
        return set()
    with index.open("rb") as file:
        start = file.read(5)  # an empty key, the header's length, field 1: the number
    plain = len(start) == 5 and start[:2] == b"\0\0" and start[3] == 8 and 0 < start[4] < 128
    return {start[4]} if plain else set(_data_files(prefix))


def write_tf1(
    path,  # Prefix of the checkpoint's files, e.g. "out/model.ckpt"
    arrays: Dict[str, np.ndarray],  # Full name -> array
    trained: Optional[dict] = None,  # Fields of the case, kept in a variable of their own
) -> Path:  # `path`
    "Write weights as a TensorFlow 1 checkpoint under the published names, whole or not at all"
    tf = needed("tensorflow", "A TensorFlow checkpoint")
    path, variables = Path(path), pack(arrays)
    if trained:
        variables[CASE_KEY] = np.frombuffer(json.dumps(trained).encode(), "uint8")
    path = path / "model.ckpt" if path.is_dir() else tf1_prefix(path)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    utf8_path(path)  # or it raises, before anything is written
    with explain_writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        count = next(n for n in (1, 2, 3, 4) if n not in _counts_in_use(path))
        try:
            _save_tf1(tf, temporary, variables, count)
            _replace_tf1(path, temporary, count)
        except tf.errors.OpError as e:
            raise OSError(str(e).splitlines()[0][:200]) from None
        finally:
            remove_leftovers(path)
    return path


def _save_tf1(tf, prefix, variables, count):
    "Write a checkpoint of `count` data files"
    names, prefix = list(variables), utf8_path(prefix)
    parts = [f"{prefix}.{i}" for i in range(count)]
    for i, part in enumerate(parts):
        own = names[i::count]
        tensors = [tf.constant(variables[n]) for n in own]
        how = dict(tensor_names=own, shape_and_slices=[""] * len(own), tensors=tensors)
        tf.raw_ops.SaveV2(prefix=part, **how)
    merge = dict(destination_prefix=prefix, delete_old_dirs=False)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, **merge)


def _replace_tf1(path, temporary, count):
    "Put a written checkpoint in the place of another: data, then the index, then the old data goes"
    new = [f".data-{i:05d}-of-{count:05d}" for i in range(count)]
    try:
        for ending in new:
            sync(f"{temporary}{ending}")
            os.replace(f"{temporary}{ending}", f"{path}{ending}")
        sync(f"{temporary}.index")
        sync(path.parent)
        os.replace(f"{temporary}.index", f"{path}.index")
        sync(path.parent)
    finally:  # of both: the data files that no index names
        used = _counts_in_use(path)
        for files in (f for n, f in _data_files(path).items() if n not in used):
            for file in files:
                file.unlink()


def _trained_in_tf1(path):
    "The fields that `write_tf1` kept; none in a checkpoint of the published code, which has no such variable"
    import tensorflow as tf

    reader = tf.train.load_checkpoint(utf8_path(tf1_prefix(path)))
    if not reader.has_tensor(CASE_KEY):
        return {}
    kept = reader.get_tensor(CASE_KEY)
    kept = object_in(kept.tobytes() if hasattr(kept, "tobytes") else kept, f"{CASE_KEY} in {path}")
    return {name: value for name, value in kept.items() if name in EARLIER}


def find_tf1(path):
    "Read a checkpoint of TensorFlow 1 as `Found`"
    variables, others = read_tf1(path)
    notes = tuple(filter(None, [statistics_note(variables)]))
    if others:
        notes += (f"Left out {len(others)} variables that are not weights: {list_some(others)}.",)
    return Found(unpack(variables), trained=_trained_in_tf1(path), notes=notes)


def write_weights_tf1(path, weights):
    "Write `Weights` as a checkpoint of TensorFlow 1; returns notes"
    trained = {name: getattr(weights.case, name) for name in EARLIER}
    as_published = {name: getattr(case_for(weights.spec), name) for name in EARLIER}
    write_tf1(path, weights.arrays, trained if trained != as_published else None)
    if weights.spec.input_norm == "imagenet_mean":
        return ()
    scale, shift = (v.tolist() for v in input_affine(weights.spec, weights.arrays))
    return (
        "The published code subtracts its own mean from images; these weights want 0..255 pixels "
        f"times {scale} plus {shift} instead.",
    )
