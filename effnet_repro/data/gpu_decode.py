"""JPEGs decoded, cut and resized on an NVIDIA GPU: nvImageCodec decodes, one small kernel writes the batch.

A `Producer` belongs to one thread at a time and has a CUDA stream and a decoder of its own, so that two or three keep
the GPU's decoders busy. The kernel reads a table with a row for each image (`ROW`): where its pixels lie, which
rectangle is wanted, and how it is resized. It follows `transforms.resize` operation by operation; products and sums
are not fused, so that the same decoded pixels give the same bytes.

The batch is an array of JAX that nobody else has seen yet: it is made of zeros (`empty`), and the kernel writes into
its memory before it is handed out. What the GPU decodes does not pass through the host. What the cores decode beside it
is written into pinned memory (`Stage`) and sent in one piece.
"""

import contextlib
import ctypes
import functools
import io
import os
import threading
import warnings
from typing import Any, Callable, List, NamedTuple, Optional, Sequence

import numpy as np

from effnet_repro.data.threads import core_count

KEPT = (
    32  # The part of a GPU's memory, 1 / KEPT, that decoded images may leave and the next ones take
)
PRODUCERS = 5  # While one waits for its kernel or its bytes, the others' images are decoded

ROW = np.dtype(
    [
        ("pixels", "u8"),  # Address of the first pixel of the image
        ("pitch", "i8"),  # Bytes from one line to the next
        ("top", "i4"),  # The rectangle that is resized, pixels
        ("left", "i4"),
        ("height", "i4"),
        ("width", "i4"),
        ("flip", "i4"),  # Whether it is mirrored
        ("unused", "i4"),
        ("scale", "f4", 2),  # Source pixels to a target pixel: down, right
        ("corner", "f4", 2),  # First target pixel of the square: from the top, from the left
    ]
)

_SOURCE = r"""
struct Row {
  unsigned long long pixels; long long pitch;
  int top, left, height, width, flip, unused;
  float scale[2], corner[2];
};

__device__ void taps(int at, float corner, float scale, int size, bool corners, int *a, int *b, float *f) {
  float half = corners ? 0.0f : 0.5f;
  float place = (corner + (float)at + half) * scale - half, low = floorf(place);
  *a = max((int)low, 0);
  *b = min((int)low + 1, size - 1);
  *f = place - low;
}

extern "C" __global__ void cut(const Row *rows, unsigned char *out, int side, int published) {
  int x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y;
  if (x >= side || y >= side) return;
  const Row row = rows[blockIdx.z];
  int x0, x1, y0, y1;
  float fx, fy;
  int target = row.flip && !published ? side - 1 - x : x;  // mirrored after resizing, or before
  taps(target, row.corner[1], row.scale[1], row.width, published, &x0, &x1, &fx);
  taps(y, row.corner[0], row.scale[0], row.height, published, &y0, &y1, &fy);
  if (row.flip && published) { x0 = row.width - 1 - x0; x1 = row.width - 1 - x1; }
  const unsigned char *image = (const unsigned char *)row.pixels + 3 * (long long)row.left;
  const unsigned char *upper = image + (row.top + y0) * row.pitch;
  const unsigned char *lower = image + (row.top + y1) * row.pitch;
  out += (((long long)blockIdx.z * side + y) * side + x) * 3;
  for (int c = 0; c < 3; ++c) {
    float a = upper[3 * x0 + c], b = upper[3 * x1 + c], d = lower[3 * x0 + c], e = lower[3 * x1 + c];
    a = a + (b - a) * fx;
    d = d + (e - d) * fx;
    float value = a + (d - a) * fy;
    if (published) {  // to the nearest float16, ties to even; then cut off
      int bits = __float_as_int(value);
      value = __int_as_float((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF);
    } else {
      value = fminf(fmaxf(rintf(value), 0.0f), 255.0f);
    }
    out[c] = (unsigned char)value;
  }
}
"""


class Image(NamedTuple):
    """Pixels on the GPU, 8 bits, red, green and blue side by side."""

    address: int
    pitch: int  # Bytes from one line to the next
    size: tuple  # Height and width
    owner: Any  # Keeps the memory


