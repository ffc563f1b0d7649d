"""`effnet-doctor`: what is installed, what it runs on, and what a case would cost.

The trial runs a few micro-batches of the real training step on the real images; a weight update is
`gradient_accumulation` of them.
"""

import contextlib
import importlib.util
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

from effnet_repro import __version__
from effnet_repro.cli.fields import config_arguments, field_arguments
from effnet_repro.cli.kit import UsageError, choice, one_line, program
from effnet_repro.cli.options import (
    BUDGETS,
    data_arguments,
    machine_arguments,
    precision_of,
    reading_of,
    start_keras,
)
from effnet_repro.cli.resolve import open_data_of, plan_training, show_plan
from effnet_repro.cli.streams import tell
from effnet_repro.config import CHOICES, override
from effnet_repro.runs import Options, check_run, notes_on, suppress_stderr


def _installed():
    "Package -> version, of what matters here"
    found = {"python": platform.python_version(), "effnet_repro": __version__}
    names = ("numpy", "safetensors", "keras", "tensorflow", "tensorflow-cpu", "jax", "torch")
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _tensorflow_devices():
    "Devices of TensorFlow, and whether a group convolution trains on them"
    import tensorflow as tf

    x, kernel = tf.ones((1, 4, 4, 32)), tf.ones((3, 3, 16, 32))
    with tf.GradientTape() as tape:
        tape.watch(kernel)
        y = tf.nn.conv2d(x, kernel, 1, "SAME")
    tape.gradient(y, kernel).numpy()
    return ", ".join(
        d.name.split("physical_device:")[-1] for d in tf.config.list_physical_devices()
    )


def _jax_devices():
    import jax

    return ", ".join(str(d) for d in jax.devices())


def _backends(problems):
    "Backend -> its devices, or what is wrong with it"
    found = {}
    for name, devices in (("tensorflow", _tensorflow_devices), ("jax", _jax_devices)):
        if importlib.util.find_spec(name) is None:
            found[name] = "not installed"
            continue
        try:
            found[name] = devices()
        except (
            Exception
        ) as e:  # whatever a broken installation raises is what the user needs to read
            found[name] = f"does not work: {one_line(e)}"
            problems.append(f"{name} {found[name]}")
    if all(v == "not installed" for v in found.values()):
        problems.append("no backend. In the project's folder, run: pip install -e '.[keras]'")
    return found


def _settings():
    "Environment variables that change speed or bits, and what unset means"
    unset = {
        "KERAS_BACKEND": "the first backend that is installed",
        "TF_ENABLE_ONEDNN_OPTS": "oneDNN on (x86 Linux)",
        "TF_NUM_INTEROP_THREADS": "set to 1 by effnet_repro: runs repeat to the bit",
        "TF_OVERRIDE_GLOBAL_THREADPOOL": "set to 1 by effnet_repro: each core classifies its part",
        "OMP_NUM_THREADS": "all cores",
        "XLA_FLAGS": "none",
        "DATA_DIR": "the built-in sample set",
        "CONFIG_PATH": "the published cases",
        "EFFNET_REPRO_CACHE": "~/.cache/effnet_repro",
    }
    return {k: os.environ.get(k) or f"unset: {v}" for k, v in unset.items()}


def _trial(case, data, precision, updates=3):
    "Time the training step of `case`, one micro-batch a step; returns measured facts"
    from effnet_repro.efficientnet import build_model
    from effnet_repro.training import TrainingModel
    from effnet_repro.training import updates as feed
    from effnet_repro.training.device import plain_keras
    from effnet_repro.training.runtime import make_program
    from effnet_repro.training.steps import compiled_steps

    one = override(case, global_batch_size=case.micro_batch_size, gradient_accumulation=1)
    program = make_program(one, data, precision, 0)
    network = build_model(program.spec, image_size=one.image_size, dtype="float32", seed=0)
    model, times = TrainingModel(network, program), [time.perf_counter()]
    with plain_keras():
        steps = compiled_steps(model, feed(one, data, 0))
        for _ in range(updates + 1):
            float(steps.do()["loss"])  # waits until the step is done
            times.append(time.perf_counter())
    seconds = statistics.median(b - a for a, b in zip(times[1:], times[2:]))
    return {
        "first micro-batch, with compilation (s)": round(times[1] - times[0], 2),
        "micro-batch (s)": round(seconds, 3),
        "images per second": round(case.micro_batch_size / seconds, 1),
        "peak memory (GiB)": _peak_memory_gib(),
    }


def _peak_memory_gib():
    "Of this process so far; not the accelerator's"
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2 ** (30 if sys.platform == "darwin" else 20), 2)


def _cost(plan, data, args):
    "What the planned run would take here: modeled, then measured"
    from effnet_repro.training.estimation import estimate, memory_warning
    from effnet_repro.training.memory import found_gib

    e = estimate(plan.case, data)
    cost = {"training steps": e["updates"], "epochs": plan.case.epochs}
    cost["images a step"] = plan.case.global_batch_size
    cost["modeled: training step (s)"] = round(e["seconds_per_update"], 3)
    cost["modeled: memory (GiB)"] = round(e["memory_gib"], 2)
    cost["memory here (GiB)"] = round(found_gib() or 0, 1) or "unknown"
    if warning := memory_warning(plan.case):
        cost["not tried"] = warning
    elif not args.no_trial:
        tell(
            "effnet-doctor: compiling the network and measuring some training steps, which may take minutes; "
            "--no-trial leaves it out"
        )
        trial = _trial(plan.case, data, precision_of(args))
        seconds = trial["micro-batch (s)"] * plan.case.gradient_accumulation
        cost.update({f"measured: {k}": v for k, v in trial.items()})
        cost["measured: training step (s)"] = round(seconds, 3)
        cost["measured: whole run (hours)"] = round(seconds * e["updates"] / 3600, 3)
    return cost


