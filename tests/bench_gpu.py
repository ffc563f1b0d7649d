"""Measure training and inference on a GPU beside the networks that one would pick instead.

Every contender is a process of its own. All of a wave compile first; then they take turns, one round each, so that
the machine's state is the same for all. Results go to results/gpu_speed.csv as they come. Without a GPU: a message.

    python tests/bench_gpu.py [--only REGEX] [--seconds 900] [--out results/gpu_speed.csv]
"""

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import threading
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "--xla_gpu_enable_triton_gemm=false"  # compiles in half the time; the products use cuBLAS
SIZES = {"B0": (224, 160, 256), "B4": (380, 252, 64)}  # native, half, pictures a step


def contenders():
    "(name, kind, settings, wave): B0 and B4 with their peers, then the other arms, then plain operations"
    rows = []
    for first, (size, (native, half, batch)) in enumerate(SIZES.items(), 1):
        peer = dict(model=f"efficientnet_{size.lower()}", size=native, batch=batch)
        rows += [
            (f"timm {peer['model']}, compiled", "torch", {**peer, "mode": m}, first)
            for m in ("train", "infer")
        ]
        for arm, wave in (("G16-LN_PN", first), ("G16-GN", first + 2), ("G1-GN", first + 2)):
            for part, side in (("Native", native), ("Half", half)):
                ours = dict(
                    model=f"{size}-{arm}-{part}",
                    size=side,
                    batch=batch * (2 if part == "Half" and size == "B4" else 1),
                )
                if arm == "G1-GN" and part == "Half":
                    continue  # not published
                rows.append((ours["model"], "ours", {**ours, "mode": "train"}, wave))
                if part == "Native":
                    rows.append((ours["model"], "ours", {**ours, "mode": "infer"}, wave))
        plain = dict(
            model=f"{size}-G16-LN_PN-Native", size=native, batch=batch, env={"EFFNET_KERNELS": "0"}
        )
        rows += [
            (f"{plain['model']}, plain operations", "ours", {**plain, "mode": m}, first + 4)
            for m in ("train", "infer")
        ]
    return rows


