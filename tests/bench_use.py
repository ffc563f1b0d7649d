"""Measure what a user gets on GPUs: `effnet-train` on files from disk, from the command to its last line.

Beside it, in the same call, the bare step of the same network at the same micro-batch: forward, backward and optimizer
on one random batch that stays on the device. First each run is started for one training step: the first start with an
empty cache, the second with a full one, then all the others side by side, so that all is compiled. Then they are
measured one after the other, each a process of its own. Rows go to results/gpu_use.csv as they come. Without a GPU: a
message.

    python tests/bench_use.py [--resident FOLDER] [--images FOLDER] [--only REGEX] [--gpus 1 4]

--resident  a data set that fits on the device, its records repeated; it is decoded once and stays there
--images    a small set of original photographs (TFRecords); its records are repeated until they no longer fit, as they
            are and packed; PyTorch reads them, too (torch_feed.py)
--gpus      of one process; more than one are compared with one, at the same global batch
--only      regular expression over the names of the rows ("start" = the first starts; "torch alone" = only read)
--compile   measure nothing: do a training step of each run, so that a later call finds all compiled
--turns     start all runs side by side; each waits, once it is compiled, for its turn: less time in all, and no seconds
            of whole commands. Those of more GPUs come first
--after     with --turns: measure when this file is there
"""

import argparse
import contextlib
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from effnet_repro.config import for_one_device, get_case, override  # noqa: E402
from effnet_repro.results import origin, portable  # noqa: E402
from tests import bench_gpu, bench_sets, start_stages  # noqa: E402

SEED = bench_gpu.SEED
CASE = "B0-G16-LN_PN-Half_16IPU_2x8"
LARGE = ("B4-G16-LN_PN-Half_16IPU_4x4", 60), ("B4-G16-LN_PN-Native_16IPU_4x4", 40)  # and steps
KEY = ("run", "case", "image_size", "global_batch_size", "gpus")
SMALL = ("--global-batch-size", "32", "--image-size", "96")
JAX_SHARE = 0.75  # Of a GPU's memory, which JAX takes unless told otherwise


class Measured(NamedTuple):
    "A command to measure"

    name: str
    case: str
    words: tuple  # Behind the case
    end: tuple = ()  # Words that end a run early
    gpus: int = 1
    sized: tuple = ()  # Image size and global batch, where `words` change them
    bare: bool = True  # Whether a bare step is measured beside it

    @property
    def as_is(self):  # The case, for one process
        case = for_one_device(get_case(self.case))
        if not self.sized:
            return case
        size, batch = self.sized
        return override(for_one_device(case, 1, batch), image_size=size)

    def bare_step(self, memory):
        "The bare step beside it: network, image size, batch, which is the largest micro-batch of so much memory"
        from effnet_repro.training.micro_batch import largest_micro_batch

        case = self.as_is
        most = largest_micro_batch(case, self.gpus, memory)
        return self.case.rpartition("_16IPU")[0], case.image_size, most


def run_command(one, run_dir, log, *more, stages=False, turn=None):
    """Run a command; returns its seconds, what it said (with when its `stages` were done), and the rows of metrics.csv.

    With `turn`, a folder, it waits there for its turn, as start_stages.py says.
    """
    devices = ",".join(str(i) for i in range(one.gpus))
    env = {**os.environ, "KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": devices}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    program = ["-m", "effnet_repro.cli"]
    if turn:
        env.update(BENCH_TURN=str(turn), XLA_PYTHON_CLIENT_PREALLOCATE="false")
    if stages or turn:
        program = [str(ROOT / "tests" / "start_stages.py"), str(time.time())]
    words = [sys.executable, *program, "train", one.case]
    words += ["--budget", "case", "--seed", str(SEED), *one.words, *more]
    words += ["--run-dir", str(run_dir), "--no-progress"]
    begin = time.perf_counter()
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=log, text=True)
    seconds = time.perf_counter() - begin
    log.write(done.stdout)
    log.flush()
    if done.returncode:
        raise RuntimeError(f"effnet-train ended with status {done.returncode}: {one}")
    with (run_dir / "metrics.csv").open(newline="") as file:
        return seconds, done.stdout, list(csv.DictReader(file))


