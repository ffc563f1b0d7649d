"""What several processes cost: the bytes of a training step, modeled; and the speed of a step, measured on GPUs.

    python tests/bench_processes.py model --results results
    python tests/bench_processes.py measure --gpus 1 2 4 [--data FOLDER] --results results

`model` writes `process_traffic.csv`: bytes of the gradients of the six half-resolution cases, and how many GPUs may
train together until they take a tenth of a step. The rates of one GPU are those of `effnet-plan --device gpu`.

`measure` writes `process_speed.csv`: images a second of training steps as `effnet-train` does them, on images that
stay on the device, with one process a GPU, and beside it one process with as many GPUs. Each is the median of five
rounds: B0-Half and B4-Half with 768 images a step on any number of GPUs (strong), and B0-Half with 768 images a GPU
(weak), which needs a set of more than the 1,200 sample images. All settings start and compile side by side; then each
does its first steps and is measured while the others wait. `start_ms` is the time between the starts of two
steps, without the last step's end: close to a whole step where the device waits for Python. On a machine without GPUs,
`--rehearse` runs the same with CPU processes and a tiny network, and writes nothing.
"""

import argparse
import contextlib
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

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


# ---------------------------------------------------------------- modeled


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
    about = origin(f"modeled from {known['device']}", words, NO_SEED, 1)
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
    """One process of a measurement. It prints a JSON line once its step is compiled, waits for a line, so that others
    on the same GPUs can have their turn, and prints another of images a second of each round.
    """
    from effnet_repro.data import open_data
    from effnet_repro.distributed import ALONE, join_others
    from effnet_repro.training import configure, device_name
    from effnet_repro.training.compiled import keep_compiled
    from effnet_repro.training.micro_batch import divided_micro_batch, settle_micro_batch
    from effnet_repro.training.runtime import KerasRuntime

    configure()
    processes = join_others() if a.processes > 1 else ALONE
    keep_compiled()
    import jax

    case = settle_micro_batch(one_case(a.case, a.images, a.rehearse))
    if processes.count > 1:
        case = divided_micro_batch(case, jax.device_count())
    runtime = KerasRuntime(case, SEED, validates=False, processes=processes)
    data = runtime.settle(open_data(a.data, verbose=False), None)
    _wait_once_compiled()
    runtime.begin(data, 0, None)
    wait = lambda: float(runtime.advance(1).logs["loss"])
    for _ in range(4):
        wait()
    found, started = [], []
    for _ in range(ROUNDS + 1):
        begin = time.perf_counter()
        for _ in range(a.steps - 1):
            runtime.advance(1)
        started.append(1e3 * (time.perf_counter() - begin) / (a.steps - 1))
        wait()
        found.append(a.steps * case.global_batch_size / (time.perf_counter() - begin))
    processes.lead(lambda: None)
    micro = case.micro_batch_size
    row = {"rounds": found[1:], "device": device_name(), "micro_batch": micro}
    row.update(images=case.global_batch_size, start_ms=statistics.median(started[1:]))
    print(json.dumps(row), flush=True)
    runtime.close()
    processes.close()


def _wait_once_compiled():
    "Let a training step say that it is compiled, and wait for a line before it is done: it takes most of the memory"
    from effnet_repro.training import step
    from effnet_repro.training.device import has_jax_gpu, has_other_processes

    def wait():
        print(json.dumps({"ready_s": time.perf_counter() - begin}), flush=True)
        sys.stdin.readline()

    def compile_and_wait(*args, **how):
        function = compile_once(*args, **how)
        wait()
        return function

    begin, compile_once = time.perf_counter(), step.compile_once
    step.compile_once = compile_and_wait
    if not (has_jax_gpu() or has_other_processes()):  # Keras compiles by itself
        wait()


class Setting(NamedTuple):
    "What is measured"

    case: str
    kind: str  # "strong": 768 images a step on any number of GPUs; "weak": 768 a GPU
    gpus: int
    processes: int  # One, or one a GPU
    steps: int  # Of a round

    @property
    def images(self) -> int:  # Of a step
        return 768 * (self.gpus if self.kind == "weak" else 1)


