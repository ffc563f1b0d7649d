"""Images outside a data set, named by their paths: found, and made into squares as a validation makes them."""

import math
import os
from dataclasses import dataclass
from typing import Counter, Iterable, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from effnet_repro.data.decode import decode_image, rgb_of
from effnet_repro.data.folders import IMAGE_SUFFIXES, is_image_inside, is_image_name
from effnet_repro.data.numpy_reader import PIECE
from effnet_repro.data.places import left_by_tools
from effnet_repro.data.request import check_resize
from effnet_repro.data.team import Team, into, pays_processes
from effnet_repro.data.threads import made_ahead
from effnet_repro.data.transforms import validation_image
from effnet_repro.outside import MOST_IMAGE_BYTES, read_file
from effnet_repro.paths import local_path


def find_images(places: Iterable, left: Optional[Counter] = None) -> List[str]:
    """Return the paths of images: files as they are named, and of a folder every image in it or below, sorted.

    What does not exist, and a folder without images, stays in the list: reading it says what is wrong. `left` counts
    by suffix what is in a folder and is no image.
    """
    found = []
    for place in places:
        place = str(local_path(place))
        inside = list(_images_below(place, left)) if os.path.isdir(place) else []
        found += inside or [place]
    return found


def first_image(folder) -> Optional[str]:
    """Return the path of the first image in a folder or below; None where there is none. Reads no more than it must."""
    return next(_images_below(str(local_path(folder))), None)


def _images_below(folder, left=None):
    seen = set()

    def unread(error):
        if left is not None:
            left["folder that cannot be read"] += 1

    for inner, folders, files in os.walk(folder, onerror=unread, followlinks=True):
        folders[:] = sorted(name for name in folders if not left_by_tools(name))
        if os.path.realpath(inner) in seen:  # a link that leads back
            folders[:] = []
            continue
        seen.add(os.path.realpath(inner))
        for name in sorted(name for name in files if not left_by_tools(name)):
            path = os.path.join(inner, name)
            if is_image_name(name) or is_image_inside(path):
                yield path
            elif left is not None:
                left[os.path.splitext(name)[1].lower() or "without a suffix"] += 1


_LONGEST = 16  # Of an image that is resized whole: its long side over its short one


def _without_ends(pixels):
    "An image without the ends of a very long side, whose middle alone is seen"
    short, long = sorted(pixels.shape[:2])
    cut = (long - _LONGEST * short) // 2
    if cut <= 0:
        return pixels
    return pixels[cut:-cut] if pixels.shape[0] == long else pixels[:, cut:-cut]


def timm_square(pixels: np.ndarray, image_size: int, crop_pct: float) -> np.ndarray:
    """Return the central square (S, S, 3) uint8 of an image (H, W, 3), as timm and torchvision make it.

    The short side becomes floor(S / `crop_pct`), by Pillow's bicubic filter with antialiasing; then the square is cut.
    """
    from PIL import Image

    pixels = _without_ends(pixels)
    height, width = pixels.shape[:2]
    short, scaled = min(height, width), math.floor(image_size / crop_pct)
    new = tuple(int(scaled * side / short) for side in (height, width))
    image = Image.fromarray(pixels).resize(new[::-1], Image.Resampling.BICUBIC)
    top, left = (round((side - image_size) / 2) for side in new)
    return np.asarray(image.crop((left, top, left + image_size, top + image_size)))


@dataclass(frozen=True)
class SquaresJob:
    """Makes the central squares of some images, as in `team`, and says which could not be read."""

    image_size: int  # Side of the square, S, pixels
    image_resize: str  # "published" or "modern"
    crop_pct: Optional[float] = None  # Then squares are those of `timm_square`

    def __call__(self, images: Sequence) -> Tuple[np.ndarray, List[str]]:
        """Return squares (n, S, S, 3) uint8 and for each image what is wrong with it: "" for nothing.

        An image is a path, the bytes of a file, an array (H, W, 3) or (H, W) uint8, or Pillow's. The square of one
        that cannot be read is black.
        """
        squares = np.zeros((len(images), self.image_size, self.image_size, 3), np.uint8)
        problems = []
        for square, image in zip(squares, images):
            try:
                square[...] = self._square(image)
                problems.append("")
            except (OSError, ValueError) as error:
                problems.append(getattr(error, "strerror", None) or str(error))
        return squares, problems

    def _square(self, image):
        if isinstance(image, (str, os.PathLike)):
            if os.path.isdir(image):
                raise ValueError(f"A folder without images ({' '.join(IMAGE_SUFFIXES)}).")
            image = read_file(image, MOST_IMAGE_BYTES)
        if isinstance(image, bytes):
            fast = self.image_resize == "published"
            pixels = decode_image(image, fast, upright=not fast)
        else:
            pixels = as_pixels(image)
        if self.crop_pct is not None:
            return timm_square(pixels, self.image_size, self.crop_pct)
        return validation_image(pixels, self.image_size, self.image_resize)


def as_pixels(image) -> np.ndarray:
    """Return an image that is in memory as (H, W, 3) uint8: an array, gray or RGB, or one of Pillow's.

    Raises `ValueError` for other shapes and types: floats may mean 0..1 or 0..255.
    """
    pixels = rgb_of(image) if hasattr(image, "convert") else np.asarray(image)
    pixels = np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise ValueError(
            "An image in memory is an array (height, width, 3) or (height, width) of uint8. "
            f"Received: {pixels.dtype} {pixels.shape}."
        )
    return pixels


def square_batches(
    images: Sequence, job: SquaresJob, batch: int
) -> Iterator[Tuple[np.ndarray, List[str]]]:
    """Yield the squares of images, `batch` at a time, as the job makes them; two batches are made ahead."""
    check_resize(job.image_resize)
    side = job.image_size
    room = PIECE * side**2 * 3 if pays_processes(len(images)) else None
    with Team(job, room) as team:

        def begin(first):
            some = images[first : first + batch]
            squares = np.empty((len(some), side, side, 3), np.uint8)
            pieces = range(0, len(some), PIECE)
            return squares, [
                team.submit((some[i : i + PIECE],), into(squares[i : i + PIECE])) for i in pieces
            ]

        for squares, done in made_ahead(begin, range(0, len(images), batch)):
            yield squares, [problem for one in done for problem in one.result()[1]]