def _doctor_arguments(parser):
    parser.add_argument(
        "case", nargs="?", metavar="CASE", help="say what this case would cost, too"
    )
    parser.add_argument("--config", metavar="CASE", help="the same, as published")
    config_arguments(parser)
    data_arguments(parser)
    parser.add_argument(
        "--budget",
        type=choice("budget", BUDGETS),
        default="auto",
        metavar="NAME",
        help="as in effnet-train",
    )
    machine_arguments(parser, CHOICES["precision"])
    parser.add_argument("--no-trial", action="store_true", help="model the cost only")
    parser.add_argument("--json", action="store_true", help="print JSON")
    field_arguments(parser)


class _Report(dict):
    "Title -> facts, each printed as soon as it is known, unless all of it is to be JSON"

    def __init__(self, silent):
        super().__init__()
        self.silent = silent

    def __setitem__(self, title, facts):
        super().__setitem__(title, facts)
        if not self.silent:
            lines = [f"  {k:<26} {v}".rstrip() for k, v in facts.items()]
            print("", title, *lines, sep="\n", flush=True)


def _planned(args):
    "What the named case comes to; None where the data cannot be read, which the report says"
    try:
        return plan_training(args)
    except UsageError:
        raise
    except (OSError, ValueError):
        return None


@program(
    "doctor",
    _doctor_arguments,
    """
    effnet-doctor
    effnet-doctor --data-dir /data/imagenet
    effnet-doctor B0-G16-LN_PN-Half_16IPU_2x8 --budget case --micro-batch-size 32
    """,
)
def doctor_command(args):
    "Say what is installed, what data is found, and what a case would cost here; status 1 if something is wrong."
    plan = _planned(args) if args.case or args.config else None
    if plan and not args.json:
        show_plan(plan)
    problems, report = [], _Report(args.json)
    report["versions"], report["settings"] = _installed(), _settings()
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        starts = _starts(args, problems)
        with contextlib.nullcontext() if args.debug else suppress_stderr():
            report["backends"] = _backends(problems)
        report["not installed"] = _missing()
        report["cache"] = _cache(problems)
        data, report["data"] = _data(args, plan, problems)
        if plan and data:
            title = f"{plan.case.name}, budget {plan.budget}"
            report[title] = _run_of(args, plan, data, problems, starts)
    report["problems"] = {str(i): p for i, p in enumerate(problems, 1)} or {"none": ""}
    if args.json:
        print(json.dumps(report, indent=1))
    return 1 if problems else 0


def _starts(args, problems):
    "Whether Keras and its backend can be started; what is missing is a problem"
    try:
        start_keras(args)
    except Exception as e:  # whatever a broken installation raises is what the user needs to read
        problems.append(one_line(e))
        return False
    return True


#: What a run can do without: package -> what is lost.
_OPTIONAL = {
    "matplotlib": "figures",
    "tensorboard": "events",
    "tqdm": "the progress bar",
    "pandas": "tables of the notebooks",
    "PIL": "images other than JPEG (pip install pillow)",
    "skimage": "the built-in sample set (pip install scikit-image)",
    "sklearn": "the built-in sample set (pip install scikit-learn)",
    "papermill": "the run notebooks as commands",
    "simplejpeg": "the fast decoder of JPEGs without TensorFlow",
    "google_crc32c": "fast checksums of TFRecords",
}


def _missing():
    "Package that is not there -> what is lost without it"
    gone = {name: f"without it: {what}" for name, what in _OPTIONAL.items() if not _found(name)}
    return gone or {"nothing": ""}


def _found(package):
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _cache(problems):
    "Where the cache is, and whether it can be written"
    from effnet_repro.data.cache import cache_folder
    from effnet_repro.runs.preflight import check_folder

    try:
        folder = cache_folder()
        check_folder(folder)
        return {"folder": str(folder)}
    except (ValueError, OSError) as e:
        problems.append(f"cache: {one_line(e)} Everything is made anew each time.")
        return {"folder": "cannot be written"}


def _data(args, plan, problems):
    "The data set, None where it cannot be used, and what is said of it"
    from effnet_repro.data.decoders import DECODERS, is_installed
    from effnet_repro.runs.preflight import check_images

    try:
        known = plan and plan.resolved.data  # where the number of images decided the budget
        data = known or open_data_of(args, plan and plan.resolved.run_dir)
        check_images(data)
    except (ImportError, ValueError, OSError) as e:
        problems.append(one_line(e))
        return None, {"found": "nothing usable"}
    there = ", ".join(name for name in DECODERS[1:] if is_installed(name))
    notes = enumerate(notes_on(plan.case, data), 1) if plan else ()
    return data, {
        "found": data.describe().split("data: ", 1)[1],
        "decoders": there,
        **{f"note {i}": n for i, n in notes},
    }


def _run_of(args, plan, data, problems, starts):
    "What the planned run would take here; what it would be refused for is a problem"
    try:
        check_run(replace(plan.resolved, data=data), reading_of(args), Options())
        if not starts or any("does not work" in p for p in problems):
            return {"not tried": "see the problems"}
        return _cost(plan, data, args)
    except (ValueError, OSError, RuntimeError) as e:
        problems.append(one_line(e))
        return {"does not run": ""}
