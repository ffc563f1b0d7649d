"""One palette for the figures: an arm, a norm or a width of group has one color on every page.

The colors are those of Okabe and Ito, which color-blind readers can tell apart. `styles.css` has the
same ones for what is drawn by scripts, and a test compares the two. Resolution is shown by marker and
line, never by color, so that color stays with the arm.
"""

from typing import Any, Dict, NamedTuple

GRAY, BLUE, SKY = "#555555", "#0072b2", "#56b4e9"
ORANGE, GREEN, AMBER = "#d55e00", "#009e73", "#e69f00"

NORM_COLORS = {
    "batch norm": GREEN,
    "group norm": BLUE,
    "layer norm": SKY,
    "layer norm with Proxy Norm": ORANGE,
}
GROUP_COLORS = {"depthwise": GRAY, "groups of 16": BLUE, "dense": AMBER}


class Arm(NamedTuple):
    "How an arm of the paper is drawn and called"

    words: str  # What a legend says
    color: str  # As Matplotlib and CSS read it


ARMS: Dict[str, Arm] = {
    "G1-GN": Arm("depthwise, group norm", GRAY),
    "G16-GN": Arm("groups of 16, group norm", BLUE),
    "G16-LN_PN": Arm("groups of 16, layer norm with Proxy Norm", ORANGE),
}
RESOLUTIONS = {
    "Native": {"marker": "o", "linestyle": "-"},
    "Half": {"marker": "s", "linestyle": "--"},
}


def arm_style(
    arm: str,  # "G1-GN", "G16-GN" or "G16-LN_PN"; "LN+PN", as the published figure writes it, is the same
    resolution: str = "Native",  # "Native" (circles, solid) or "Half" (squares, dashed)
) -> Dict[str, Any]:
    "Return Matplotlib's keywords for the line of an arm: color, marker, line style and label"
    found = ARMS[arm.replace("+", "_")]
    label = found.words + (", half resolution" if resolution == "Half" else "")
    return {"color": found.color, "label": label, **RESOLUTIONS[resolution]}
