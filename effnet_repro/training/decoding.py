"""The decoder that a run reads with: chosen once, printed, and kept when the run resumes."""

import contextlib
import functools
from dataclasses import replace
from pathlib import Path
from typing import Callable

import keras

from effnet_repro.data import DataSet, choose_decoder, fits_device, gpu_decode
from effnet_repro.data.damage import leave_out_damaged
from effnet_repro.data.decode import has_jpegs
from effnet_repro.data.decoders import CORES_FOR_PACKED, is_installed
from effnet_repro.data.threads import core_count
from effnet_repro.messages import say
from effnet_repro.outside import read_json
from effnet_repro.training.device import has_jax_gpu


def decoder_here(data: DataSet) -> str:
    """Return the decoder that the running backend reads a data set with."""
    gpu = has_jax_gpu()
    wish = data.decoder
    resident = gpu and wish == "auto" and fits_device(data)
    works = is_installed
    if gpu:
        decodes = has_jpegs(data) and not (wish == "auto" and _suits_cores(data))
        works = lambda name: _works(name) and (name != "nvimagecodec" or decodes)
    return choose_decoder(wish, keras.backend.backend(), gpu, resident, works)


def _is_packed(data):
    return len(data.splits["train"].original) > 0


def _suits_cores(data):
    "Whether the cores here bring more of these images than the GPUs of this process do"
    import jax

    return _is_packed(data) and core_count() >= CORES_FOR_PACKED * jax.local_device_count()


@functools.lru_cache(maxsize=None)
def _works(decoder):
    "Whether a decoder is installed and, for the GPU's, decodes an image; where it does not, say why once"
    if decoder != "nvimagecodec" or not is_installed(decoder):
        return is_installed(decoder)
    why = gpu_decode.problem()
    if why is not None:
        say(f"data: nvImageCodec is installed, but does not work here ({why})")
    return why is None


def settle_decoder(data: DataSet, run_dir=None, lead: Callable = lambda work: work()) -> DataSet:
    """Return the data set with the decoder of a run, and print it.

    Where the user did not choose, a run that goes on keeps the decoder it began with, as long as it is installed.
    `lead` returns what a function without arguments returns; of several processes only one may read the folder.
    """
    stored = lead(lambda: _stored_decoder(run_dir, data))
    if data.decoder == "auto" and stored is not None:
        with contextlib.suppress(ValueError, ImportError):  # begun on another machine
            decoder_here(replace(data, decoder=stored))
            data = replace(data, decoder=stored)
    chosen = decoder_here(data)
    raw = data.format == "raw"
    say("data: raw pixels, nothing to decode" if raw else f"data: images are decoded by {chosen}")
    if stored not in (None, chosen):
        say(
            f"data: the run began with images decoded by {stored}, whose pixels differ a little: it goes on, "
            "but not bit for bit"
        )
    waits = has_jax_gpu() and chosen != "nvimagecodec" and not fits_device(data)
    if waits and has_jpegs(data) and not _suits_cores(data):
        found = "" if is_installed("nvimagecodec") else "pip install 'effnet_repro[cuda12]', or "
        say(f"data: the GPU may wait for images. Faster: {found}--decoder nvimagecodec")
    data = replace(data, decoder=chosen)
    return _as_tensorflow_reads(data) if chosen == "tensorflow" else data


def _as_tensorflow_reads(data):
    "The data set without what TensorFlow alone refuses, where damaged images are left out"
    if data.on_corrupt != "skip" or not has_jpegs(data):
        return data
    from effnet_repro.data.tf_reader import refused_by_tensorflow

    before = len(data.damaged)
    data = leave_out_damaged(data, None, say, refused_by_tensorflow, "tensorflow")
    for place in data.damaged[before : before + 5]:
        say(f"  left out: {place}")
    return data


def _stored_decoder(run_dir, data):
    "The decoder that config.json of a run names, or that was chosen before runs named one; None for a new run"
    if run_dir is None:
        return None
    with contextlib.suppress(OSError, ValueError):
        config = read_json(Path(run_dir) / "config.json")
        return config["decoder"] if "decoder" in config else _earlier(data)
    return None


def _earlier(data):
    "The decoder of runs from before decoders could be chosen"
    streams = has_jax_gpu() and not fits_device(data)
    if keras.backend.backend() == "tensorflow" or (streams and is_installed("tensorflow")):
        return "tensorflow"
    return "simplejpeg" if is_installed("simplejpeg") else "pillow"
