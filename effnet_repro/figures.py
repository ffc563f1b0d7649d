"""One palette for the figures: an arm, a norm or a width of group has one color on every page.

The colors are those of Okabe and Ito, which color-blind readers can tell apart. `styles.css` has the
same ones for what is drawn by scripts, and a test compares the two. Resolution is shown by marker and
line, never by color, so that color stays with the arm.
"""

from typing import Any, Dict, NamedTuple, Tuple

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


def array_axes(
    plt,  # `matplotlib.pyplot`
    size: Tuple[float, float],  # Of the figure, inches
    title: str,  # The question that the figure answers
):  # Axes without ticks on which a step is as long to the right as upwards
    "Return axes for `draw_array`"
    ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax.set(xticks=[], yticks=[], title=title, aspect="equal")
    ax.spines[:].set_visible(False)
    return ax


def draw_array(
    ax,  # From `array_axes`
    place: Tuple[float, float],  # Left edge and upper edge
    shape: Tuple[int, int],  # Rows and columns, in tiles
    tile: Tuple[float, float],  # Height and width of a tile in the drawing
    filled=(),  # (first row, first column, rows, columns, color) of each part, in tiles
    words: Tuple[str, str] = ("", ""),  # Above and below
    stored: bool = True,  # False draws a dashed outline: the array is never in memory
):
    "Draw a two-dimensional array that is cut into tiles, with some of them filled"
    from matplotlib.patches import Rectangle

    (left, top), (rows, columns), (high, wide) = place, shape, tile
    for row, column, down, across, color in filled:
        corner = left + column * wide, top - (row + down) * high
        ax.add_patch(Rectangle(corner, across * wide, down * high, color=color, lw=0))
    right, bottom = left + columns * wide, top - rows * high
    cuts = {"color": "#808080", "lw": 0.5}
    ax.hlines([top - i * high for i in range(1, rows)], left, right, **cuts)
    ax.vlines([left + i * wide for i in range(1, columns)], bottom, top, **cuts)
    edge = {"fill": False, "ec": "#808080", "lw": 1.2, "ls": "-" if stored else (0, (3, 2))}
    ax.add_patch(Rectangle((left, bottom), right - left, top - bottom, **edge))
    middle = {"x": (left + right) / 2, "ha": "center", "fontsize": 9}
    ax.text(y=top + 0.12, s=words[0], va="bottom", **middle)
    ax.text(y=bottom - 0.12, s=words[1], va="top", **middle)