def ours(model, size, batch, mode, **_):
    "A function of n that runs n steps of one of our networks and waits for the last"
    os.environ.setdefault("KERAS_BACKEND", "jax")
    from dataclasses import replace

    import jax
    import jax.numpy as jnp
    import numpy as np

    from effnet_repro.config import for_one_device, get_case, load_cases, override
    from effnet_repro.gpu_ops import jax_ops
    from effnet_repro.network import fold_proxies, initial_weights, params, run, segments
    from effnet_repro.ops import Rng
    from effnet_repro.recipe import decay_mask, rmsprop_settings, rmsprop_step
    from effnet_repro.scaling import ModelSpec
    from effnet_repro.training import Program, micro_loss

    ops, rng = jax_ops(), np.random.default_rng(0)
    case = get_case(next(name for name in load_cases() if name.startswith(f"{model}_")))
    case = override(
        for_one_device(case, batch, batch), image_size=size, mixup_alpha=0.0, cutmix_lambda=None
    )
    spec = ModelSpec.from_case(case)
    images = jnp.asarray(rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
    weights = initial_weights(spec)
    if mode == "infer":
        if spec.proxy_norm:
            spec, weights = replace(spec, folded=True), fold_proxies(weights)
        weights = {k: jnp.asarray(v) for k, v in weights.items()}
        step = (
            jax.jit(lambda w, x: run(ops, spec, w, ops.cast(x, "bfloat16")))
            .lower(weights, images)
            .compile()
        )

        def steps(n):
            for _ in range(n):
                y = step(weights, images)
            y.block_until_ready()

        return steps, None
    program = Program(case, spec, tuple(s.name for s in segments(spec)), "bfloat16", 0)
    decays, labels = (
        decay_mask(params(spec)),
        jnp.asarray(rng.integers(0, 1000, batch, dtype=np.int32)),
    )
    constants = dict(learning_rate=1e-4, **rmsprop_settings(case))

    def update(state, images, labels, i):
        w, squares, momenta = state
        loss, grads = jax.value_and_grad(
            lambda w: micro_loss(ops, program, w, images, labels, {}, Rng(ops, 0, i, 0))[0]
        )(w)
        new = {
            n: rmsprop_step(
                ops,
                w[n],
                grads[n] + (case.weight_decay * w[n] if decays[n] else 0.0),
                squares[n],
                momenta[n],
                **constants,
            )
            for n in w
        }
        return tuple({n: v[k] for n, v in new.items()} for k in range(3)), loss

    weights = {k: jnp.asarray(v) for k, v in weights.items()}
    state = [
        (
            weights,
            {k: jnp.ones_like(v) for k, v in weights.items()},
            {k: jnp.zeros_like(v) for k, v in weights.items()},
        )
    ]
    step = jax.jit(update, donate_argnums=0).lower(state[0], images, labels, jnp.int32(0)).compile()
    memory, count = step.memory_analysis().temp_size_in_bytes / 2**30, [0]

    def steps(n):
        for _ in range(n):
            state[0], loss = step(state[0], images, labels, jnp.int32(count[0]))
            count[0] += 1
        assert np.isfinite(float(loss)), f"the loss after {count[0]} updates is {float(loss)}"

    return steps, memory


def torch_peer(model, size, batch, mode, **_):
    "The same for a network of timm: channels last, bfloat16 autocast, torch.compile, momentum"
    import timm
    import torch

    torch.backends.cudnn.benchmark = True
    net = timm.create_model(model).cuda().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device="cuda").to(
        memory_format=torch.channels_last
    )
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    net.train(mode == "train")
    run = torch.compile(lambda x: net(x.float().sub(120).div(58)))
    if mode == "infer":

        def steps(n):
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                for _ in range(n):
                    run(images)
            torch.cuda.synchronize()

        return steps, None
    optimizer = torch.optim.SGD(
        net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-5, fused=True
    )

    def steps(n):
        for _ in range(n):
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(run(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()

    return steps, None


def worker(kind, settings):
    "Compile, say so, then run a round for every line that comes in"
    begin = time.perf_counter()
    steps, memory = {"ours": ours, "torch": torch_peer}[kind](**settings)
    steps(2)
    compiled = time.perf_counter() - begin
    begin = time.perf_counter()
    steps(5)
    n = max(5, int(0.4 / ((time.perf_counter() - begin) / 5)))
    print(
        json.dumps({"compile_s": round(compiled, 1), "memory_gib": memory, "steps": n}), flush=True
    )
    for _ in sys.stdin:
        begin = time.perf_counter()
        steps(n)
        print(json.dumps((time.perf_counter() - begin) / n), flush=True)


def gpu():
    "The GPU's name, or None"
    ask = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.splitlines()[
            0
        ]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def versions():
    found = {}
    for package in ("jax", "torch", "timm", "keras"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return " ".join(f"{k} {v}" for k, v in found.items())


def start(kind, settings, log):
    env = {
        **os.environ,
        "XLA_FLAGS": FLAGS,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "TORCHINDUCTOR_COMPILE_THREADS": "4",
        **settings.get("env", {}),
    }
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    command = [sys.executable, __file__, "--worker", kind, json.dumps(settings)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        env=env,
        cwd=str(ROOT),
    )


def answer(process):
    "The next line of JSON that a worker prints, or None when it has ended"
    for line in process.stdout:
        if line[:1] in "{0123456789":
            return json.loads(line)
    return None


def measure(wave, deadline, rounds, log, write):
    "Compile a wave's contenders side by side, then let them take turns"
    running = [(row, start(row[1], row[2], log)) for row in wave]
    ready = {}
    wait = lambda i, p: ready.update({i: answer(p)})
    threads = [
        threading.Thread(target=wait, args=(i, p), daemon=True) for i, (_, p) in enumerate(running)
    ]
    for t in threads:
        t.start()
    while time.time() < deadline and any(t.is_alive() for t in threads):
        time.sleep(0.2)
    for i, (row, process) in enumerate(running):
        if not ready.get(i):
            print(
                f"left out: {row[0]}, {row[2]['mode']} (not compiled in time, or failed)",
                flush=True,
            )
            process.kill()
    print(
        "compiled:",
        {
            running[i][0][0] + " " + running[i][0][2]["mode"]: r["compile_s"]
            for i, r in ready.items()
            if r
        },
        flush=True,
    )
    times = {i: [] for i, r in ready.items() if r}
    for _ in range(rounds):
        for i in list(times):
            process = running[i][1]
            try:
                process.stdin.write("go\n")
                process.stdin.flush()
                value = answer(process)
            except BrokenPipeError:
                value = None
            if value is None:
                print(f"failed: {running[i][0][0]}", flush=True)
                times.pop(i)
            else:
                times[i].append(value)
    for i, seconds in times.items():
        write(running[i][0], ready[i], seconds)
    for _, process in running:
        process.kill()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression over 'name, mode'")
    parser.add_argument("--waves", default="1,2,3,4,5,6")
    parser.add_argument(
        "--seconds", type=float, default=1800, help="stop starting waves after this long"
    )
    parser.add_argument("--compile-seconds", type=float, default=400, help="for one wave")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", default=str(ROOT / "results" / "gpu_speed.csv"))
    parser.add_argument("--worker", nargs=2)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker[0], json.loads(args.worker[1]))
    device = gpu()
    if device is None:
        print(
            "bench-gpu: there is no GPU here (nvidia-smi does not answer), so there is nothing to measure"
        )
        return None
    begin, rows = time.time(), []
    about = dict(
        device=device, versions=versions(), date=datetime.date.today().isoformat(), flags=FLAGS
    )

    def write(row, ready, seconds):
        name, _, s, _ = row
        speed = [s["batch"] / t for t in seconds]
        memory = "" if ready["memory_gib"] is None else round(ready["memory_gib"], 2)
        rows.append(
            dict(
                name=name,
                mode=s["mode"],
                image_size=s["size"],
                batch=s["batch"],
                images_per_s=round(median(speed), 1),
                lowest=round(min(speed), 1),
                highest=round(max(speed), 1),
                rounds=len(speed),
                steps=ready["steps"],
                compile_s=ready["compile_s"],
                temporary_gib=memory,
                **about,
            )
        )
        with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(
            f"{name:45} {s['mode']:6} {s['size']:4} px {median(speed):10,.0f} images/s "
            f"({min(speed):,.0f} to {max(speed):,.0f})",
            flush=True,
        )

    with open(os.environ.get("BENCH_LOG", os.devnull), "w") as log:
        for wave in args.waves.split(","):
            chosen = [
                r
                for r in contenders()
                if r[3] == int(wave) and re.search(args.only, f"{r[0]}, {r[2]['mode']}")
            ]
            if chosen and time.time() - begin < args.seconds:
                measure(chosen, time.time() + args.compile_seconds, args.rounds, log, write)
    return None


if __name__ == "__main__":
    main()
