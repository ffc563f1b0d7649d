"""What several processes cost: the bytes of a training step, modelled; and the speed of a step, measured on GPUs.

    python tests/bench_processes.py model --results results
    python tests/bench_processes.py measure --gpus 1 2 4 [--data FOLDER] --results results

`model` writes `process_traffic.csv`: bytes of the gradients of the six half-resolution cases, and how many GPUs may
train together until they take a tenth of a step. The rates of one GPU are those of `effnet-plan --device gpu`.

`measure` writes `process_speed.csv`: images a second of training steps as `effnet-train` does them, on images that
stay on the device, with one process a GPU, and beside it one process with as many GPUs. Each is the median of five
rounds: B0-Half and B4-Half with 768 images a step on any number of GPUs (strong), and B0-Half with 768 images a GPU
(weak), which needs a set of more than the 1,200 sample images. On a machine without GPUs, `--rehearse` runs the same
with CPU processes and a tiny network, and writes nothing.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from effnet_repro.config import for_one_device, get_case, load_cases, override  # noqa: E402
from effnet_repro.distributed.traffic import gradient_bytes, gradient_share, most_gpus  # noqa: E402
from effnet_repro.gpu_plan import rates, step_rate  # noqa: E402
from effnet_repro.results import NO_SEED, origin, write_rows  # noqa: E402
from tests.process_runs import FAST  # noqa: E402

SEED, ROUNDS = 0, 5
GPUS_OF_A_LINK, LINKS = (1, 8), (10, 100, 400)  # Gbit/s
B0, B4 = "B0-G16-LN_PN-Half_16IPU_2x8", "B4-G16-LN_PN-Half_16IPU_4x4"


# ---------------------------------------------------------------- modelled


def model(a):
    "Write process_traffic.csv"
    known, rows = rates(), []
    names = [n for n in load_cases() if re.match(r"B\d-G16-LN_PN-Half_", n)]
    for name in sorted(names):
        case = for_one_device(get_case(name))
        rate, projected = step_rate(case, known)
        for gpus in GPUS_OF_A_LINK:
            row = {"case": name, "gpus_of_a_link": gpus, "image_size": case.image_size}
            row.update(images=case.global_batch_size, images_per_s=round(rate, 1))
            row.update(gradient_mb=round(gradient_bytes(case) / 1e6, 3))
            row["rate"] = "projected" if projected else "measured"
            for gbit in LINKS:
                row[f"most_gpus_{gbit}"] = most_gpus(case, rate, gpus, gbit)
                alone = rate / (
                    16 * gpus
                )  # a step takes as long as one GPU needs for the whole batch
                row[f"weak_share_{gbit}"] = round(gradient_share(case, alone, 16, gpus, gbit), 4)
            rows.append(row)
    words = "python tests/bench_processes.py model --results results"
    about = origin(f"modelled from {known['device']}", words, NO_SEED, 1)
    write_rows(a.results / "process_traffic.csv", rows, ("case", "gpus_of_a_link"), about)
    for row in rows:
        print(row)


# ---------------------------------------------------------------- measured


def one_case(name, images, rehearse):
    "A case of so many images a step; a tiny network for a rehearsal"
    case = for_one_device(get_case(name))
    if not rehearse:
        return override(case, global_batch_size=images)
    blocks = "r1_k3_s2_e1_i32_o16", "r2_k3_s2_i16_o16"
    case = override(for_one_device(case, 4, 16), model_size="cifar", net_stages=blocks)
    return override(case, image_size=32, top_filters=32, mix_group_size=4)


def work(a):
    "One process of a measurement: prints a JSON line of images a second of each round"
    from effnet_repro.data import open_data
    from effnet_repro.distributed import ALONE, join_others
    from effnet_repro.training import configure, device_name
    from effnet_repro.training.micro_batch import divided_micro_batch, settle_micro_batch
    from effnet_repro.training.runtime import KerasRuntime

    configure()
    processes = join_others() if a.processes > 1 else ALONE
    import jax

    case = settle_micro_batch(one_case(a.case, a.images, a.rehearse))
    if processes.count > 1:
        case = divided_micro_batch(case, jax.device_count())
    runtime = KerasRuntime(case, SEED, validates=False, processes=processes)
    data = runtime.settle(open_data(a.data, verbose=False), None)
    begin = time.perf_counter()
    runtime.begin(data, 0, None)
    wait = lambda: float(runtime.advance(1).logs["loss"])
    wait()
    compiled, found = time.perf_counter() - begin, []
    for _ in range(3):
        wait()
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(a.steps - 1):
            runtime.advance(1)
        wait()
        found.append(a.steps * case.global_batch_size / (time.perf_counter() - begin))
    processes.lead(lambda: None)
    micro = case.micro_batch_size
    row = {"rounds": found, "compile_s": compiled, "device": device_name(), "micro_batch": micro}
    row["images"] = case.global_batch_size
    print(json.dumps(row), flush=True)
    runtime.close()
    processes.close()


def started(a, name, images, processes, gpus):
    "The JSON line of the first of some processes, which have so many GPUs together"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    words = [
        sys.executable,
        __file__,
        "work",
        "--case",
        name,
        "--images",
        images,
        "--steps",
        a.steps,
    ]
    words += ["--processes", processes, *(["--data", a.data] if a.data else [])]
    words = [*map(str, words), *(["--rehearse"] if a.rehearse else [])]
    running = []
    for i in range(processes):
        env = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": str(ROOT)}
        if a.rehearse:
            env["XLA_FLAGS"] = FAST
        env["CUDA_VISIBLE_DEVICES"] = str(i) if processes > 1 else ",".join(map(str, range(gpus)))
        if processes > 1:
            env.update(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(processes))
            env["JAX_PROCESS_ID"] = str(i)
        out = subprocess.PIPE if i == 0 else subprocess.DEVNULL
        running.append(subprocess.Popen(words, env=env, stdout=out, stderr=a.log, text=True))
    try:
        said, _ = running[0].communicate(timeout=a.timeout)
    finally:
        for process in running:
            process.kill()
    lines = [line for line in said.splitlines() if line.startswith("{")]
    if not lines:
        raise RuntimeError(
            f"{name}, {processes} processes, {gpus} GPUs: nothing measured (--log says why)"
        )
    return json.loads(lines[-1])


def measure(a):
    "Write process_speed.csv, a row as soon as it is measured"
    wanted = [(B0, "strong", lambda n: 768), (B4, "strong", lambda n: 768)]
    wanted += [(B0, "weak", lambda n: 768 * n)]
    wanted = wanted[:1] if a.rehearse else wanted
    first = {}
    for name, kind, images in wanted:
        for gpus in a.gpus:
            if kind == "weak" and gpus == 1:
                continue  # the same as strong
            for processes in sorted({gpus, 1}, reverse=True):
                if a.rehearse and processes != gpus:
                    continue  # one process has one CPU
                found = started(a, name, images(gpus), processes, gpus)
                speed = statistics.median(found["rounds"])
                first.setdefault(name, speed if gpus == 1 else None)
                row = {"case": name, "kind": kind, "gpus": gpus, "processes": processes}
                row.update(images=found["images"], micro_batch=found["micro_batch"])
                row.update(images_per_s=round(speed, 1), lowest=round(min(found["rounds"]), 1))
                row.update(highest=round(max(found["rounds"]), 1), steps=a.steps)
                row["compile_s"] = round(found["compile_s"], 1)
                row["times_one_gpu"] = round(speed / first[name], 3) if first[name] else ""
                print(row, flush=True)
                if not a.rehearse:
                    command = ["python", "tests/bench_processes.py", *sys.argv[1:]]
                    about = origin(found["device"], command, SEED, ROUNDS)
                    key = ("case", "kind", "gpus", "processes", "device")
                    write_rows(a.results / "process_speed.csv", [row], key, about)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("model", "measure", "work"))
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", help="a data set; default: the sample set")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--timeout", type=int, default=240, help="seconds of one configuration")
    parser.add_argument("--rehearse", action="store_true", help="CPU processes, a tiny network")
    parser.add_argument("--log", type=argparse.FileType("a"), default=os.devnull)
    for name, kind in (("--case", str), ("--images", int), ("--processes", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    a = parser.parse_args()
    {"model": model, "measure": measure, "work": work}[a.what](a)


if __name__ == "__main__":
    main()
