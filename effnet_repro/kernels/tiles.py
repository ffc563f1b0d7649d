"""What all kernels share: two orders in memory, the tiles that a program works on, and loads from them.

Kernels are written in Pallas and compiled through Triton. Without a GPU they are interpreted, slowly and
exactly, so that tests anywhere check the same code. `nbs/15_fused_norm.ipynb` shows the orders and the tiles at work.
"""

import functools
import sys
from types import ModuleType
from typing import Any, NamedTuple

GROUP = 16  # Channels per group of the second order
#: (elements of a tile, most sub-tiles, widest tile) of a kernel that reduces, one that adds up, one that maps, and one
#: that maps more than 64 channels with little arithmetic. Ours: the fastest of up to nine each, on an H200.
REDUCE, SUMS, MAP, APPLY = (1024, 16, 128), (512, 16, 32), (2048, 1, 64), (4096, 1, 64)


def pallas():
    "Return JAX, its NumPy, Pallas and Pallas' loads and stores for Triton, imported when first asked for."
    import jax
    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton as plt

    return jax, jnp, pl, plt


@functools.lru_cache(maxsize=None)
def differentiable(
    forward,  # Returns a result, and what `backward` is given of it
    backward,  # From the fixed arguments, what was kept, and the result's gradient, to those of the others
    fixed=(),  # Numbers of the arguments that are no arrays
):
    "Return a function with the result of `forward`, whose gradient `backward` computes."
    call = pallas()[0].custom_vjp(lambda *a: forward(*a)[0], nondiff_argnums=fixed)
    call.defvjp(forward, backward)
    return call


# ---------------------------------------------------------------- two orders in memory


def to_nchw16c(
    x,  # (N, H, W, C)
):  # (N, C / 16, H, W, 16)
    "Bring a group's channels together"
    n, h, w, c = x.shape
    return x.reshape(n, h, w, c // GROUP, GROUP).transpose(0, 3, 1, 2, 4)


def to_nhwc(
    x,  # (N, C / 16, H, W, 16)
):  # (N, H, W, C)
    "Bring a pixel's channels together"
    n, groups, h, w, _ = x.shape
    return x.transpose(0, 2, 3, 1, 4).reshape(n, h, w, groups * GROUP)


by_groups, by_pixels = to_nchw16c, to_nhwc  # what earlier programs import


def sides(x):
    "Return the numbers of images, pixels and channels, in either order."
    if len(x.shape) == 4:
        n, h, w, c = x.shape
        return n, h * w, c
    n, groups, h, w, _ = x.shape
    return n, h * w, groups * GROUP


def flat(x):
    "Return x with rows and columns of pixels as one axis."
    return x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])


class WithMoments(NamedTuple):
    "Activations, and their moments where they are known already: then a norm need not compute them"

    x: Any  # In either order
    parts: Any = None  # Moments of each chunk of pixels, as `norm.moments` returns them
    chunk: Any = None  # Pixels of a chunk


# ---------------------------------------------------------------- tiles


class Tiles(NamedTuple):
    "How a kernel cuts an activation of shape (N, pixels, channels)"

    rows: int
    cols: int
    subs: int  # Tiles that a program adds up before it reduces
    grid: tuple
    pixels: int
    channels: int
    whole: bool  # Whether the tiles cover the activation exactly


