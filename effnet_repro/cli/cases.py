"""`effnet-cases`: list, filter and sort the cases, or show one."""

import json

from effnet_repro.cli.fields import config_arguments, named_case
from effnet_repro.cli.kit import UsageError, choice, format_arguments, one_line, print_rows, program
from effnet_repro.config import FIELDS, case_to_dict, load_cases, unknown_name
from effnet_repro.scaling import SIZE_TABLE, ModelSpec, count


def _case_row(case):
    "A case as a row of the list"
    spec = ModelSpec.from_case(case)
    size, cost = SIZE_TABLE[spec.size], count(spec)
    resolution = {size.native: "Native", size.half: "Half"}.get(case.image_size, "own")
    return {
        "case": case.name,
        "size": spec.size,
        "group_size": case.group_size,
        "expand_ratio": case.expand_ratio,
        "norm": case.norm,
        "resolution": resolution,
        "image_size": case.image_size,
        "micro_batch_size": case.micro_batch_size,
        "gradient_accumulation": case.gradient_accumulation,
        "num_stages": case.num_stages,
        "num_replicas": case.num_replicas,
        "global_batch_size": case.global_batch_size,
        "params": cost.params,
        "macs": cost.macs,
    }


def _brief_row(row):
    "A row that fits a terminal; the name says the rest"
    batch = ("micro_batch_size", "gradient_accumulation", "num_replicas")
    return {
        "case": row["case"],
        "image_size": row["image_size"],
        "micro x accumulation x replicas": " x ".join(str(row[k]) for k in batch),
        "stages": row["num_stages"],
        "million params": f"{row['params'] / 1e6:.2f}",
        "million macs": f"{row['macs'] / 1e6:,.0f}",
    }


_FILTERS = ("size", "group_size", "norm", "resolution", "num_stages", "num_replicas")


_COLUMNS = _FILTERS + (
    "case",
    "expand_ratio",
    "image_size",
    "micro_batch_size",
    "gradient_accumulation",
)
_COLUMNS += ("global_batch_size", "params", "macs")


def _cases_arguments(parser):
    parser.add_argument("case", nargs="?", metavar="CASE", help="show this one in full")
    for name in _FILTERS:
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, nargs="+", metavar="VALUE", help=f"only cases with this {name}")
    sort = choice("column", _COLUMNS)
    parser.add_argument("--sort", type=sort, metavar="COLUMN", help=f"one of {', '.join(_COLUMNS)}")
    parser.add_argument("--reverse", action="store_true", help="the largest first")
    format_arguments(parser)
    config_arguments(parser)


def _show_case(case, args):
    "One case, field by field, with its cost"
    fields = {**case_to_dict(case), "learning_rate": case.learning_rate}
    fields.update(rmsprop_decay=case.rmsprop_decay)
    fields.update({k: v for k, v in _case_row(case).items() if k in ("params", "macs")})
    if args.json:
        print(json.dumps(fields, indent=1))
        return
    about = {
        **{n: f.about for n, f in FIELDS.items()},
        "params": "Trainable, with 1,000 classes",
        "macs": "Of an image",
    }
    form = lambda v: " ".join(map(str, v)) if isinstance(v, list) else str(v)
    rows = [{"field": k, "value": form(v), "about": about.get(k)} for k, v in fields.items()]
    print_rows(rows, args)


@program(
    "cases",
    _cases_arguments,
    """
    effnet-cases
    effnet-cases --size B0 B1 --norm LN_PN --resolution Half
    effnet-cases --sort macs --csv > cases.csv
    effnet-cases B0-G16-LN_PN-Half_16IPU_2x8
    """,
)
def cases_command(args):
    "List, filter and sort the cases, or show one in full."
    if args.case:
        return _show_case(named_case(args.case, args.config_path), args)
    try:
        rows = [_case_row(case) for case in load_cases(args.config_path).values()]
    except (ValueError, OSError) as e:
        raise UsageError(one_line(e)) from None
    every = list(rows)
    for name in _FILTERS:
        wanted = getattr(args, name) or ()
        legal = list(dict.fromkeys(str(row[name]) for row in every))
        for value in wanted:
            if value not in legal:
                raise UsageError(str(unknown_name(name, value, legal)))
        rows = [row for row in rows if not wanted or str(row[name]) in wanted]
    if args.sort:
        rows.sort(key=lambda row: row[args.sort], reverse=args.reverse)
    if not rows:
        raise UsageError("No case fits all of these filters. Leave one out.")
    print_rows(rows, args, _brief_row)
