"""`effnet-plan`: lay a case out on IPUs, as modeled; or say how long it takes on GPUs."""

import argparse
import io
import json
import os

from effnet_repro.checkpoint import atomic_write
from effnet_repro.cli.fields import check_given, config_arguments, named_case
from effnet_repro.cli.kit import (
    UsageError,
    choice,
    format_table,
    program,
    real_number,
    user_path,
    whole_number,
)
from effnet_repro.config import CHOICES, override
from effnet_repro.scaling import ModelSpec


def _plan_arguments(parser):
    parser.add_argument("case", metavar="CASE", help="a published case; effnet-cases lists them")
    config_arguments(parser)
    parser.add_argument(
        "--device",
        type=choice("device", ("ipu", "gpu")),
        metavar="NAME",
        default="ipu",
        help="ipu, or gpu: hours of all epochs of ImageNet from measured rates",
    )
    parser.add_argument(
        "--gpus", type=whole_number, metavar="N", help="GPUs of one host; default: 1"
    )
    parser.add_argument("--reader", metavar="NAME", help="what feeds the GPUs; default: all")
    parser.add_argument(
        "--ipus", type=whole_number, metavar="N", help="IPUs in all; default: the case's (16)"
    )
    parser.add_argument(
        "--image-size", type=whole_number, metavar="N", help="pixels; default: the case's"
    )
    parser.add_argument(
        "--stages",
        type=whole_number,
        nargs="+",
        metavar="N",
        default=[1, 2, 4],
        help="numbers to try",
    )
    parser.add_argument(
        "--global-batch-size", type=whole_number, metavar="N", help="images in a weight update"
    )
    parser.add_argument(
        "--pipeline-schedule",
        type=choice("schedule", CHOICES["pipeline_schedule"]),
        metavar="NAME",
        help="Grouped, Interleaved or Sequential; default: the case's",
    )
    parser.add_argument(
        "--memory-mb", type=real_number, metavar="MB", default=900, help="of one IPU; default: 900"
    )
    parser.add_argument(
        "--figure", type=_figure, metavar="FILE", help="draw the plans as well: .png, .svg, .pdf"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def _plan_summary(found):
    "A modeled plan as plain values"
    laid_out = found.plan
    stages = [
        {
            "stage": i,
            "begins at": name,
            "forward ms": round(1e3 * found.forward_s[i], 3),
            "backward ms": round(1e3 * found.backward_s[i], 3),
            **{f"{k} MB": round(v[i] / 1e6, 1) for k, v in found.memory.items()},
            "total MB": round(found.stage_bytes[i] / 1e6, 1),
        }
        for i, name in enumerate(("block0", *laid_out.splits))
    ]
    return {
        "stages x replicas": f"{laid_out.num_stages} x {laid_out.num_replicas}",
        "micro-batch": laid_out.micro_batch_size,
        "accumulation": laid_out.gradient_accumulation,
        "schedule": laid_out.pipeline_schedule,
        "images/s": round(found.images_per_s, 1),
        "busy": round(found.busy, 3),
        "update ms": round(1e3 * found.update_s, 3),
        "fits": found.fits,
        "stages": stages,
    }


def _draw_stages(summary):
    "The stages as a table, with a bar as long as each one works"
    longest = max(s["forward ms"] + s["backward ms"] for s in summary["stages"])
    rows = []
    for s in summary["stages"]:
        forward, both = (round(24 * x / longest) for x in (s["forward ms"], s["backward ms"]))
        rows.append({**s, "f forward, b backward": "f" * forward + "b" * both})
    return format_table(rows, "  ")


_FIGURES = ("png", "svg", "pdf")


def _figure(text):
    "The name of a figure's file; its folder is made when the figure is drawn"
    path = user_path(text)
    if os.path.splitext(path)[1][1:].lower() not in _FIGURES:
        raise argparse.ArgumentTypeError(
            f"a figure is a .png, .svg or .pdf file. Received: {text!r}."
        )
    return path


def _draw_plans(found, path):
    "Draw plans below each other into a file"
    from effnet_repro.planner import plot_plan
    from effnet_repro.runs.metrics import plain_matplotlib

    with plain_matplotlib():
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure, image = Figure((9, 2.8 * len(found)), layout="constrained"), io.BytesIO()
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(found), 2, squeeze=False, sharey="col")
        for pair, (name, p) in zip(axes, found.items()):
            plot_plan(p, pair)
            pair[0].set_ylabel(f"{name}\n{pair[0].get_ylabel()}")
        figure.savefig(image, format=path.rpartition(".")[2].lower())
    atomic_write(path, image.getvalue())