def rates(rows, images):
    "Images a second inside the epochs after the first, and over them with what lies between"
    inside = [float(r["images_per_s"]) for r in rows[1:]] or [float(rows[0]["images_per_s"])]
    found = bench_gpu.spread(inside, "images_per_s")
    first, last = rows[0], rows[-1]
    took = float(last["seconds"]) - float(first["seconds"])
    steps = int(last["update"]) - int(first["update"])
    whole = round(steps * images / took, 1) if took > 0 else ""
    return {**found, "steps": steps or len(rows), "whole_epochs_images_per_s": whole}


def estimated(said):
    "Seconds of the last estimate that a run printed; None where there is none"
    found = re.findall(r"estimate \(measured\): ([\d.,]+) (\w+) in all", said)
    sizes = {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400}
    return float(found[-1][0].replace(",", "")) * sizes[found[-1][1]] if found else None


def validated(run_dir, data_dir, log):
    "Images a second that the weights of a run are measured with, in a process of its own"
    code = "import sys; from effnet_repro.training import validate; found = validate(*sys.argv[1:], weights='last')"
    code += "; print(found['last'].images_per_s, found['last'].pictures)"
    env = {**os.environ, "KERAS_BACKEND": "jax", "CUDA_VISIBLE_DEVICES": "0"}
    env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
    words = [sys.executable, "-c", code, str(run_dir), str(data_dir)]
    done = subprocess.run(words, env=env, stdout=subprocess.PIPE, stderr=log, text=True, check=True)
    speed, images = done.stdout.split()[-2:]
    return {"images_per_s": round(float(speed), 1), "steps": -(-int(images) // 512)}


def bare_steps(wanted, log, wait):
    "Images a second of bare steps, compiled side by side, measured after `wait`: {(network, size, batch): row}"
    rows = []
    for network, size, batch in wanted:
        settings = dict(model=network, size=size, batch=batch, mode="train")
        settings["env"] = {"CUDA_VISIBLE_DEVICES": "0"}
        rows.append((network, "ours", settings, 1))
    found = {}
    ready_ones = bench_gpu.together(rows, time.time() + 300, log)
    wait()
    for row, process, about in ready_ones:
        ready, batch = bench_gpu.ask(process), row[2]["batch"]
        seconds = [bench_gpu.ask(process) for _ in range(5)]
        process.kill()
        process.wait()
        speed = bench_gpu.spread([batch / t for t in seconds], "images_per_s")
        about = {k: v for k, v in about.items() if k != "largest_micro_batch"}
        found[(row[0], row[2]["size"], batch)] = {**speed, **about, **ready}
    return found


def commands(a, work):
    "What is measured"
    found = []
    few = lambda steps: ("--max-steps", str(steps), "--no-validation")
    stored = lambda folder: ("--data-dir", str(work / folder))
    if a.images:
        cores = ("--decoder", "simplejpeg")
        found += [Measured("photographs", a.case, stored("photographs"), few(a.steps))]
        words = *stored("photographs"), *cores
        found += [Measured("photographs, cores alone", a.case, words, few(a.steps))]
        for case, steps in LARGE:
            found.append(Measured("photographs", case, stored("photographs"), few(steps)))
        for form in PACKED:
            found.append(Measured(f"packed, {form}", a.case, stored(form), few(a.steps)))
        words = *stored("jpeg 256"), "--decoder", "nvimagecodec"
        found.append(Measured("packed, jpeg 256, GPU", a.case, words, few(a.steps)))
    if a.resident:
        resident = ("--data-dir", str(work / "resident"), "--epochs", str(a.epochs))
        small = ("--data-dir", str(a.resident), "--epochs", "2", *SMALL)
        found += [Measured("resident set, defaults", a.case, resident)]
        found += [Measured("resident set, small batches", a.case, small, sized=(96, 32))]
        for n in a.gpus if len(a.gpus) > 1 else ():
            for whole in a.global_batches:
                words = (*resident, "--global-batch-size", str(whole))
                if n > 1 or whole != 768 or a.case != CASE:  # else they are the defaults
                    sized = get_case(a.case).image_size, whole
                    name, end = f"resident set, batch {whole}", ("--no-validation",)
                    found.append(Measured(name, a.case, words, end, n, sized, False))
    return [one for one in found if re.search(a.only, f"{one.name}, {one.case}")]


PACKED = {"jpeg 256": ("--short-side", "256"), "raw 192": ("--short-side", "192", "--form", "raw")}


def make_sets(a, work, chosen):
    "Write the data sets that the chosen commands read"
    used = {
        name
        for one in chosen
        for name in ("resident", "photographs", *PACKED)
        if str(work / name) in one.words
    }
    if "resident" in used:
        bench_sets.repeat_records(a.resident, work / "resident", a.resident_records, 2500)
    if "photographs" in used:
        bench_sets.repeat_records(a.images, work / "photographs", a.records, a.records // 2)
    for name in used & set(PACKED):
        words = [sys.executable, "-m", "effnet_repro.cli", "pack", str(work / f"once {name}")]
        words += [*PACKED[name], "--data-dir", str(a.images)]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
        subprocess.run(words, env=env, check=True, stdout=subprocess.DEVNULL)
        repeat = bench_sets.repeat_raw if "raw" in name else bench_sets.repeat_records
        repeat(work / f"once {name}", work / name, a.packed_records, 100)


def gpu_memory():
    "Bytes of the first GPU that JAX will take"
    ask = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    found = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    return JAX_SHARE * float(found[0]) * 2**20


def measure(a, device):
    "Measure starts, bare steps and runs, and write a row of each"
    command = ["python", "tests/bench_use.py", *sys.argv[1:]]
    about = {"flags": bench_gpu.FLAGS, **origin(device, command, SEED, 1, bench_gpu.versions())}
    about["call"] = datetime.datetime.now().isoformat(timespec="minutes")
    table = bench_gpu.Table(a.results / "gpu_use.csv", KEY, about)

    def write(name, case, row):
        table.add({"run": name, "case": case, **row})
        share = f"{row['of_bare_step']:.3f} of the bare step" if "of_bare_step" in row else ""
        print(
            f"{name:32} {case[:24]:24} {row.get('images_per_s', ''):>9} {row.get('command_s', ''):>6} s {share}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as folder, open(
        os.environ.get("BENCH_LOG", os.devnull), "a"
    ) as log:
        work, memory = Path(folder), gpu_memory()
        os.environ.setdefault("EFFNET_REPRO_CACHE", str(work / "cache"))
        chosen = commands(a, work)
        make_sets(a, work, chosen)
        if a.resident and re.search(a.only, "start"):
            _first_starts(a, work, log, write)
        turns, start, bare = [], None, {}

        def tell(one, report):
            try:
                case, found = report()
            except RuntimeError as error:
                print(f"failed: {error}", flush=True)
                return None
            key = one.bare_step(memory)
            if key in bare and case["micro_batch_size"] == key[2]:
                share = found["images_per_s"] / (bare[key]["images_per_s"] * one.gpus)
                found["of_bare_step"] = round(share, 3)
            sizes = "image_size", "global_batch_size", "micro_batch_size"
            shown = {n: case[n] for n in sizes}
            write(one.name, one.case, {**shown, "gpus": one.gpus, **found})
            return shown

        if a.turns:  # their rows come twice: the bare steps follow
            told = lambda one, future: tell(one, future.result)
            start = lambda: turns.extend(in_turns(chosen, memory, work, log, a.after, told))
        bare.update(_side_by_side(chosen, memory, work, log, write, a.compile, start))
        for i, one in enumerate(() if a.compile else chosen):
            alone = lambda i=i, one=one: _report(one, work / f"run{i}", log)
            shown = tell(one, turns[i].result if turns else alone)
            asked = one.name == "photographs" and one.case == a.case
            if shown and asked and re.search(a.only, "validation"):
                found = validated(work / f"run{i}", work / "photographs", log)
                write("photographs, validation", one.case, {**shown, "gpus": 1, **found})
        if a.images:
            torch_rows(a, work, log, write)


def torch_rows(a, work, log, write):
    "PyTorch on the same photographs"
    names = [("gpu", True), ("gpu", False), ("cores", True), ("cores", False)]
    matched = lambda name, trains: (
        f"PyTorch, decoded by the {name}" if trains else f"torch alone, {name}"
    )
    names = [one for one in names if re.search(a.only, matched(*one))]
    if names:
        bench_sets.image_folder(a.images, work / "folder", a.records)
    size = get_case(a.case).image_size
    for name, trains in names:
        network = "efficientnet_b0" if trains else ""
        words = [sys.executable, str(ROOT / "tests" / "torch_feed.py"), name, str(work / "folder")]
        words += ["--size", str(size), "--network", network]
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=log, text=True)
        log.write(done.stdout)
        if done.returncode:
            print(f"failed: torch_feed.py {name} {network}", flush=True)
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        about = f"PyTorch, decoded by the {name}" + ("" if network else ", reader alone")
        found = {"image_size": size, "gpus": 1, **found}
        write(about, f"timm {network}" if network else "", found)


def _report(one, folder, log, turn=None):
    "Run a command to its end: its case, and what it measured"
    seconds, said, rows = run_command(one, folder, log, *one.end, turn=turn)
    case = json.loads((folder / "config.json").read_text())["case"]
    found = rates(rows, case["global_batch_size"])
    if turn is None:
        found = {"command_s": round(seconds, 1), **found}
    if turn is None and (guess := estimated(said)):
        found["estimate_of_command"] = round(guess / seconds, 2)
    if decoder := re.search(r"decoded by (\w+)", said):
        found["jpeg_decoder"] = decoder[1]
    found["ran"] = portable(["effnet-train", one.case, "--budget", "case", *one.words, *one.end])
    return case, found


def _first_starts(a, work, log, write):
    "One training step on the set that stays on the device, with nothing compiled and with everything"
    quick = Measured("start", a.case, ("--data-dir", str(a.resident)))
    case = get_case(a.case)
    shown = dict(image_size=case.image_size, global_batch_size=case.global_batch_size, gpus=1)
    kept, os.environ["EFFNET_REPRO_CACHE"] = os.environ["EFFNET_REPRO_CACHE"], str(work / "empty")
    for name in ("start, cache empty", "start, cache full"):
        words = "--max-steps", "1", "--no-validation"
        seconds, said, _ = run_command(quick, work / name, log, *words, stages=True)
        stages = json.loads(said.rpartition(start_stages.PREFIX)[2])
        found = {"command_s": round(seconds, 1), "first_step_s": stages["step"], "steps": 1}
        write(name, a.case, {**shown, **found, "stages": json.dumps(stages)})
    os.environ["EFFNET_REPRO_CACHE"] = kept


def _starting(pool, chosen, memory, work, log):
    "Begin a training step of each run, all side by side, so that all is compiled; a future for each"
    kinds = {_program(one, memory): one for one in chosen}

    def start(i, one):  # where they need too much memory together, it is compiled all the same
        with contextlib.suppress(RuntimeError):
            run_command(one, work / f"start{i}", log, "--max-steps", "1", "--no-validation")

    return [pool.submit(start, i, one) for i, one in enumerate(kinds.values())]


def in_turns(chosen, memory, work, log, after, tell):
    """Compile all, then let one after the other go on, those of more GPUs first; a future for each, which `tell` takes.

    Of runs with the same program the first one compiles it, and the others find it compiled.
    """
    turns, leaders = [work / f"turn{i}" for i in range(len(chosen))], {}
    for turn, one in zip(turns, chosen):
        turn.mkdir()
        leaders.setdefault(_program(one, memory), turn)

    def start(i, one, turn):
        leader = leaders[_program(one, memory)]
        while leader != turn and not (leader / "compiled").exists():
            time.sleep(0.1)
        try:
            return _report(one, work / f"run{i}", log, turn)
        finally:
            (turn / "compiled").touch()  # or failed

    with ThreadPoolExecutor(len(chosen) or 1) as pool:
        done = [pool.submit(start, i, *pair) for i, pair in enumerate(zip(chosen, turns))]
        ready = lambda: all((turn / "compiled").exists() for turn in turns)
        while not ready() or not (after is None or after.exists()):
            time.sleep(0.1)
        for i in sorted(range(len(chosen)), key=lambda i: -chosen[i].gpus):
            (turns[i] / "go").touch()
            wait([done[i]])
            tell(chosen[i], done[i])
    return done


def _program(one, memory):
    "What stands for the compiled training step of a run"
    return one.bare_step(memory), one.gpus, "resident" in one.name


def _side_by_side(chosen, memory, work, log, write, alone=False, instead=None):
    """One training step of each run, or what `instead` does, so that all is compiled; beside it the bare steps,
    unless `alone`.

    A single run with no bare step beside it needs none of it: its first epoch is not measured.
    Bare steps are measured when all is still. Returns their rows by `Measured.bare_step`.
    """
    wanted = sorted({one.bare_step(memory) for one in chosen if one.bare and not alone})
    if len(chosen) == 1 and not wanted and not alone and instead is None:
        return {}
    before = os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # while they share GPUs
    with ThreadPoolExecutor(len(chosen) + 1) as pool:
        started = []
        bare = pool.submit(bare_steps, wanted, log, lambda: [f.result() for f in started])
        if instead is None:
            started += _starting(pool, chosen, memory, work, log)
        else:
            started.append(pool.submit(instead))
        found = bare.result()
    os.environ.pop("XLA_PYTHON_CLIENT_PREALLOCATE") if before is None else None
    for (network, size, batch), row in found.items():
        alone = dict(image_size=size, global_batch_size=batch, micro_batch_size=batch, gpus=1)
        (case, *_) = [one.case for one in chosen if one.case.startswith(network + "_")]
        write("bare step", case, {**alone, **row})
    return found


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--resident", type=Path, help="a set that fits on the device")
    p.add_argument("--images", type=Path, help="original photographs, TFRecords")
    p.add_argument("--case", default=CASE)
    p.add_argument("--epochs", type=int, default=4, help="of the resident set")
    p.add_argument(
        "--resident-records", type=int, default=75000, help="its records are repeated to so many"
    )
    p.add_argument("--steps", type=int, default=208, help="training steps on the photographs")
    p.add_argument("--only", default="", help="regular expression over the names of the runs")
    p.add_argument("--records", type=int, default=79872, help="photographs at least")
    p.add_argument("--packed-records", type=int, default=79872)
    p.add_argument("--gpus", type=int, nargs="+", default=[1], help="numbers of GPUs to compare")
    p.add_argument("--global-batches", type=int, nargs="+", default=[768, 3072])
    p.add_argument("--compile", action="store_true", help="only compile the runs, for a later call")
    p.add_argument("--turns", action="store_true", help="compile side by side, measure in turns")
    p.add_argument("--after", type=Path, help="with --turns: wait for this file")
    p.add_argument("--results", type=Path, default=ROOT / "results")
    a = p.parse_args()
    os.environ.setdefault("KERAS_BACKEND", "jax")
    found = bench_gpu.gpus()
    if not found:
        print("bench-use: there is no GPU here (nvidia-smi does not answer): nothing to measure")
        return
    a.resident = a.resident and a.resident.resolve()
    a.images = a.images and a.images.resolve()
    measure(a, found[0])


if __name__ == "__main__":
    main()
