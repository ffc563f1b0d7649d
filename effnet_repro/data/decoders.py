"""Which library makes pixels of JPEGs: the ones that can be asked for, and which one `auto` stands for.

- `simplejpeg` decodes on the cores with libjpeg-turbo, and has the fast DCT of the published runs;
- `pillow` decodes on the cores, with the accurate DCT;
- `tensorflow` is TensorFlow's own reader, which cuts and resizes, too;
- `nvimagecodec` decodes on an NVIDIA GPU under JAX, with the accurate DCT, and resizes there (`gpu_reader`).

Everything that is no JPEG is decoded by Pillow. Order, crops, flips and resizing do not depend on the decoder, only
the pixels of JPEGs do: by 1.07 of 255 on average between the two DCTs, by less than 0.2 with the same DCT.
"""

from importlib.util import find_spec
from typing import Callable, Optional

from effnet_repro.config import unknown_name

DECODERS = ("auto", "simplejpeg", "pillow", "tensorflow", "nvimagecodec")
READER_OF = {
    "simplejpeg": "numpy",
    "pillow": "numpy",
    "tensorflow": "tensorflow",
    "nvimagecodec": "nvimagecodec",
}
_PACKAGES = {
    "simplejpeg": ("simplejpeg",),
    "pillow": ("PIL",),
    "tensorflow": ("tensorflow",),
    "nvimagecodec": ("nvidia.nvimgcodec", "cuda.bindings"),
}
_TO_INSTALL = {
    "nvimagecodec": "'effnet_repro[cuda12]', or [cuda13] as JAX's own",
    "tensorflow": "tensorflow-cpu",
}

# Ours: packed images are small, so as many cores for a GPU bring more of them than its own decoder. Measured with 16
# on an H200 (results/gpu_use.csv, "packed, jpeg 256"), and less in proportion to the cores.
CORES_FOR_PACKED = 14


def is_installed(decoder: str) -> bool:
    """Return whether the packages of a decoder are there; nothing is imported."""
    try:
        return all(find_spec(package) is not None for package in _PACKAGES[decoder])
    except ModuleNotFoundError:  # not even the package that would hold it
        return False


def check_decoder(decoder: str) -> None:
    """Raise `ValueError` for a name that is no decoder, and `ImportError` for one that is not installed."""
    if decoder not in DECODERS:
        raise unknown_name("decoder", decoder, DECODERS)
    if decoder != "auto" and not is_installed(decoder):
        needed = _TO_INSTALL.get(decoder, decoder)
        raise ImportError(f"The decoder {decoder} is not installed. Run: pip install {needed}.")


def choose_decoder(
    wish: str,  # One of `DECODERS`
    backend: str,  # Keras': "tensorflow" or "jax"
    gpu: bool = False,  # Whether JAX computes on a GPU
    resident: bool = False,  # Whether decoded images stay there, so that they are decoded only once
    works: Optional[
        Callable[[str], bool]
    ] = None,  # Whether a decoder can be used; None = is installed
) -> str:
    """Return the decoder for a run: the one asked for, or for "auto" the fastest that is there

    Raises `ValueError` for a wish that cannot be met.
    """
    works = works or is_installed
    check_decoder(wish)
    if wish == "nvimagecodec" and not gpu:
        raise ValueError(
            "The decoder nvimagecodec needs JAX on an NVIDIA GPU. Received: decoder='nvimagecodec' with "
            f"the backend {backend} on {'a GPU' if gpu else 'a CPU'}. Use decoder='auto'."
        )
    if wish != "auto":
        return wish
    if backend == "tensorflow":
        return "tensorflow"
    streams = gpu and not resident
    for decoder, suits in (
        ("nvimagecodec", streams),
        ("simplejpeg", True),
        ("tensorflow", streams),
    ):
        if suits and works(decoder):
            return decoder
    return "pillow"
