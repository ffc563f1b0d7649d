"""Compare images resized on the device of JAX with those of NumPy: how many bytes differ, and by how much.

Half of the images are waves with some noise, half are noise alone, of 30 to 700 pixels a side; random rectangles and
whole images, half of them mirrored. Needs NumPy and JAX only. Prints a line for each arithmetic, and with `--results`
writes it into pixels.csv. Fails where `published` differs by more than one level, or in more than 1e-5 of the values.

    python tests/bench_pixels.py --results results

In a copy of the tree without git, EFFNET_REVISION says the revision: see `effnet_repro.results.revision`.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from effnet_repro.data import device, transforms  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402

LEVELS, SHARE = 1, 1e-5  # what `published` may differ by
KEYS = ("device", "image_resize", "crop", "image_size")


def draw_image(rng, height, width, noisy):
    if noisy:
        return rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    y, x = np.mgrid[:height, :width][..., None]
    waves = 60 * np.sin(y / 7) * (1, 0.7, 0.4) + 50 * np.cos(x / 9) * (0.5, 1, 0.8)
    noise = rng.integers(-18, 19, (height, width, 3))
    return np.clip(np.rint(128 + waves + noise), 0, 255).astype(np.uint8)


def draw(count, seed):
    "Images, a rectangle in each (top, left, height, width), and which are mirrored"
    rng = np.random.default_rng(seed)
    sizes = rng.integers(30, 701, (count, 2))
    images = [draw_image(rng, *size, i % 2) for i, size in enumerate(sizes)]
    part = rng.integers(1, sizes + 1)
    corner = rng.integers(0, sizes - part + 1)
    return images, np.concatenate([corner, part], 1).astype(np.int32), rng.random(count) < 0.5


def on_device(images, rectangles, flips, random, side, image_resize):
    "A function that resizes on the device, as `device_batches` does"
    sent, cut = device.lay_out(images), device.cutter(image_resize)
    part = rectangles if random else device.whole_images(sent.sizes)
    new, corner = np.tile((side, side), (len(part), 1)), np.zeros((len(part), 2))
    if not random:
        windows = [transforms.center_crop_box(*size, side, image_resize) for size in sent.sizes]
        new, corner = (np.array([w[i] for w in windows]) for i in range(2))
        flips = np.zeros(len(part), bool)
    scale = (part[:, 2:] / new).astype("float32")
    numbers = part, scale, corner.astype("float32"), flips, np.int32(0)
    cuts = device.Cuts(sent.begin, sent.sizes[:, 1], *numbers)
    return lambda: cut(sent.pixels, cuts._asdict(), side)


def on_host(image, rectangle, flip, random, side, image_resize):
    if not random:
        return transforms.validation_image(image, side, image_resize)
    top, left, height, width = rectangle
    cut = image[top : top + height, left : left + width]
    return transforms.train_image(cut, flip, side, image_resize)


def seconds(call, rounds=10):
    call().block_until_ready()
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        call().block_until_ready()
        times.append(time.perf_counter() - begin)
    return median(times)


def compare(case, random, side, image_resize):
    "One row: what differs between device and host"
    call = on_device(*case, random, side, image_resize)
    ours = np.asarray(call()).astype(int)
    theirs = [on_host(*one, random, side, image_resize) for one in zip(*case)]
    off = np.abs(ours - np.stack(theirs))
    return {
        "image_resize": image_resize,
        "crop": "training" if random else "validation",
        "image_size": side,
        "values": off.size,
        "differing": int((off > 0).sum()),
        "largest": int(off.max()),
        "ms_per_batch": round(1000 * seconds(call), 3),
    }


def main(words=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=256, help="compared for each line")
    parser.add_argument("--sides", type=int, nargs="+", default=[160, 224], help="in pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="folder of pixels.csv; none = only print")
    args = parser.parse_args(words)
    first, failed = jax.devices()[0], False
    name = first.device_kind
    if first.platform == "cpu":
        name = f"CPU, {os.cpu_count()} cores"
    command = ["python", "tests/bench_pixels.py", *(sys.argv[1:] if words is None else words)]
    case = draw(args.images, args.seed)
    for side in args.sides:
        for image_resize in transforms.RESIZES:
            for random in (True, False):
                row = compare(case, random, side, image_resize)
                share = row["differing"] / row["values"]
                print(f"{name}, " + ", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
                if args.results:
                    about = origin(name, command, args.seed, args.images)
                    write_rows(Path(args.results) / "pixels.csv", [{**row}], KEYS, about)
                bad = row["largest"] > LEVELS or share > SHARE
                failed |= image_resize == "published" and bad
    print("published: NOT met" if failed else "published: met")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