def tiles_for(x, how):
    """Choose the tiles for an activation; `how` is `REDUCE`, `SUMS`, `MAP` or `APPLY`.

    Rows of less than 128 bytes waste memory transactions, so narrow blocks of channels carry a penalty, and idle
    lanes count as work.
    """
    pl = pallas()[2]
    n, pixels, c = sides(x)
    elements, subs, widest = how
    penalty = lambda b: 1.0 if b >= min(c, 64) else {32: 1.4}.get(b, 2.0)
    cost = lambda b: (-(-c // b) * b * penalty(b), -b if b < 2 * c else b)
    cols = min((b for b in (128, 64, 32, 16) if b <= widest), key=cost)
    rows = min(max(elements // cols, 1), pl.next_power_of_2(pixels))
    chunks = pl.cdiv(pixels, rows * subs)
    subs = pl.cdiv(pl.cdiv(pixels, chunks), rows)
    grid = (n, pl.cdiv(pixels, rows * subs), pl.cdiv(c, cols))
    whole = pixels % (rows * subs) == 0 and c % cols == 0
    return Tiles(rows, cols, subs, grid, pixels, c, whole)


class ProductTiles(NamedTuple):
    "How a kernel cuts a product between a thin activation, (N, pixels, thin), and a wide one, (N, pixels, channels)"

    rows: int
    cols: int
    subs: int  # Tiles of pixels that a program adds up
    grid: tuple  # Images, chunks, blocks of channels
    pixels: int
    channels: int
    thin: int
    deep: int  # thin, as a power of two


def product_tiles(x, thin, channels, rows, subs, cols):
    "Choose the tiles for a product of the images and pixels of `x`; `rows`, `subs` and `cols` are what is wished for."
    pl, (n, pixels, _) = pallas()[2], sides(x)
    cols, subs = cols if channels % cols == 0 else 32, min(subs, pl.cdiv(pixels, rows))
    grid = (n, pl.cdiv(pixels, rows * subs), pl.cdiv(channels, cols))
    deep = max(16, pl.next_power_of_2(thin))
    return ProductTiles(rows, cols, subs, grid, pixels, channels, thin, deep)


# ---------------------------------------------------------------- programs


def interpreted() -> bool:  # True where there is no GPU to compile for
    "Say whether the kernels are interpreted"
    return pallas()[0].default_backend() != "gpu"


def launch(
    kernel,  # Function of references
    grid: tuple,  # Programs along each axis
    outs,  # Shapes and types of the results
    *ins,  # Arrays
    stages: int = 1,  # Steps of a loop that load ahead
    warps: int = 4,  # Of 32 threads each
):  # The results
    """Run a kernel over a grid.

    Networks repeat their blocks, and to trace and lower a kernel takes Python 30 ms. So a kernel that was traced is
    kept by its code and what it closes over (`meaning`), and one jitted function stands for all its calls.
    """
    jax, _, pl, plt = pallas()
    shapes = [(x.shape, x.dtype.name) for x in ins]
    many = isinstance(outs, (tuple, list))
    results = [(o.shape, str(o.dtype)) for o in (outs if many else [outs])]
    key = repr((meaning(kernel), grid, results, shapes, stages, warps, interpreted()))
    if key not in _traced:
        _name_dialect()
        how = dict(compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages))
        how["name"] = kernel.__qualname__.partition(".")[0].strip("_")  # what a profile shows
        how = dict(interpret=True) if interpreted() else how
        run = pl.pallas_call(kernel, grid=grid, out_shape=outs, **how)
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in ins]
        from jax.extend.core import jaxpr_as_fun

        jaxpr = jax.make_jaxpr(run)(*avals)
        _traced[key] = jax.jit(jaxpr_as_fun(jaxpr))
    found = _traced[key](*ins)
    return found if many else found[0]


_traced = {}  # What a kernel means, as text -> function of its arrays


def meaning(value):
    "Return what decides how a kernel is traced: plain values as they are, arrays by shape and type, functions by code."
    if callable(value) and hasattr(value, "__code__"):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        names = value.__module__, value.__qualname__, value.__code__.co_firstlineno
        return (*names, *map(meaning, (*(value.__defaults__ or ()), *cells)))
    if isinstance(value, ModuleType):
        return value.__name__
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, (tuple, list)):
        return tuple(map(meaning, value))
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"A kernel closes over {value!r}, of which nobody knows what it decides.")


