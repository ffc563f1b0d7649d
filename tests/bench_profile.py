"""Where a step's time goes, and where compiling it goes: the part `profile` of bench_gpu.py.

Each network is compiled in a process of its own, alone on the machine's cores, and a few of its steps are traced by the
profiler: times are those of the device. Writes gpu_profile.csv, a row for each kind of kernel, and gpu_compile.csv into
the folder that is named.

    python tests/bench_profile.py results [REGEX]
"""

import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from effnet_repro.kernels.ops import XLA_FLAGS  # noqa: E402
from effnet_repro.results import origin, write_rows  # noqa: E402

STEPS = 8  # That are traced
SUBJECTS = [  # network, image size, images a step, mode
    ("B0-G16-LN_PN-Native", 224, 256, "train"),
    ("B0-G16-LN_PN-Half", 160, 512, "train"),
    ("B4-G16-LN_PN-Native", 380, 64, "train"),
    ("B0-G16-LN_PN-Native", 224, 256, "infer"),
]
KINDS = {  # The kernel's function, or a pattern of the library's names -> what a reader calls it
    "conv_rows": "group convolutions and their input gradients",
    "weight_parts": "weight gradients of group convolutions",
    "moments|apply|pool|sums|input_gradient": "norms with swish, proxy, gate and residual",
    "gram|gram_moments|product_apply|walk|add_thin|patches": "expansions made again, and the stem",
    "apply_product|narrow_sums|narrow_gradient": "projections that make their factor again",
    "coefficients|finish|proxy|proxy_backward": "tables of the norms, proxies",
    "nvjet.*|.*gemm.*|.*splitK.*|.*cutlass.*": "matrix products of the library",
}
OTHER = "other small programs: optimizer, gate, sums of parts"
EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "xla_s",
}


def kind_of(kernel):
    "What kind a kernel of the trace is"
    name = re.sub(r"(_+\d+)+$", "", kernel)
    return next((kind for p, kind in KINDS.items() if re.fullmatch(p, name)), OTHER)


def by_kind(events, steps):
    "Kind -> [ms, kernels] a step, from the events of a trace"
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
    threads = {
        (e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"
    }
    found = defaultdict(lambda: [0.0, 0.0])
    for e in events:
        on_gpu = "GPU" in names.get(e.get("pid"), "")
        if e.get("ph") == "X" and on_gpu and "Stream" in threads.get((e["pid"], e["tid"]), ""):
            one = found[kind_of(e["name"])]
            one[0], one[1] = one[0] + e["dur"] / 1e3 / steps, one[1] + 1 / steps
    return dict(found)


def worker(model, size, batch, mode):
    "Compile, trace, and print what was found"
    import jax

    spent, begin = defaultdict(float), time.perf_counter()

    def listen(name, seconds, **_):
        if name in EVENTS:
            spent[EVENTS[name]] += seconds

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.devices()
    import gpu_contenders

    ready = time.perf_counter()
    steps = gpu_contenders.ours(model, size, batch, mode)
    compiled = time.perf_counter()
    steps(3)
    begin_steps = time.perf_counter()
    steps(4 * STEPS)
    step_ms = (time.perf_counter() - begin_steps) / (4 * STEPS) * 1e3
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            steps(STEPS)
        (file,) = Path(folder).rglob("*.trace.json.gz")
        with gzip.open(file) as trace:
            found = by_kind(json.load(trace)["traceEvents"], STEPS)
    times = {k: round(v, 1) for k, v in spent.items()}
    times.update(start_s=round(ready - begin, 1), compile_s=round(compiled - ready, 1))
    print(json.dumps(dict(kinds=found, step_ms=step_ms, times=times)), flush=True)


def main(folder, only=""):
    names = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        device = subprocess.run(names, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        sys.exit("bench-gpu profile: there is no GPU here, so there is nothing to measure")
    env = {"XLA_FLAGS": XLA_FLAGS, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    command = ["python", "tests/bench_profile.py", "results", *([only] if only else [])]
    for subject in SUBJECTS:
        if not re.search(only, f"{subject[0]}, {subject[3]}"):
            continue
        words = [sys.executable, __file__, "--worker", json.dumps(subject)]
        done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"failed: {subject[0]}, {subject[3]}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        at = dict(zip(("name", "image_size", "batch", "mode"), subject))
        about = {"flags": XLA_FLAGS, **origin(device.splitlines()[0], command, 0, STEPS)}
        step = round(found["step_ms"], 3)
        kinds = sorted(found["kinds"].items(), key=lambda k: -k[1][0])
        rows = [
            {**at, "kind": kind, "ms": round(ms, 4), "kernels": round(many, 1), "step_ms": step}
            for kind, (ms, many) in kinds
        ]
        keys = ("name", "image_size", "batch", "mode")
        write_rows(Path(folder) / "gpu_profile.csv", rows, (*keys, "kind"), about)
        cores = len(os.sched_getaffinity(0))
        times = {**at, **found["times"], "cores": cores}
        write_rows(Path(folder) / "gpu_compile.csv", [times], keys, about)
        print(at, found["times"], step, *rows, sep="\n  ", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    else:
        main(*sys.argv[1:])
