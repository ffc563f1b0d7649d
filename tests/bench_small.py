"""Tune the budget `small` and timm's efficientnet_b0 by one search, and measure both, on a GPU.

Both networks try the same trials (`small_runs.TRIALS`), for as many epochs, on the training images but every fifth;
that fifth measures them (1,500 of imagenette128's 7,500). The best trial of each is trained on all training images and
measured once on the validation images: ours by `effnet-train` (seed 0, timed from the command to its last line) and
with more seeds in one process, timm's at equal epochs and at equal time. One training has the GPU at a time; only the
command shares it. Rows go to results/small.csv.

    python tests/bench_small.py --data-dir imagenette128 [--trials 8] [--trial-epochs 20] [--seeds 1 2 3 4]

--limit  seconds; what would take longer is left out
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from effnet_repro.results import origin, write_rows  # noqa: E402

KEY = ("network", "kind", "seed", "epochs", "learning_rate", "weight_decay", "drop_path", "mixup")
CASE = "B0-G16-LN_PN-Half_16IPU_2x8"


def worker(args, network, folder, deadline, *more):
    "Start `small_runs.py` for a network"
    words = [sys.executable, str(ROOT / "tests/small_runs.py"), "--network", network]
    words += ["--data-dir", args.data_dir, "--out", str(folder / f"{network}.jsonl")]
    words += [
        "--lock",
        str(folder / "gpu"),
        "--deadline",
        str(deadline),
        "--batch",
        str(args.batch),
    ]
    words += ["--trials", str(args.trials), "--trial-epochs", str(args.trial_epochs)]
    words += ["--image-size", str(args.image_size), *more, *(["--quick"] if args.quick else [])]
    log = open(folder / f"{network}.log", "w")
    return subprocess.Popen(words, env=environment(), stdout=log, stderr=subprocess.STDOUT)


def environment():
    return {
        **os.environ,
        "KERAS_BACKEND": "jax",
        "PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", ""),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.25",
    }


def command(args, best, folder, deadline):
    "`effnet-train` with the best trial; returns its row"
    exponent = math.log2(best["learning_rate"] / args.batch)
    fields = {
        "epochs": best["epochs"],
        "image_size": args.image_size,
        "global_batch_size": args.batch,
    }
    fields.update(weight_decay=best["weight_decay"], drop_path_rate=best["drop_path"])
    fields.update(mixup_alpha=best["mixup"], crop_area_min=best["crop_area_min"])
    words = [sys.executable, "-m", "effnet_repro.cli", "train", CASE, "--data-dir", args.data_dir]
    words += ["--budget", "small", f"--base-learning-rate-exponent={exponent:.4f}"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    words += ["--validate-every", "10", "--no-progress", "--run-dir", str(folder / "run")]
    words += ["--max-steps", "2", "--micro-batch-size", "8"] if args.quick else []
    began = time.time()
    with open(folder / "command.log", "w") as log:
        left = deadline - time.time()
        try:
            done = subprocess.run(words, env=environment(), stdout=log, stderr=log, timeout=left)
        except subprocess.TimeoutExpired:
            print("command: no time", flush=True)
            return []
    print(
        (folder / "command.log").read_text()[-1500:] if done.returncode else "command: done",
        flush=True,
    )
    if done.returncode:
        return []
    lines = (folder / "run/validation.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","))) for line in lines[1:]]
    top1 = {row["weights"]: float(row["top1"]) for row in rows}
    row = dict(network="ours", kind="command", seed=0, batch=args.batch, **best)
    return [
        {
            **row,
            "top1": top1["last"],
            "top1_average": top1.get("average"),
            "seconds": time.time() - began,
        }
    ]


def parse(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--trial-epochs", type=int, default=20)
    parser.add_argument("--seeds", nargs="+", default=["1", "2", "3", "4"])
    parser.add_argument(
        "--seconds", default="110", help="of the last trainings of ours, which gives their epochs"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--limit", type=float, default=400)
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--logs", help="folder for what the programs print")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of a tiny network: whether it runs"
    )
    return parser.parse_args(words)


def main(words=None):
    words = sys.argv[1:] if words is None else list(words)
    args, began = parse(words), time.time()
    deadline = began + args.limit
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.logs or temporary)
        folder.mkdir(exist_ok=True)
        seeds = ["--seconds", args.seconds, "--seeds", *args.seeds]
        ours = worker(args, "ours", folder, deadline, *seeds)
        timm = worker(args, "timm", folder, deadline, "--ours", str(folder / "ours.jsonl"))
        best = folder / "ours.jsonl.best"
        while not best.exists() and ours.poll() is None and time.time() < deadline:
            time.sleep(0.2)
        found = (
            command(args, json.loads(best.read_text()), folder, deadline) if best.exists() else []
        )
        for process in (ours, timm):
            try:
                process.wait(max(1, deadline + 10 - time.time()))
            except subprocess.TimeoutExpired:
                process.kill()
        for name in ("ours", "timm"):
            path = folder / f"{name}.jsonl"
            found += (
                [json.loads(line) for line in path.read_text().splitlines()]
                if path.exists()
                else []
            )
            print((folder / f"{name}.log").read_text()[-1500:], flush=True)
        device = next((row["device"] for row in found if "device" in row), "")
        line = ["python", "tests/bench_small.py", *words]
        for row in found:
            about = origin(device, line, row["seed"], 1)
            write_rows(
                Path(args.results) / "small.csv",
                [{k: v for k, v in row.items() if k != "device"}],
                KEY,
                about,
            )
            short = {k: row.get(k) for k in (*KEY, "top1", "top1_average", "seconds")}
            print(json.dumps(short), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