def _checked(result):
    "What a call of CUDA returned after its status. Raises `RuntimeError` or `MemoryError` unless that is 0"
    status, *rest = result
    if "OUT_OF_MEMORY" in str(status):
        raise MemoryError("The GPU is out of memory while it decodes images: use a smaller batch.")
    if int(status):
        raise RuntimeError(f"CUDA failed: {status!r}.")
    return rest[0] if len(rest) == 1 else rest


@functools.lru_cache(maxsize=None)
def _context(ordinal):
    "The context of a GPU that JAX uses, too, and the compiled kernel in it"
    from cuda.bindings import driver, nvrtc

    _checked(driver.cuInit(0))
    device = _checked(driver.cuDeviceGet(ordinal))
    context = _checked(driver.cuDevicePrimaryCtxRetain(device))
    _checked(driver.cuCtxSetCurrent(context))
    with contextlib.suppress(
        AttributeError, TypeError, RuntimeError
    ):  # images come and go: keep their memory
        memory = _checked(driver.cuDeviceGetDefaultMemPool(device))
        total = int(_checked(driver.cuDeviceTotalMem(device)))
        most = driver.CUmemPool_attribute.CU_MEMPOOL_ATTR_RELEASE_THRESHOLD
        _checked(driver.cuMemPoolSetAttribute(memory, most, driver.cuuint64_t(total // KEPT)))
    kind = driver.CUdevice_attribute
    names = (
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR",
        "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR",
    )
    major, minor = (_checked(driver.cuDeviceGetAttribute(getattr(kind, n), device)) for n in names)
    program = _checked(nvrtc.nvrtcCreateProgram(_SOURCE.encode(), b"cut.cu", 0, [], []))
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"-fmad=false"]
    _checked(nvrtc.nvrtcCompileProgram(program, len(options), options))
    code = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, code))
    module = _checked(driver.cuModuleLoadData(code))
    return context, _checked(driver.cuModuleGetFunction(module, b"cut"))


@contextlib.contextmanager
def _silence():
    "Keep what libraries write to the standard error stream, below Python, from the terminal"
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