def _name_dialect():
    """Tell MLIR which module describes Triton's types.

    It looks for one each time it meets such a type, in three places where there is none; of the training step of B0
    that is 79,000 failing imports, a third of the time of lowering.
    """
    try:
        from jaxlib.triton import dialect
    except ImportError:  # without it, only slower
        return
    sys.modules.setdefault("jaxlib.mlir.dialects.tt", dialect)


def place(t):
    "Return a program's image, chunk, channels and which of these exist."
    _, jnp, pl, _ = pallas()
    cols = pl.program_id(2) * t.cols + jnp.arange(t.cols)
    return pl.program_id(0), pl.program_id(1), cols, cols < t.channels


def window(t, j, sub, cols, inside):
    "Return the pixels of sub-tile `sub` of chunk `j`, and which elements exist (None: all do)."
    jnp = pallas()[1]
    rows = (j * t.subs + sub) * t.rows + jnp.arange(t.rows)
    mask = None if t.whole else (rows[:, None] < t.pixels) & inside[None, :]
    return rows[:, None], mask


def split_index(v, d):
    "Return quotient and remainder of whole numbers >= 0."
    jax, jnp, _, _ = pallas()
    q = jax.lax.div(v, jnp.full_like(v, d))
    return q, v - q * d


def tile_at(ref, i, rows, cols):
    "Return where a tile of an image lies, in the order that the array has."
    if len(ref.shape) == 3:
        return ref.at[i, rows, cols[None, :]]
    group, lane = split_index(cols, GROUP)
    return ref.at[i, group[None, :], rows, lane[None, :]]


def read_tile(ref, i, rows, cols, mask):
    "Return a tile in float32, zeros where `mask` says that nothing is."
    other = None if mask is None else 0.0
    return pallas()[3].load(tile_at(ref, i, rows, cols), mask=mask, other=other).astype("float32")


def read_row(ref, index, inside):
    "Return a row of a table in float32, zeros outside."
    return pallas()[3].load(ref.at[index], mask=inside, other=0.0).astype("float32")


def read_block(ref, rows, cols, limits):
    "Return a block of a matrix of shape `limits`, in its own type, zeros outside."
    plt, (high, wide) = pallas()[3], limits
    mask = (rows < high)[:, None] & (cols < wide)[None, :]
    return plt.load(ref.at[rows[:, None], cols[None, :]], mask=mask, other=0.0)


def thin_rows(ref, i, rows, t):
    "Return pixels of image `i` with all `t.thin` channels, padded to `t.deep`, in their own type, zeros outside."
    plt, at = pallas()[3], pallas()[1].arange(t.deep)
    mask = (rows < t.pixels)[:, None] & (at < t.thin)[None, :]
    return plt.load(ref.at[i, rows[:, None], at[None, :]], mask=mask, other=0.0)


def kept(v, mask):
    "Return v, with zeros where `mask` says that nothing is."
    return v if mask is None else pallas()[1].where(mask, v, 0.0)


def filled(vector, c, value):
    "Return the vector, or (c,) of `value` where there is none."
    return pallas()[1].full((c,), value, "float32") if vector is None else vector


def dot(a, b):
    "Return the matrix product with sums in float32."
    return pallas()[1].dot(a, b, preferred_element_type="float32")


# ---------------------------------------------------------------- activation


def activate(z, activated, exact):
    "Return swish(z) and its derivative; z and 1 without activation."
    jax, jnp, _, plt = pallas()
    if not activated:
        return z, jnp.ones_like(z)
    if exact or interpreted():
        s = 1.0 / (1.0 + jnp.exp(-z))
    else:
        s = 0.5 + 0.5 * plt.approx_tanh(0.5 * z)  # off by 2^-11: less than a bfloat16 rounds
    return z * s, s * (1 + z * (1 - s))


def is_exact(x):
    "Return whether an activation is of float32: then the sigmoid is, too."
    return x.dtype == "float32"
