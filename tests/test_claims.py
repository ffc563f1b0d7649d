"""Sentences that claim something about the whole project are held to it."""

import csv
import json
import re
from pathlib import Path

from effnet_repro.intervals import judge_claims

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def cells(name, kind="markdown"):
    found = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(c["source"]) for c in found if c["cell_type"] == kind]


def shown(name):
    "What a page says and shows, in one text."
    found = json.loads((NBS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(c["source"]) for c in found if c["cell_type"] == "markdown")
    outputs = [o for c in found for o in c.get("outputs", [])]
    data = [v for o in outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return "\n".join([text, *map("".join, data)])


def departures(page):
    "(what, linked notebooks) of each row of the errata's table of departures"
    (text,) = [c for c in page if "## Where this project departs" in c]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [(r.split("|")[1].strip(), re.findall(r"\((\w+)\.ipynb\)", r)) for r in rows]


def test_departures_are_marked_ours_on_their_pages():
    found = departures(cells("96_errata"))
    assert len(found) >= 8
    pages = {p for _, linked in found for p in linked}
    unmarked = [p for p in sorted(pages) if not re.search(r"\bOurs\b", "\n".join(cells(p)))]
    assert unmarked == []
    assert departures(
        ["## Where this project departs\n\n|a|b|\n|-|-|\n| x | [p](1_p.ipynb) |"]
    ) == [("x", ["1_p"])]


def measured_rows():
    rows = [line for line in shown("index").splitlines() if line.startswith("| ")]
    return [row for row in rows if "| measured, " in row and "images/s" in row]


def test_ratios_on_home_name_peer_and_size():
    rows = [row for row in measured_rows() if re.search(r"\d times ", row)]
    assert len(rows) >= 4
    named = r"\d times (Keras'|timm's) EfficientNet-B0 at \d+ px"
    assert all(row.count(" times ") == len(re.findall(named, row)) for row in rows), rows
    assert any("at 224 px" in row and "EfficientNet-B0 at 160 px" in row for row in rows)


def test_speeds_on_home_say_what_the_timer_saw():
    what = re.compile(
        r"^\| (bare step|inference), |^\| `effnet-train`, .* within an epoch; \d+% of"
    )
    rows = measured_rows()
    assert len(rows) >= 6 and all(map(what.match, rows)), rows


def test_the_model_s_error_never_stands_without_its_caveat():
    said = {p.stem: shown(p.stem) for p in sorted(NBS.glob("*.ipynb"))}
    error = json.loads((ROOT / "results" / "pod16_model.json").read_text())["held_out"][
        "median_error"
    ]
    number = re.compile(rf"(?<![\d.]){100 * error:.1f} ?%|median_error")
    where = [name for name, text in said.items() if "POD16" in text and number.search(text)]
    assert {"index", "37_planner"} <= set(where)
    bare = [name for name in where if not re.search(r"twenty\s+forms", said[name])]
    assert bare == [] and "twenty forms" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_no_ratio_is_typed_into_the_pages_of_results():
    "Numbers with a unit of speed, and ratios, come from cells."
    typed = re.compile(r"\d[\d,.]* ?(images/s|pictures/s|times as fast|ms\b)|\b\d+\.\d+x\b")
    for name in ("index", "50_results", "51_throughput", "52_gpu"):
        assert [m[0] for text in cells(name) for m in typed.finditer(text)] == [], name


def test_the_words_about_the_paper_s_claims_are_the_verdicts():
    "Rows that change a verdict ask for other words on the two pages that speak of them."
    with (ROOT / "results" / "claims.csv").open(newline="") as file:
        verdicts = {j.claim.text: j.verdict for j in judge_claims(list(csv.DictReader(file)))}
    said = {
        "It beats plain layer norm and group norm": {
            "Proxy Norm beats plain layer norm": "holds",
            "layer norm with Proxy Norm beats group norm": "holds",
        },
        "With as many multiply-adds as at full size it is clearly better": {
            "half resolution keeps up at equal multiply-adds": "holds"
        },
        "it may be a little worse": {
            "native beats half resolution with fine-tuning": "cannot tell"
        },
        "Group convolutions of 16 are not free here": {
            "groups of 16 match depthwise convolutions": "does not hold"
        },
        "Batch norm is best when it sees 8 images": {
            "Proxy Norm beats batch norm of 8 images": "does not hold",
            "Proxy Norm matches batch norm of 32 images": "cannot tell",
            "Proxy Norm matches batch norm of 256 images": "does not hold",
            "Proxy Norm beats batch norm of 2 images": "holds",
        },
    }
    page = " ".join(shown("54_claims").split())
    for words, claims in said.items():
        assert words in page
        assert {c: verdicts[c] for c in claims} == claims, words
    summary = shown("50_results")
    assert all(claim in summary for claim in verdicts)
