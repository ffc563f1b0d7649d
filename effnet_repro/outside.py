"""What comes from outside: how much of it is read, and what a file is by its first bytes.

Every number in a file that decides how much memory is taken has a limit here. The limits are far above what a network
for images needs, and the same for all readers.
"""

import json
import os
import re
import stat
import zipfile
from pathlib import Path

MOST_PIXELS = (
    89_478_485  # Of an image: a quarter of a GiB of RGB values, where Pillow begins to warn
)
MOST_IMAGE_BYTES = 2**30  # Of an image's file
MOST_TEXT = 2**26  # Bytes of a small file: info.json, a list of labels, config.json
MOST_CLASSES = 1_000_000  # That a description of a data set may name
MOST_NUMBERS = 2**29  # In a file of weights: eight times the largest EfficientNet
SAVE = "Save it as UTF-8, or copy it again."
MOST_UNPACKED = 2**33  # Bytes that the entries of an archive of weights come to

_BEGINNINGS = (
    (b"\xff\xd8\xff", "a JPEG"),
    (b"\x89PNG\r\n\x1a\n", "a PNG"),
    (b"GIF8", "a GIF"),
    (b"II*\0", "a TIFF"),
    (b"MM\0*", "a TIFF"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ\0", "an xz archive"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"Rar!", "a RAR archive"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"%PDF", "a PDF"),
    (b"%!PS", "a PostScript file"),
    (b"8BPS", "a Photoshop file"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"PAR1", "a Parquet table"),
    (b"ARROW1", "an Arrow table"),
    (b"MATLAB", "arrays of MATLAB"),
    (b"version https://git-lfs", "a pointer of Git LFS: the file itself was not downloaded"),
    (b"\0\5\x16\7", "an AppleDouble file of a Mac"),
    (b"\x80\x02", "a pickle"),
    (b"\x80\x04", "a pickle"),
)
_BEGINNINGS += tuple((mark, "a text in UTF-16") for mark in (b"\xff\xfe", b"\xfe\xff"))
_HEIF = {b"heic", b"heix", b"hevc", b"heim", b"heis", b"hevm", b"mif1", b"msf1"}


def kind_of(head: bytes) -> str:
    """Return what a file is by its first 512 bytes, or as many as there are: "a JPEG", "an HTML page", "a text", ..."""
    if not head:
        return "an empty file"
    if head.startswith(b"PK\3\4") and b".npy" in head[30:80]:
        return "arrays of NumPy"
    for beginning, kind in _BEGINNINGS:
        if head.startswith(beginning):
            return kind
    if head[257:262] == b"ustar":
        return "a TAR archive"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image"
    if head[:2] == b"BM" and head[6:10] == bytes(4):
        return "a BMP"
    if head[4:8] == b"ftyp":
        brand = head[8:12]
        return "an AVIF image" if brand[:3] == b"avi" else _heif_or_film(brand)
    if head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 2**32:
        return "a safetensors file"
    if not head.strip(b"\0"):
        return "a file of zeros"
    if re.match(rb"\s*(<!doctype html|<html)", head, re.I):
        return "an HTML page"
    if re.match(rb"(\xef\xbb\xbf)?\s*[\[{<]", head) and _is_text(head):
        return "a text (JSON or XML)"
    return "a text" if _is_text(head) else "of no known kind"


def _heif_or_film(brand):
    return "a HEIC image, to be converted to JPEG first" if brand in _HEIF else "a film"


def _is_text(head):
    return not re.search(rb"[\0-\x08\x0e-\x1f\x7f-\xff]", head[:64])


def head_of(path, size: int = 512) -> bytes:
    """Return the first bytes of a file. What is no regular file has none: reading a FIFO would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b""
    with open(path, "rb") as file:
        return file.read(size)


def file_kind(path) -> str:
    """Return what lies at a path: `kind_of` a file, or "a folder", "a FIFO", "a device", ..."""
    mode = os.stat(path).st_mode
    names = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    for test, name in names:
        if test(mode):
            return name
    return kind_of(head_of(path)) if stat.S_ISREG(mode) else "a device"


def read_file(path, most: int = MOST_TEXT) -> bytes:
    """Return the bytes of a regular file. Raises `ValueError` for anything else and for more than `most` bytes."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{path} is {file_kind(path)}, not a file.")
    if found.st_size > most:
        raise ValueError(f"{path} has {found.st_size:,} bytes; at most {most:,} are read.")
    return Path(path).read_bytes()


def read_json(path) -> dict:
    """Return the object in a small JSON file. Raises `ValueError` for anything else, OSError where there is none."""
    try:
        found = json.loads(read_file(path).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text in UTF-8: it is {file_kind(path)}. {SAVE}") from None
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found


def check_pixels(height: int, width: int) -> None:
    """Raise `ValueError` for an image of more pixels than any reader takes, or of none."""
    if height < 1 or width < 1 or height * width > MOST_PIXELS:
        raise ValueError(
            f"An image of {height:,} x {width:,} pixels: at most {MOST_PIXELS:,} are read. Make it smaller."
        )


def check_numbers(path, count: int) -> None:
    """Raise `ValueError` for a file of weights that says to hold more numbers than any network has."""
    if count > MOST_NUMBERS:
        raise ValueError(
            f"{path} says to hold {count:,} numbers; at most {MOST_NUMBERS:,} are read. It is no EfficientNet's."
        )


def check_archive(path) -> None:
    """Raise `ValueError` for a ZIP archive that unpacks to more bytes than weights need, or that cannot be read."""
    try:
        with zipfile.ZipFile(str(path)) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise ValueError(f"{path} is not a whole archive ({error}).") from None
    if size > MOST_UNPACKED:
        raise ValueError(f"{path} unpacks to {size:,} bytes; at most {MOST_UNPACKED:,} are read.")
