"""Measure the GPU's kernels alone: the part `kernels` of bench_gpu.py.

Each kernel is a small program of its own, traced by the profiler: times are those of the device. Shapes are those of
B0-G16-LN_PN at 224 pixels, 256 images. Writes gpu_kernels.csv and gpu_convs.csv into the folder that is named, and
gpu_groups.csv: convolutions in groups of 1, 8, 16 and 32 channels by the library and by ours.

    python tests/bench_kernels.py results [kernels convs groups]
"""

import glob
import gzip
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

import jax
import jax.numpy as jnp

from effnet_repro.kernels import conv, norm, norm_product, product_norm, tiles
from effnet_repro.ops import get_ops
from effnet_repro.results import origin, write_rows

IMAGES, CALLS, REPEATS = 256, 5, 3
KEYS = {  # what tells the rows of a file apart
    "gpu_kernels.csv": ("kernel", "height", "channels", "place"),
    "gpu_convs.csv": ("product", "way", "channels", "image_size", "kernel_size", "strides"),
    "gpu_groups.csv": (
        "group_size",
        "product",
        "way",
        "channels",
        "image_size",
        "kernel_size",
        "strides",
    ),
}
PARTS = ("kernels", "convs", "groups")
GROUP_SIZES = (1, 8, 16, 32)
ANY_GROUP = [(64, 112, 3, 2), (96, 56, 3, 1), (192, 28, 5, 1), (480, 14, 5, 1), (1152, 7, 5, 1)]
WIDE = [(112, 32), (112, 64), (56, 96), (28, 160), (14, 448), (7, 768)]  # height, channels
THIN = [(112, 32, 32), (112, 16, 64), (56, 24, 96)]  # height, thin, channels
NARROW = [(112, 32, 16), (56, 64, 24), (56, 96, 24), (28, 96, 40), (28, 160, 40)]  # to channels
CONVS = [  # channels, height, kernel size, strides
    (32, 112, 3, 1),
    (64, 112, 3, 2),
    (96, 56, 3, 1),
    (96, 56, 5, 2),
    (160, 28, 5, 1),
    (160, 28, 3, 2),
    (320, 14, 3, 1),
    (320, 14, 5, 1),
    (448, 14, 5, 1),
    (448, 14, 5, 2),
    (768, 7, 5, 1),
    (768, 7, 3, 1),
]


def draw(i, *shape, kind="float32"):
    return jax.random.normal(jax.random.key(i), shape, kind)


def size(*arrays):
    return sum(a.size * a.dtype.itemsize for a in arrays)


def norm_jobs():
    "(row, function, arguments, bytes)"
    for h, c in WIDE:
        x, g = (draw(i, IMAGES, h, h, c, kind="bfloat16") for i in (0, 1))
        xg, gg = tiles.to_nchw16c(x), tiles.to_nchw16c(g)
        table, v, s = draw(2, IMAGES, 5, c), draw(3, c), draw(4, IMAGES, c)
        ks, m, at = draw(5, IMAGES, 2, c), size(x), dict(height=h, channels=c)
        before, after = dict(at, place="expansion"), dict(at, place="convolution")
        one = lambda *a: norm.moments(*a)[0]
        to_groups = lambda *a: norm._apply(*a, True, None, True)
        to_pixels = lambda *a: norm._apply(*a, True)
        sums, gated = (lambda *a, on=on: norm._sums(*a, True, on) for on in (False, True))
        back = lambda *a: norm._input_gradient(*a, True)
        back_gated = lambda *a: norm._input_gradient(*a[:-1], True, a[-1])
        yield dict(before, kernel="moments"), one, (x,), m
        yield dict(before, kernel="apply"), to_groups, (x, table, v, s), 2 * m
        yield dict(before, kernel="sums (gradient)"), sums, (x, gg, table), 2 * m
        yield dict(before, kernel="input gradient"), back, (x, gg, table, s, ks), 3 * m
        yield dict(after, kernel="moments"), one, (xg,), m
        yield dict(after, kernel="pool"), norm.pool, (xg, table), m
        yield dict(after, kernel="apply"), to_pixels, (xg, table, v, s), 2 * m
        yield dict(after, kernel="sums (gradient)"), gated, (xg, g, table), 2 * m
        yield dict(after, kernel="input gradient"), back_gated, (xg, g, table, s, ks, s), 3 * m
    x = draw(0, IMAGES, 224, 224, 3, kind="bfloat16")
    y = IMAGES * 112 * 112 * 32 * 2
    about = dict(kernel="patches", height=224, channels=3, place="stem")
    yield about, lambda x: conv.patches(x, 3, 2), (x,), size(x) + y


