"""Figures of the pages: their colors suit both themes."""

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / ".ci"))
import finish  # noqa: E402
import tree  # noqa: E402


def light_grays(notebook):
    "Grays of a notebook's figures that would glare on a dark page; white itself becomes the page"
    outputs = [o for c in notebook["cells"] for o in c.get("outputs", [])]
    drawn = "".join("".join(o.get("data", {}).get("image/svg+xml", [])) for o in outputs)
    found = re.findall(r"(?:fill|stroke): (#(d|e|f)[0-9a-f](?:\2[0-9a-f]){2})\b", drawn)
    grays = {c for c, _ in found if c[1:3] == c[3:5] == c[5:7] and c < "#fe"}
    return sorted(grays - set(finish.COLOURS))


def test_light_grays_follow_the_theme():
    found = {p.name: light_grays(json.loads(p.read_text("utf-8"))) for p in tree.notebooks()}
    assert {name: grays for name, grays in found.items() if grays} == {}
    one = {
        "data": {"image/svg+xml": "fill: #dddddd; stroke: #eeeeee; fill: #ddd0dd; fill: #fefefe"}
    }
    assert light_grays({"cells": [{"outputs": [one]}, {}]}) == ["#dddddd"]
