"""Measure how fast images on disk become batches, and how much the decoders' pixels differ.

Readers alone: nothing trains meanwhile. Beside them, in the same call, what the cores (simplejpeg, in threads and in
processes) and a GPU (nvImageCodec) can decode, nothing else done; and what decoders and network allow side by side
("beside steps"): bare training steps of B0 at half resolution run in the process of the decoders, one whenever as many
more images are decoded as it takes. The records of `--images`, original photographs, are repeated in memory of the file
system's cache. Writes feed.csv (images/s) and decoders.csv (differences) into `--results`.

    python tests/bench_feed.py --images FOLDER [--only PATTERN] [--sizes 160 224 380] [--results results]

In a copy of the tree without git, EFFNET_REVISION says the revision: see `effnet_repro.results.revision`.
"""

import argparse
import contextlib
import functools
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from effnet_repro import data as d  # noqa: E402
from effnet_repro.data import decode, decoders, device, gpu_decode, readers, transforms  # noqa: E402
from effnet_repro.data.threads import core_count  # noqa: E402
from effnet_repro.kernels.ops import XLA_FLAGS  # noqa: E402
from effnet_repro.results import NO_SEED, origin, write_rows  # noqa: E402
from tests.bench_sets import repeat_records  # noqa: E402


def device_name():
    try:
        found = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        return found.stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return f"CPU, {core_count()} cores"


# ---------------------------------------------------------------- rates


def decode_some(encoded):
    for one in encoded:
        decode.decode_image(one, fast=True)
    return len(encoded)


def by_pool(pool, encoded, seconds):
    "Images a second that a pool decodes, three readings"
    parts = [encoded[i::4] for i in range(4)] * core_count()
    list(pool.map(decode_some, parts))
    for _ in range(3):
        count, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < seconds / 3:
            count += sum(pool.map(decode_some, parts))
        yield count / (time.perf_counter() - begin)


def by_stream(make, batch, seconds):
    "Images a second of a stream after its first batches, three readings, each of a stream that begins anew"
    for _ in range(3):
        stream, count = make(), -4 * batch
        for images, *_ in stream:
            count += batch
            if count == 0:
                begin = time.perf_counter()
            if count > 0 and time.perf_counter() - begin > seconds / 3:
                break
        getattr(images, "block_until_ready", lambda: None)()
        yield count / (time.perf_counter() - begin)
        getattr(stream, "close", lambda: None)()