def product_jobs():
    for h, thin, c in THIN:
        x, g = (draw(i, IMAGES, h, h, w, kind="bfloat16") for i, w in ((0, thin), (1, c)))
        w, gg = draw(2, thin, c, kind="bfloat16"), tiles.to_nchw16c(g)
        table, v = draw(3, IMAGES, 5, c), draw(4, c)
        at = dict(height=h, channels=c, place=f"product of {thin}")
        apply = lambda *a: product_norm._product_apply(*a, True)
        yield dict(at, kernel="moments"), product_norm._gram, (x,), size(x)
        yield dict(at, kernel="apply"), apply, (x, w, table, v, v), size(x, g)
        ins, wanted = (
            (x, w, gg, table, v),
            h < 112 or thin < 32,
        )  # nobody asks for that of the images
        walk = lambda *a, wanted=wanted: product_norm._walk(*a, wanted, True)
        yield dict(at, kernel="all sums"), walk, ins, size(g, *[x] * (1 + wanted))
        if wanted:
            ins = (tiles.flat(x), x, draw(6, IMAGES, thin, thin), draw(7, IMAGES, thin))
            yield dict(at, kernel="thin gradient"), product_norm._add_thin, ins, 3 * size(x)


def narrow_jobs():
    "The product of a norm: wide activations after a convolution, and the narrow side of a projection"
    for h, c, thin in NARROW:
        x = draw(0, IMAGES, c // tiles.GROUP, h, h, tiles.GROUP, kind="bfloat16")
        d, w = draw(1, IMAGES, h * h, thin, kind="bfloat16"), draw(2, c, thin, kind="bfloat16")
        table, v, s = draw(3, IMAGES, 5, c), draw(4, c), draw(5, IMAGES, c)
        ks, at = draw(6, IMAGES, 2, c), dict(height=h, channels=c, place=f"projection to {thin}")
        apply, sums = norm_product._apply_product, norm_product._narrow_sums
        back = norm_product._narrow_gradient
        yield dict(at, kernel="apply and product"), apply, (x, w, table, v, s), size(x, d)
        yield dict(at, kernel="all sums"), sums, (x, d, table), size(x, d)
        yield dict(at, kernel="input gradient"), back, (x, d, w, table, s, ks, s), size(x, x, d)


def conv_jobs(shape, group_size, ways):
    "The three products of a group convolution's training step, each way"
    (c, h, k, strides), out = shape, -(-shape[1] // shape[3])
    x, kernel = draw(0, IMAGES, h, h, c, kind="bfloat16"), draw(1, k, k, group_size, c) / 10
    kernel, dy = kernel.astype("bfloat16"), draw(2, IMAGES, out, out, c, kind="bfloat16")
    about = dict(channels=c, image_size=h, kernel_size=k, strides=strides)
    about["macs"] = dy.size * group_size * k * k
    for way, (f, turn) in ways(strides).items():
        ins = (turn(x), kernel, turn(dy))
        forward = lambda x, w, dy, f=f: f(x, w)
        to_x = lambda x, w, dy, f=f: jax.vjp(lambda x: f(x, w), x)[1](dy)[0]
        to_w = lambda x, w, dy, f=f: jax.vjp(lambda w: f(x, w), w)[1](dy)[0]
        products = (("output", forward), ("input gradient", to_x), ("weight gradient", to_w))
        for product, g in products:
            yield dict(about, product=product, way=way), g, ins, size(x, dy)


def own_conv_jobs():
    "Those of B0-G16-LN_PN, between neighbors that hold activations by groups"
    library = lambda strides: lambda x, w: get_ops("jax").conv(x, w, strides)
    strips = lambda strides: lambda x, w: conv.grouped_conv(x, w, strides)
    ways = lambda s: dict(library=(library(s), lambda v: v), strips=(strips(s), tiles.to_nchw16c))
    for shape in CONVS:
        yield from conv_jobs(shape, tiles.GROUP, ways)


def group_jobs():
    "Any group size; `strips, alone` begins and ends with activations by pixels, as in a network that is not ours"
    library = lambda strides: lambda x, w: get_ops("jax").conv(x, w, strides)
    strips = lambda strides: lambda x, w: conv.grouped_conv(x, conv.widen_groups(w), strides)
    alone = lambda strides: lambda x, w: tiles.to_nhwc(strips(strides)(tiles.to_nchw16c(x), w))
    same = lambda v: v
    both = lambda s: {"strips": (strips(s), tiles.to_nchw16c), "strips, alone": (alone(s), same)}
    for shape in ANY_GROUP:
        for group_size in GROUP_SIZES:
            more = both if tiles.GROUP % group_size == 0 else lambda s: {}
            ways = lambda s, more=more: {"library": (library(s), same), **more(s)}
            for row, *job in conv_jobs(shape, group_size, ways):
                yield dict(row, group_size=group_size), *job


def peak_jobs():
    x = draw(0, IMAGES, 112, 112, 64, kind="bfloat16")
    yield dict(kernel="copy", height=112, channels=64, place=""), lambda x: x * 2, (x,), 2 * size(x)
    a = draw(1, 8192, 8192, kind="bfloat16")
    yield dict(kernel="matrix product", height=8192, channels=8192, place=""), jnp.dot, (a, a), 0


def device_ms(programs):
    "Name of a program -> milliseconds on the device in this trace; each has run CALLS times"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for f, args in programs:
                jax.block_until_ready([f(*args) for _ in range(CALLS)])
        (file,) = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
        with gzip.open(file) as trace:
            events = json.load(trace)
    events = events if isinstance(events, list) else events["traceEvents"]
    found = {}
    for e in events:
        module = (e.get("args") or {}).get("hlo_module", "")
        if e.get("ph") == "X" and module.startswith("jit_job"):
            name = module.split("(")[0]
            found[name] = found.get(name, 0.0) + e["dur"] / 1e3 / CALLS
    return found


def named(i, f):
    def job(*args):
        return f(*args)

    job.__name__ = f"job{i}x"
    return jax.jit(job)


def main(folder, *parts):
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"no part called {', '.join(sorted(unknown))}. Parts: {', '.join(PARTS)}")
    if jax.default_backend() != "gpu":
        print("bench-gpu kernels: there is no GPU here, so there is nothing to measure")
        return
    making = dict(
        kernels=(norm_jobs, product_jobs, narrow_jobs), convs=(own_conv_jobs,), groups=(group_jobs,)
    )
    made = [make for part in parts or PARTS for make in making[part]]
    jobs = [*peak_jobs(), *(job for make in made for job in make())]
    lowered = [named(i, f).lower(*args) for i, (_, f, args, _) in enumerate(jobs)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = [(f, job[2]) for f, job in zip(pool.map(lambda f: f.compile(), lowered), jobs)]
    jax.block_until_ready([f(*args) for f, args in programs][-1])
    traces = [device_ms(programs) for _ in range(REPEATS)]
    device = jax.devices()[0].device_kind
    command = ["python", "tests/bench_kernels.py", "results", *parts]
    about = origin(device, command, 0, CALLS * REPEATS)  # arrays have the seeds 0, 1, 2, ...
    rows = []
    for i, (row, _, _, moved) in enumerate(jobs):
        ms = [t[f"jit_job{i}x"] for t in traces]
        times = dict(ms=median(ms), lowest=min(ms), highest=max(ms), runs=len(ms) * CALLS)
        times = {k: round(v, 5) for k, v in times.items()}
        rows.append({**row, "batch": IMAGES, **times, "tb_per_s": moved / median(ms) / 1e9})
    fastest = max(row["tb_per_s"] for row in rows)  # TB/s; XLA's copy is not the fastest
    peak = 2 * 8192**3 / rows[1]["ms"] / 1e9  # TFLOP/s
    for row, (_, _, _, moved) in zip(rows, jobs):
        floor = max(moved / fastest / 1e9, 2 * row.get("macs", 0) / peak / 1e9)
        row.update(of_floor=round(floor / row["ms"], 3), tb_per_s=round(row["tb_per_s"], 3))
    rows[1].update(tflop_per_s=round(peak, 1), of_floor=1.0)
    rows[0]["tflop_per_s"] = ""
    for name, key in KEYS.items():
        mine = [r for r in rows if key[0] in r and ("group_size" in r) == (key[0] == "group_size")]
        if len(mine) <= 2:  # a copy and a matrix product, which say what the machine can do
            continue
        write_rows(Path(folder) / name, mine, key, about)
        for r in mine:
            print(*(f"{k}={r[k]}" for k in list(r)[:11] if r[k] != ""), r["of_floor"], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
