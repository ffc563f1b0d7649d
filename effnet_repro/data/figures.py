"""Figures of images."""

import itertools
from typing import Sequence

import numpy as np

from effnet_repro.messages import shown


def plot_images(
    images,  # Images, (n, H, W, 3) uint8
    titles: Sequence[str] = (),  # One each, or none
    columns: int = 8,  # Images in a row
    side: float = 0.9,  # Of an image, inches
):  # The axes, (rows, columns)
    "Show images in a grid"
    import matplotlib.pyplot as plt

    rows = -(-len(images) // columns)
    lines = max((t.count("\n") + 1 for t in titles), default=0)
    height = side + 0.04 + 0.16 * lines
    fig, axes = plt.subplots(rows, columns, figsize=(columns * side, rows * height), squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, image, title in itertools.zip_longest(axes.flat[: len(images)], images, titles):
        ax.imshow(np.asarray(image))
        ax.set_title(shown(title or ""), fontsize=8, pad=2, parse_math=False)
    fig.tight_layout(pad=0.2)
    return axes
