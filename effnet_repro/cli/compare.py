"""`effnet-compare`: two runs side by side."""

import json

from effnet_repro.cli.kit import format_table, program, user_path
from effnet_repro.messages import in_a_line
from effnet_repro.runs.compare import curves, differing, read_story, scores


def _compare_arguments(parser):
    parser.add_argument("a", metavar="A", type=user_path, help="folder of a run")
    parser.add_argument("b", metavar="B", type=user_path, help="folder of another run")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _short(value):
    "A value as a table shows it"
    if isinstance(value, float):
        return f"{value:g}" if value == round(value) else f"{value:.4f}"
    if isinstance(value, (list, tuple)):
        return in_a_line(" ".join(map(str, value)))
    return "-" if value is None else in_a_line(value)


def _table(rows):
    "Rows as a table, indented"
    return format_table([{k: _short(v) for k, v in row.items()} for row in rows], "  ")


@program(
    "compare",
    _compare_arguments,
    """
    effnet-compare runs/b0-native runs/b0-half
    effnet-compare runs/first runs/second --json
    """,
)
def compare_command(args):
    "Show two runs side by side: the fields that differ, the curves and the scores."
    a, b = read_story(args.a), read_story(args.b)
    parts = {"fields": differing(a, b), "curves": curves(a, b), "scores": scores(a, b)}
    if args.json:
        print(json.dumps({"a": a.name, "b": b.name, **parts}, indent=1))
        return
    print(f"a: {in_a_line(a.name)}\nb: {in_a_line(b.name)}")
    titles = {
        "fields": ("fields that differ", "no field differs"),
        "curves": ("curves", "neither has finished an epoch"),
        "scores": ("scores on the validation images", "neither was validated"),
    }
    for name, rows in parts.items():
        title, nothing = titles[name]
        print(f"\n{title}\n{_table(rows)}" if rows else f"\n{nothing}")