_ONLY_GPU = ("gpus", "reader")
_ONLY_IPU = ("ipus", "stages", "global_batch_size", "pipeline_schedule", "memory_mb", "figure")


def _refuse_others(args):
    "Refuse flags that say nothing on the chosen device"
    given = vars(args).get("given_once", {})
    others, needed = (_ONLY_IPU, "ipu") if args.device == "gpu" else (_ONLY_GPU, "gpu")
    found = [f"--{name.replace('_', '-')}" for name in others if name in given]
    if found:
        raise UsageError(f"{' and '.join(found)}: for --device {needed}.")


def _on_gpus(args):
    "Print how long the case takes on GPUs"
    from effnet_repro.gpu_plan import plan_gpus, plan_rows

    case = named_case(args.case, args.config_path)
    if args.image_size is not None:
        check_given(image_size=args.image_size)
        case = override(case, image_size=args.image_size)
    gpus = 1 if args.gpus is None else args.gpus
    if gpus < 1:
        raise UsageError("--gpus must be at least 1.")
    try:
        rows = plan_rows(plan_gpus(case, gpus, args.reader or ""))
    except ValueError as e:
        raise UsageError(str(e)) from None
    if args.json:
        print(json.dumps({"case": case.name, "epochs": case.epochs, "plans": rows}, indent=1))
        return
    print(f"{case.name}, {case.image_size} px, {case.epochs:g} epochs of ImageNet")
    print(format_table(rows))
    print("rates of H100s with 16 cores each; projected ones were not measured")


def _both_plans(args):
    "The case, and the published plan (None where it does not apply) and the best, as modeled"
    from effnet_repro.planner import MK2, Plan, memory_warning, plan, predict

    case = named_case(args.case, args.config_path)
    given = lambda value, default: default if value is None else value
    num_ipus = given(args.ipus, case.num_stages * case.num_replicas)
    spec, chip = ModelSpec.from_case(case), MK2._replace(memory_bytes=1e6 * args.memory_mb)
    size = given(args.image_size, case.image_size)
    batch = given(args.global_batch_size, case.global_batch_size)
    check_given(image_size=size, global_batch_size=batch)
    if min(num_ipus, *args.stages) < 1 or args.memory_mb <= 0:
        raise UsageError("--ipus and --stages must be at least 1, --memory-mb above 0.")
    name = args.pipeline_schedule or case.pipeline_schedule
    asked = (num_ipus, size, batch, name)
    own = (case.num_stages * case.num_replicas, case.image_size, case.global_batch_size)
    found = {}
    if asked == (*own, case.pipeline_schedule):
        found["published plan"] = predict(spec, Plan.from_case(case), chip=chip)
    choices = dict(global_batch_size=batch, stages=tuple(args.stages), pipeline_schedule=name)
    try:
        found["best plan"] = plan(spec, size, num_ipus, chip=chip, **choices)
    except ValueError as e:
        raise UsageError(str(e)) from None
    notes = [f"{k}: {memory_warning(p)}" for k, p in found.items() if not p.fits]
    return f"{spec.name}, {size} px, {num_ipus} IPUs, {batch} images a step", found, notes


@program(
    "plan",
    _plan_arguments,
    """
    effnet-plan B4-G16-LN_PN-Native_16IPU_4x4
    effnet-plan B4-G16-LN_PN-Native_16IPU_4x4 --ipus 64 --image-size 300
    effnet-plan B0-G16-LN_PN-Half_16IPU_2x8 --stages 2 4 --json
    effnet-plan B5-G16-GN-Native_16IPU_4x4 --figure plan.png
    effnet-plan B0-G16-LN_PN-Half_16IPU_2x8 --device gpu
    """,
)
def plan_command(args):
    "Plan a pipeline: the published plan of a case and the fastest that fits, as modeled."
    _refuse_others(args)
    if args.device == "gpu":
        return _on_gpus(args)
    title, found, notes = _both_plans(args)
    summaries = {k: _plan_summary(p) for k, p in found.items()}
    if args.figure:
        _draw_plans(found, args.figure)
    if args.json:
        print(json.dumps({"modeled": title, **summaries, "notes": notes}, indent=1))
        return
    print(f"{title}. All numbers are modeled, none is measured.")
    for name, summary in summaries.items():
        facts = ", ".join(f"{k} {v}" for k, v in summary.items() if k not in ("stages", "fits"))
        print(f"\n{name}: {facts}\n{_draw_stages(summary)}")
    print("".join(f"\nnote: {n}" for n in notes), end="\n" if notes else "")