class Started:
    "The processes of a setting; `compiled` is set once their step is, and `ready` holds what the first one said"

    def __init__(self, a, setting):
        self.setting, self.running = setting, []
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{one.getsockname()[1]}"
        words = ["--case", setting.case, "--images", setting.images, "--steps", setting.steps]
        words += ["--processes", setting.processes, *(["--data", a.data] if a.data else [])]
        words += ["--rehearse"] if a.rehearse else []
        for i in range(setting.processes):
            self._start(a, [sys.executable, __file__, "work", *map(str, words)], i, address)
        self.compiled, self.ready = threading.Event(), None
        threading.Thread(target=self._listen, daemon=True).start()

    def _start(self, a, words, i, address):
        one = self.setting
        env = {**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": _path()}
        env["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # several share a GPU
        if a.rehearse:
            env["XLA_FLAGS"] = FAST
        env["CUDA_VISIBLE_DEVICES"] = (
            str(i) if one.processes > 1 else ",".join(map(str, range(one.gpus)))
        )
        if one.processes > 1:
            env.update(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES=str(one.processes))
            env["JAX_PROCESS_ID"] = str(i)
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=a.log, text=True)
        self.running.append(subprocess.Popen(words, env=env, **pipes))

    def _listen(self):
        answers = [_answer(process) for process in self.running]
        self.ready = None if None in answers else answers[0]
        self.compiled.set()

    def measure(self):
        "Let all go on; what was found, or None where a process has ended"
        self.compiled.wait()
        if self.ready is None:
            return None
        for process in self.running:
            with contextlib.suppress(OSError):
                process.stdin.write("go\n")
                process.stdin.flush()
        found = _answer(self.running[0])
        return found and {**self.ready, **found}

    def end(self):
        "End all, and wait until their memory is free"
        for process in self.running:
            process.kill()
        for process in self.running:
            process.wait()


def _path():
    return f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"


def _answer(process):
    "The next line of JSON; None where the process has ended"
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    return None


def settings(a):
    "What is measured, in order"
    wanted = [(B0, "strong"), (B0, "weak"), (B4, "strong")]
    found = []
    for name, kind in wanted[:1] if a.rehearse else wanted:
        for gpus in a.gpus:
            if kind == "weak" and gpus == 1:
                continue  # the same as strong
            counts = {gpus} if a.one_each else {1} if a.one_process else {gpus, 1}
            for processes in sorted(counts, reverse=True):
                if not a.rehearse or processes == gpus:  # in a rehearsal a process has one CPU
                    steps = a.steps if name == B0 else max(2, a.steps // 3)
                    found.append(Setting(name, kind, gpus, processes, steps))
    return [one for one in found if re.search(a.only, f"{one.case} {one.kind}")]


def measure(a):
    """Write process_speed.csv, a row as soon as it is measured.

    All settings start and compile side by side; none is measured before all are ready, or `--latest` seconds are over.
    """
    begin, started = time.monotonic(), [Started(a, one) for one in settings(a)]
    left = lambda until: max(0, until - (time.monotonic() - begin))
    timer = threading.Timer(a.timeout, lambda: [one.end() for one in started])
    timer.start()
    try:
        for one in started:
            one.compiled.wait(left(a.latest))
        time.sleep(left(a.after))
        for one in sorted(started, key=lambda one: not one.compiled.is_set()):
            found = one.measure()
            one.end()
            if found is None:
                print(f"nothing measured (--log says why): {one.setting}", flush=True)
            else:
                _write(a, one.setting, found)
    finally:
        timer.cancel()
        for one in started:
            one.end()


def _write(a, one, found):
    "Write the row of a setting"
    speed = statistics.median(found["rounds"])
    row = {"case": one.case, "kind": one.kind, "gpus": one.gpus, "processes": one.processes}
    row.update(images=found["images"], micro_batch=found["micro_batch"])
    row.update(images_per_s=round(speed, 1), lowest=round(min(found["rounds"]), 1))
    row.update(highest=round(max(found["rounds"]), 1), steps=one.steps)
    row.update(ready_s=round(found["ready_s"], 1), start_ms=round(found["start_ms"], 2))
    print(row, flush=True)
    if not a.rehearse:
        command = ["python", "tests/bench_processes.py", *sys.argv[1:]]
        about = origin(found["device"], command, SEED, ROUNDS)
        key = ("case", "kind", "gpus", "processes", "device", "revision")
        write_rows(a.results / "process_speed.csv", [row], key, about)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("model", "measure", "work"))
    parser.add_argument("--results", type=Path, default=ROOT / "results")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--data", help="a data set; default: the sample set")
    parser.add_argument("--steps", type=int, default=20, help="of a round")
    parser.add_argument("--only", default="", help="regular expression over 'case kind'")
    parser.add_argument("--one-each", action="store_true", help="no process with several GPUs")
    parser.add_argument("--one-process", action="store_true", help="no more than one process")
    parser.add_argument("--timeout", type=int, default=400, help="seconds of all")
    parser.add_argument("--after", type=int, default=0, help="seconds before which no step is done")
    parser.add_argument(
        "--latest", type=int, default=300, help="seconds to wait for all to compile"
    )
    parser.add_argument("--rehearse", action="store_true", help="CPU processes, a tiny network")
    parser.add_argument("--log", type=argparse.FileType("a"), default=os.devnull)
    for name, kind in (("--case", str), ("--images", int), ("--processes", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    a = parser.parse_args()
    {"model": model, "measure": measure, "work": work}[a.what](a)


if __name__ == "__main__":
    main()
