"""Lists that say what images show that lie in no class folders: Kaggle's of ImageNet, and Tiny ImageNet's."""

import csv
import re
from pathlib import Path
from typing import Dict, Optional

from effnet_repro.messages import in_a_line
from effnet_repro.outside import SAVE, head_of, kind_of, read_file

LABELS = "LOC_val_solution.csv"  # Kaggle's labels of ImageNet's validation images
TINY = "val_annotations.txt"  # The same of Tiny ImageNet, whose images lie in val/images


def labels_beside(root: Path, folder: Path) -> Optional[Path]:
    """Return the list of labels in a folder of validation images, or in one of those above; None without one."""
    above = [folder, folder.parent, root, *root.absolute().parents[:3]]
    paths = (place / name for name in (LABELS, TINY) for place in above)
    return next((path for path in paths if path.is_file()), None)


def read_labels(path: Path) -> Dict[str, str]:
    """Return the class of each image of a list, by the name that the list gives the image, without its folders.

    Raises `ValueError` for a file that is no such list, and for an image of two classes.
    """
    kind = kind_of(head_of(path))
    if kind.startswith(("an HTML", "a pointer", "an empty")):
        raise ValueError(f"{path} is no list of labels: it is {kind}. Download it again.")
    try:
        text = read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: it is {kind}. {SAVE}") from None
    known = {}
    for image, label in _of_tiny(text) if path.name == TINY else _of_kaggle(path, text):
        name = re.split(r"[\\/]", image)[-1]
        if known.setdefault(name, label) != label:
            raise ValueError(
                f"{path} gives {in_a_line(name)} two classes, {in_a_line(known[name])} and {in_a_line(label)}. Mend it."
            )
    if not known:
        raise ValueError(f"{path} lists no image. Download it again.")
    return known


def _of_tiny(text):
    rows = (line.split("\t") if "\t" in line else line.split() for line in text.splitlines())
    return [(row[0].strip(), row[1].strip()) for row in rows if len(row) > 1]


def _of_kaggle(path, text):
    lines = text.splitlines()
    columns = re.search(r"[,;\t]", lines[0]) if lines else None
    try:
        rows = csv.reader(lines, delimiter=columns[0], skipinitialspace=True)
        names = [name.strip() for name in next(rows)]
        image, label = names.index("ImageId"), names.index("PredictionString")
        return [(row[image].strip(), row[label].split()[0]) for row in rows if row]
    except (csv.Error, StopIteration, TypeError, ValueError, IndexError):
        raise ValueError(
            f"{path} is not Kaggle's list of labels: it needs the columns ImageId and PredictionString, with a "
            "class first in each. Download it again."
        ) from None