@functools.lru_cache(maxsize=1)
def nvimgcodec():
    """Import nvImageCodec without its notes that decoders of other formats are absent."""
    os.environ.setdefault(
        "PYNVIMGCODEC_VERBOSITY", "0"
    )  # a file that it refuses is decoded on the host
    with _silence(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nvidia import nvimgcodec as module
    return module


# Without the second one, the cores undo the Huffman code of small images: 7,600 images/s instead of 10,500.
_OPTIONS = ":fancy_upsampling=1 nvjpeg_cuda_decoder:hybrid_huffman_threshold=0"


class Codec:
    """nvImageCodec on one device: colors as libjpeg upsamples them, no rotation, no scaling.

    On a GPU only nvJPEG decodes: by its hardware where there is some (an H100 has seven engines, which give the
    pixels of libjpeg's accurate DCT exactly), else by its kernels. Both together are slower than the hardware
    alone, and on the cores nvImageCodec would be no faster than simplejpeg. `exact` says whether it is the hardware.
    Raises `RuntimeError` where neither can be had.
    """

    exact = False

    def __init__(self, device: Optional[int], threads: int):  # None = the host's cores, for tests
        codec = nvimgcodec()
        self._how = codec.DecodeParams(apply_exif_orientation=False, sample_format=codec.I_RGB)
        where = dict(device_id=device, max_num_cpu_threads=threads, options=_OPTIONS)
        kinds = codec.HW_GPU_ONLY, codec.HYBRID_CPU_GPU
        if device is None:
            where["device_id"], kinds = codec.NVIMGCODEC_DEVICE_CPU_ONLY, [codec.CPU_ONLY]
        self._decoder = None
        for kind in kinds:
            with _silence(), contextlib.suppress(RuntimeError):
                self._decoder = codec.Decoder(**where, backends=[codec.Backend(kind)])
                self.exact = kind == codec.HW_GPU_ONLY
                break
        if self._decoder is None:
            raise RuntimeError("nvImageCodec finds no nvJPEG: is the package nvidia-nvjpeg there?")

    def decode(self, data: Sequence[bytes], stream: int = 0) -> list:
        """Return an image of nvImageCodec for each JPEG; None for one that it refuses."""
        return self._decoder.decode(list(data), params=self._how, cuda_stream=stream)


class Stage:
    """Pixels that the cores decoded, on their way to a GPU: pinned memory of the host, and as much of the GPU."""

    def __init__(self, ordinal: int = 0):
        from cuda.bindings import driver

        self._driver, self._context = driver, _context(ordinal)[0]
        self._host, self._device, self._room, self._lock = 0, 0, 0, threading.Lock()
        self._bytes, self._used, self._late = np.zeros(0, np.uint8), 0, []

    def begin(self, room: int):
        """Forget what was placed, and have room for so many bytes; what does not fit is placed all the same."""
        self._used, self._late = 0, []
        if room > self._room:
            self._grow(room)

    def _grow(self, room):
        "Have room for so many bytes; what was placed is lost"
        driver, room = self._driver, -(-int(1.2 * room) // 2**23) * 2**23
        _checked(driver.cuCtxSetCurrent(self._context))
        if self._room:
            self._room, self._bytes = 0, np.zeros(0, np.uint8)
            _checked(driver.cuMemFreeHost(self._host))
            _checked(driver.cuMemFree(self._device))
        self._host = int(_checked(driver.cuMemHostAlloc(room, 0)))
        self._device = int(_checked(driver.cuMemAlloc(room)))
        pinned = (ctypes.c_uint8 * room).from_address(self._host)
        self._room, self._bytes = room, np.frombuffer(pinned, np.uint8)

    def place(self, pixels: np.ndarray) -> int:
        """Copy pixels (P, 3) uint8 to the next free place, in any thread; return which byte that is."""
        flat = pixels.reshape(-1)
        with self._lock:
            at, end = self._used, self._used + flat.size
            self._used = end
        if end > self._room:
            self._late.append((at, flat.copy()))
        else:
            self._bytes[at:end] = flat
        return at

    def images(self, begins: Sequence[int], sizes: Sequence) -> List[Image]:
        """Return where images of these sizes will be on the GPU; all are placed, and `Producer.write` sends them."""
        if self._late:
            end = min(at for at, _ in self._late)
            there = self._bytes[:end].copy()
            self._grow(self._used)
            self._bytes[:end] = there
            for at, flat in self._late:
                self._bytes[at : at + flat.size] = flat
            self._late = []
        places = zip((self._device + int(at) for at in begins), sizes)
        return [Image(at, 3 * int(size[1]), tuple(map(int, size)), None) for at, size in places]

    def send(self, stream):
        """Begin the way of all that was placed to the GPU."""
        if self._used:
            copy = self._driver.cuMemcpyHtoDAsync
            _checked(copy(self._device, self._host, self._used, stream))


class Producer:
    """Decodes and cuts on one GPU; for one thread at a time."""

    def __init__(self, ordinal: int = 0):
        from cuda.bindings import driver

        self._driver = driver
        self._context, self._kernel = _context(ordinal)
        _checked(driver.cuCtxSetCurrent(self._context))
        flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
        _, first = _checked(driver.cuCtxGetStreamPriorityRange())  # before the network's kernels
        self._stream = _checked(driver.cuStreamCreateWithPriority(flags, first))
        kinds = driver.CUevent_flags  # who waits for it leaves its core to others, which decode
        sleeps = kinds.CU_EVENT_BLOCKING_SYNC.value | kinds.CU_EVENT_DISABLE_TIMING.value
        self._done = _checked(driver.cuEventCreate(sleeps))
        self._ordinal, self._table = ordinal, Stage(ordinal)

    @functools.cached_property
    def _codec(self):  # what the cores make needs none
        return Codec(self._ordinal, max(1, core_count() // PRODUCERS))

    @property
    def exact(self) -> bool:
        """Whether its decoders make the pixels of the cores' accurate DCT, exactly."""
        return self._codec.exact

    def decode(self, data: Sequence[np.ndarray]) -> List[Optional[Image]]:
        """Decode JPEGs, arrays of bytes; None for one that nvImageCodec refuses."""
        _checked(self._driver.cuCtxSetCurrent(self._context))
        return [_described(one) for one in self._codec.decode(data, int(self._stream))]

    def write(
        self,
        images: Sequence[Image],
        rows: np.ndarray,
        out: Any,
        first: int,
        published: bool,
        stage: Optional[Stage] = None,
    ):
        """Cut and resize images into `out` from image `first` on, and wait until that is done.

        What lies on a `stage` is sent before.
        """
        driver, side, stream = self._driver, out.shape[1], self._stream
        rows["pixels"] = [image.address for image in images]
        rows["pitch"] = [image.pitch for image in images]
        _checked(driver.cuCtxSetCurrent(self._context))
        self._table.begin(rows.nbytes)
        self._table.place(rows.view(np.uint8))
        (table,) = self._table.images([0], [(1, 1)])
        for one in (self._table, stage):
            if one is not None:
                one.send(stream)
        out.block_until_ready()
        target = int(out.unsafe_buffer_pointer()) + int(first) * side * side * 3
        values = (table.address, target, side, int(published))
        kinds = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
        grid, block = (-(-side // 32), -(-side // 8), len(rows)), (32, 8, 1)
        _checked(driver.cuLaunchKernel(self._kernel, *grid, *block, 0, stream, (values, kinds), 0))
        _checked(driver.cuEventRecord(self._done, stream))
        _checked(driver.cuEventSynchronize(self._done))


def empty(shape: Sequence[int], ordinal: int = 0) -> Any:
    """Begin an array of zeros, uint8, on one of JAX's GPUs."""
    import jax

    return _zeros(tuple(shape), jax.local_devices()[ordinal])()


def _described(image):
    "An image of nvImageCodec as `Image`; None for None"
    if image is None:
        return None
    facts = image.__cuda_array_interface__
    (height, width, channels), strides = facts["shape"], facts.get("strides")
    if channels != 3:
        return None
    return Image(facts["data"][0], strides[0] if strides else 3 * width, (height, width), image)


@functools.lru_cache(maxsize=64)
def _zeros(shape, device):
    import jax
    import jax.numpy as jnp

    place = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(lambda: jnp.zeros(shape, "uint8"), out_shardings=place)


_KEPT = {}  # Producers and stages that nobody uses, by what made them and for which GPU


def kept(make: Callable[[int], Any], gpu: int) -> Any:
    """Return one of what `keep` was given, or make it: a decoder takes a while to begin."""
    with contextlib.suppress(IndexError):  # several threads ask
        return _KEPT.setdefault((make, gpu), []).pop()
    return make(gpu)


def keep(make: Callable[[int], Any], gpu: int, one: Any) -> None:
    """Leave a producer or a stage to the next stream."""
    _KEPT.setdefault((make, gpu), []).append(one)


@functools.lru_cache(maxsize=None)
def problem(decodes: bool = True) -> Optional[str]:
    """Decode and cut one image; return why that does not work here, in a line, or None.

    Without `decodes` the image is sent, as one that the cores made.
    """
    try:
        gray, stage = np.full((192, 256, 3), 128, np.uint8), None
        producer, rows = kept(Producer, 0), np.zeros(1, ROW)
        out = empty((1, 8, 8, 3))
        rows["height"], rows["width"], rows["scale"] = 192, 256, (24, 32)
        if decodes:
            from PIL import Image as pillow

            file = io.BytesIO()
            pillow.fromarray(gray).save(file, "JPEG")
            (image,) = producer.decode([np.frombuffer(file.getvalue(), np.uint8)])
        else:
            stage = kept(Stage, 0)
            stage.begin(gray.size)
            (image,) = stage.images([stage.place(gray)], [gray.shape[:2]])
        if image is None:
            return "nvJPEG refuses a plain JPEG"
        producer.write([image], rows, out, 0, True, stage)
        found = np.asarray(out)
        keep(Producer, 0, producer)
        if stage is not None:
            keep(Stage, 0, stage)
        return None if abs(found.astype(int) - 128).max() <= 2 else "it returns other pixels"
    except Exception as error:  # libraries that are absent, drivers that are too old, ...
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
