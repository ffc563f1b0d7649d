"""What a packed set weighs and feeds: original photographs packed in several ways, and read again by one core.

Sizes for ImageNet are projected: bytes an image of this sample, times ImageNet's 1,281,167 training images. Rates are
images a second of one core, by its processor time, so that other programs do not count: reading, decoding and cutting
out the training crop, which is what cores do for a GPU that resizes. Sixteen cores are projected from one.

    python tests/bench_packed.py --images FOLDER [--results results]
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from effnet_repro import data as d  # noqa: E402
from effnet_repro.data import packed, rectangles, request  # noqa: E402
from effnet_repro.data.threads import core_count  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402

IMAGENET, SEED = 1_281_167, 0
WAYS = (("jpeg", 192), ("jpeg", 256), ("jpeg", 448), ("raw", 192), ("raw", 256))


def core_rate(data, rounds):
    "Images a second of one core, for each of several epochs"
    order = request.batch_order(data, data.train_count, SEED, (0, 1))
    asked = request.TrainRequest(replace(data, decoder="simplejpeg"), order, 160)
    job = rectangles.RectanglesJob(asked)
    for epoch in range(rounds + 1):
        numbers, places = order.take(epoch, 0, data.train_count)
        begin = time.process_time()
        for at in range(0, len(numbers), rectangles.PIECE):
            part = slice(at, at + rectangles.PIECE)
            job(numbers[part], places[part])
        if epoch:  # the first one fills caches
            yield len(numbers) / (time.process_time() - begin)


def measure(data, form, short_side, rounds):
    split = data.splits["train"]
    rate = median(core_rate(data, rounds))
    each = split.length.mean()
    return {
        "packed": form,
        "short_side": short_side,
        "images": len(split.label),
        "kb_per_image": round(each / 1000, 1),
        "imagenet_gib_projected": round(each * IMAGENET / 2**30, 1),
        "images_per_s_one_core": round(rate),
        "images_per_s_16_cores_projected": int(round(16 * rate, -2)),
    }


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--images", type=Path, required=True, help="original photographs")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--results", type=Path, default=ROOT / "results")
    a = p.parse_args(words)
    command = ["python", "tests/bench_packed.py", *(sys.argv[1:] if words is None else words)]
    about = origin(f"CPU, {core_count()} cores", command, SEED, a.rounds)
    source, rows = d.open_data(a.images, verbose=False), []
    rows.append(measure(source, "original", "", a.rounds))
    with tempfile.TemporaryDirectory() as folder:
        for form, short_side in WAYS:
            target = Path(folder) / f"{form}{short_side}"
            packed.pack(source, target, packed.Packing(form, short_side), 1, lambda line: None)
            made = d.open_data(target, verbose=False)
            rows.append(measure(made, form, short_side, a.rounds))
    for row in rows:
        print(", ".join(f"{k} {v}" for k, v in row.items()), flush=True)
    write_rows(a.results / "packed.csv", rows, ("device", "packed", "short_side"), about)
    return int(not np.isfinite([r["kb_per_image"] for r in rows]).all())


if __name__ == "__main__":
    sys.exit(main())