def by_gpu(encoded, seconds, at_once=512):
    "Images a second that the producers of a GPU decode, nothing else done; three readings"
    some = [np.frombuffer(one, np.uint8) for one in encoded if one[:2] == b"\xff\xd8"]
    some = (some * -(-at_once // len(some)))[:at_once]
    producers = [gpu_decode.Producer(0) for _ in range(gpu_decode.PRODUCERS)]
    with ThreadPoolExecutor(len(producers)) as pool:
        work = lambda producer, until: _decoded_until(producer, some, until)
        for reading in range(4):
            begin = time.perf_counter()
            counts = pool.map(work, producers, [begin + seconds / 3] * len(producers))
            found = sum(counts) / (time.perf_counter() - begin)
            if reading:  # before the first one the decoders have no memory yet
                yield found


def beside_steps(encoded, seconds, batch=768):
    "Images a second that training steps take and producers decode, side by side; three readings"
    from gpu_contenders import ours

    steps = ours("B0-G16-LN_PN-Half", 160, batch, "train")
    steps(3)
    some = [np.frombuffer(one, np.uint8) for one in encoded if one[:2] == b"\xff\xd8"]
    some = (some * -(-batch // len(some)))[:batch]
    decoded, ends = queue.Queue(2 * gpu_decode.PRODUCERS), threading.Event()

    def decode_on(producer):
        while not ends.is_set():
            producer.decode(some)
            with contextlib.suppress(queue.Full):
                decoded.put(batch, timeout=5)

    producers = [gpu_decode.Producer(0) for _ in range(gpu_decode.PRODUCERS)]
    with ThreadPoolExecutor(len(producers)) as pool:
        for producer in producers:
            pool.submit(decode_on, producer)
        try:
            for reading in range(4):
                begin, count = time.perf_counter(), 0
                while time.perf_counter() - begin < seconds / 3:
                    for _ in range(4):
                        decoded.get()
                    steps(4)
                    count += 4 * batch
                if reading:  # what was decoded before the first one counts for nothing
                    yield count / (time.perf_counter() - begin)
        finally:
            ends.set()


def _decoded_until(producer, some, until):
    "How many images a producer decodes until a time"
    count = 0
    while time.perf_counter() < until:
        count += sum(one is not None for one in producer.decode(some))
    return count


def streams(data, sizes, batch):
    "(name, size, batch, stream) of each reader that can be used here"
    able = lambda name: (
        decoders.is_installed(name) and (name != "nvimagecodec" or gpu_decode.problem() is None)
    )
    for name in filter(able, decoders.DECODERS[1:]):
        reader = decoders.READER_OF[name]
        for size in sizes:
            args = replace(data, decoder=name), size
            if reader == "tensorflow":
                make = lambda a: d.tensorflow_arrays(d.training_batches, *a, batch)
            elif reader == "numpy" and not device_name().startswith("CPU"):
                make = lambda a: d.training_batches(*a, batch, reader=readers.sending_reader())
            else:
                make = lambda a, r=reader: d.training_batches(*a, batch, reader=r)
            yield f"{name}: training", size, batch, make, args
    if able("nvimagecodec"):
        for each in (64, 256):
            make = lambda a, e=each: d.validation_batches(*a, e, reader="nvimagecodec")
            args = replace(data, decoder="nvimagecodec"), sizes[0]
            yield "nvimagecodec: validation", sizes[0], each, make, args


def rates(data, a):
    "Rows of feed.csv, one after the other"
    encoded = [decode.read_encoded(data, "train", i)[0] for i in range(min(data.train_count, 58))]
    rows = {"simplejpeg alone, threads": ThreadPoolExecutor}
    rows["simplejpeg alone, processes"] = ProcessPoolExecutor
    for name, pool in rows.items():
        if re.search(a.only, name):
            with pool(core_count()) as opened:
                yield name, "", "", list(by_pool(opened, 8 * encoded, a.seconds))
    name = "nvimagecodec alone"
    if re.search(a.only, name) and gpu_decode.problem() is None:
        yield name, "", "", list(by_gpu(encoded, a.seconds))
    name = "nvimagecodec beside steps"
    if re.search(a.only, name) and gpu_decode.problem() is None:
        yield name, 160, 768, list(beside_steps(encoded, a.seconds))
    for name, size, batch, make, args in streams(data, a.sizes, a.batch):
        if re.search(a.only, name):
            yield (
                name,
                size,
                batch,
                list(by_stream(functools.partial(make, args), batch, a.seconds)),
            )


# ---------------------------------------------------------------- differences


def difference(a, b):
    off = np.abs(a.astype(int) - b)
    return off.mean(), (off <= 2).mean(), off.max()


def gpu_pixels(encoded):
    "What nvImageCodec makes of JPEGs on the GPU, as arrays; None where it refuses"
    import cupy

    producer = gpu_decode.Producer()
    found = []
    for image in producer.decode(encoded):
        found.append(None if image is None else cupy.asnumpy(cupy.asarray(image.owner)))
    return found


def agreement(data):
    "Rows of decoders.csv: two ways to decode the photographs, and how far apart they are"
    encoded = [decode.read_encoded(data, "train", i)[0] for i in range(data.train_count)]
    encoded = [one for one in encoded if one[:2] == b"\xff\xd8"]
    ways = {
        "simplejpeg, accurate DCT": [decode.decode_image(e) for e in encoded],
        "simplejpeg, fast DCT": [decode.decode_image(e, fast=True) for e in encoded],
        "Pillow": [decode.decode_image(e, turbo=False) for e in encoded],
    }
    if gpu_decode.problem() is None:
        ways["nvImageCodec"] = gpu_pixels(encoded)
    first, theirs = "simplejpeg, accurate DCT", ways["simplejpeg, accurate DCT"]
    for name, ours in ways.items():
        both = [difference(a, b) for a, b in zip(ours, theirs) if a is not None]
        if name == first or not both:
            continue
        mean, within, largest = zip(*both)
        yield {
            "decoder": name,
            "beside": first,
            "images": len(both),
            "refused": len(ours) - len(both),
            "mean_difference": round(float(np.mean(mean)), 4),
            "largest_mean": round(float(np.max(mean)), 4),
            "share_within_2": round(float(np.mean(within)), 5),
            "largest": int(np.max(largest)),
        }


def kernel_differences(count=96, side=160, seed=0):
    "Values that the GPU's kernel makes other than `resize` of the same decoded pixels, for each arithmetic"
    from tests.bench_pixels import draw, on_host

    images, rectangles, flips = draw(count, seed)
    producer = gpu_decode.Producer()
    for how in transforms.RESIZES:
        for random in (True, False):
            rows = np.zeros(count, gpu_decode.ROW)
            sizes = np.array([image.shape[:2] for image in images])
            part = rectangles if random else device.whole_images(sizes)
            new, corner, mirrored = np.full((count, 2), side), np.zeros((count, 2)), flips
            if not random:
                windows = [transforms.center_crop_box(*s, side, how) for s in sizes]
                new, corner = np.array(windows).swapaxes(0, 1)
                mirrored = np.zeros(count, bool)
            for name, column in zip(("top", "left", "height", "width"), part.T):
                rows[name] = column
            rows["flip"], rows["corner"] = mirrored, corner
            rows["scale"] = (part[:, 2:] / new).astype("float32")
            out = gpu_decode.empty((count, side, side, 3))
            stage = gpu_decode.Stage()
            stage.begin(2**20)  # less than they need
            begins = [stage.place(image.reshape(-1, 3)) for image in images]
            sent = stage.images(begins, sizes)
            producer.write(sent, rows, out, 0, how == "published", stage)
            theirs = [on_host(*one, random, side, how) for one in zip(images, rectangles, flips)]
            off = np.abs(np.asarray(out).astype(int) - np.stack(theirs))
            yield how, "training" if random else "validation", int((off > 0).sum()), int(off.max())


def main(words=None):
    os.environ.setdefault("XLA_FLAGS", XLA_FLAGS)  # those of the steps
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=Path, required=True, help="original photographs, TFRecords")
    p.add_argument("--sizes", type=int, nargs="+", default=[160, 224, 380], help="in pixels")
    p.add_argument("--batch", type=int, default=768)
    p.add_argument("--records", type=int, default=20000)
    p.add_argument("--seconds", type=float, default=6, help="of each rate")
    p.add_argument(
        "--only",
        default="",
        help="regular expression over the names of rates; pixels = the differences",
    )
    p.add_argument("--results", type=Path, default=ROOT / "results")
    a = p.parse_args(words)
    command = ["python", "tests/bench_feed.py", *(sys.argv[1:] if words is None else words)]
    about = origin(device_name(), command, NO_SEED, 3)
    small = d.open_data(a.images, verbose=False)
    if re.search(a.only, "pixels"):
        for row in agreement(small):
            print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
            write_rows(a.results / "decoders.csv", [row], ("device", "decoder"), about)
        if gpu_decode.problem() is None:
            for found in kernel_differences():
                print("kernel:", *found, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        repeat_records(a.images, Path(folder) / "set", a.records, a.records // 2)
        data = d.open_data(Path(folder) / "set", verbose=False)
        for name, size, batch, found in rates(data, a):
            low, middle, high = sorted(found)
            row = {"reader": name, "image_size": size, "batch": batch, "cores": core_count()}
            row.update(images_per_s=round(middle, 1), lowest=round(low, 1), highest=round(high, 1))
            print(
                f"{name:32} {size:4} px {middle:10,.0f} images/s ({low:,.0f} to {high:,.0f})",
                flush=True,
            )
            keys = ("device", "reader", "image_size", "batch")
            write_rows(a.results / "feed.csv", [row], keys, about)


if __name__ == "__main__":
    main()
