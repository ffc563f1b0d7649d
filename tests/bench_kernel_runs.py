"""Trainings with the GPU's kernels and with plain operations, seed by seed: is the accuracy the same?

Everything else is the same: network, images, order, recipe (that of budget `small`). The two differ by the rounding of
bfloat16, which training multiplies, so single seeds differ; their means must not. Writes gpu_runs.csv.

    python tests/bench_kernel_runs.py --data-dir imagenette128 --results results [--seeds 5] [--epochs 20]
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench_claims import ARMS, case_of  # noqa: E402

from effnet_repro.results import origin, write_rows  # noqa: E402

WAYS = {"kernels": "1", "plain operations": "0"}  # EFFNET_KERNELS
RATE, WARMUP, DECAY = 0.004, 0.3, 0.05
ANSWER = "answer: "


def worker(args):
    from learner import Learner

    from effnet_repro.data import open_data
    from effnet_repro.training import device_name

    data = open_data(args.data_dir, verbose=False)
    case = case_of(ARMS["G16-LN_PN"], args, data.train_count)
    learner = Learner(case, data.num_classes, args.batch)
    steps = args.steps or round(args.epochs * (data.train_count // args.batch))
    how = dict(rate=RATE, warmup=WARMUP, weight_decay=DECAY)
    learner.learn(learner.begin(0), data, 1, 0, **how)
    for seed in range(args.seeds):
        begin = time.perf_counter()
        judged = learner.judge(learner.learn(learner.begin(seed), data, steps, seed, **how), data)
        seconds = round(time.perf_counter() - begin, 2)
        row = dict(training_seed=seed, steps=steps, batch=args.batch, image_size=case.image_size)
        row.update(top1=round(judged.top1, 5), loss=round(judged.loss, 5), seconds=seconds)
        print(ANSWER + json.dumps({"device": device_name(), **row}), flush=True)


def main(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", help="default: the sample set")
    parser.add_argument("--results", default=str(ROOT / "results"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, help="instead of epochs")
    parser.add_argument("--quick", type=int, metavar="SIDE", help="a tiny network, for rehearsals")
    parser.add_argument("--ways", nargs="*", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.worker:
        return worker(args)
    given = sys.argv[1:] if words is None else words
    for way in args.ways:
        env = {**os.environ, "EFFNET_KERNELS": WAYS[way], "KERAS_BACKEND": "jax"}
        env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
        command = [sys.executable, __file__, "--worker", *given]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(ANSWER):
                row = json.loads(line[len(ANSWER) :])
                ran = ["python", "tests/bench_kernel_runs.py", *given]
                about = origin(row.pop("device"), ran, row["training_seed"], 1)
                keys = ("way", "training_seed", "image_size", "batch")
                path = Path(args.results) / "gpu_runs.csv"
                write_rows(path, [{"way": way, **row}], keys, about)
                print(way, row, flush=True)
        if process.wait():
            sys.exit(f"bench-kernel-runs: the trainings with {way} failed; what they said is above")
    return 0


if __name__ == "__main__":
    sys.exit(main())
