"""Coverage-guided fuzzing of what reads files from outside: records, JPEG headers, YAML, checkpoints, weights.

    python -m venv fuzz && fuzz/bin/pip install atheris -e .
    fuzz/bin/python tests/fuzz_readers.py records --seconds 600

A reader may answer with a value, or with one of `EXPECTED` whose message is one line; anything else is a finding, and
the input that led to it is written to `--keep` (default: the folder `fuzz-NAME`). `tests/data/fuzz` holds a small
corpus of inputs that found something or reach far; `test_fuzzed_inputs.py` reads all of it without atheris.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
CORPUS = Path(__file__).parent / "data" / "fuzz"
EXPECTED = (ValueError, OSError)
MOST_CHARACTERS = 2000  # Of a message


def _in_file(data, name):
    "A file of these bytes, rewritten by each input, in memory where the system has such a place"
    shared = Path("/dev/shm")
    folder = Path(tempfile.gettempdir()) if not shared.is_dir() else shared
    path = folder / f"effnet-fuzz-{os.getpid()}" / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def records(data: bytes):
    """A file of records."""
    from effnet_repro.data import open_data

    path = _in_file(data, "train-00000-of-00001")
    with contextlib.suppress(FileNotFoundError):  # no image was left
        open_data(path.parent, "tfrecord", path.parent / "c", on_corrupt="skip", verbose=False)
    open_data(path.parent, "tfrecord", verbose=False)


def example(data: bytes):
    """The content of a record whose checksums are right."""
    from effnet_repro.data import parse_example, write_tfrecords

    path = _in_file(b"", "train-00000-of-00001")
    write_tfrecords(path, [data])
    records(path.read_bytes())
    parse_example(data)


def jpeg(data: bytes):
    """An image file: its header, its orientation, and where it is small its pixels."""
    from effnet_repro.data.decode import decode_image, image_bytes, image_facts

    data = data if data[:2] == b"\xff\xd8" else b"\xff\xd8" + data
    facts = image_facts(data)
    if facts.height * facts.width < 2**16:
        image_bytes(data)
        decode_image(data, upright=True)


def yaml(data: bytes):
    """A file of cases."""
    from effnet_repro.config import load_cases

    load_cases(_in_file(data, "config.yml"))


def checkpoint(data: bytes):
    """A checkpoint of ours."""
    from effnet_repro.checkpoint import load, read_metadata

    path = _in_file(data, "epoch-0001.safetensors")
    read_metadata(path)
    load(path)


def header(data: bytes):
    """What the header of a whole safetensors file says: two texts, of a checkpoint and of a file of weights."""
    import numpy as np
    from safetensors.numpy import save

    about, rest = (part.decode("utf-8", "replace") for part in (*data.split(b"\n", 1), b"")[:2])
    sums = {"effnet_repro_crc32": rest} if rest else {}
    try:
        checkpoint(save({"w": np.ones(2, "float32")}, {"effnet_repro": about, **sums}))
    except EXPECTED as error:
        _checked(error)
    from effnet_repro.convert import read

    read(
        _in_file(save({"w": np.ones(2, "float32")}, {"effnet_repro_torch": about}), "w.safetensors")
    )


def weights(data: bytes):
    """A file of weights of any program."""
    from effnet_repro.convert import format_of, read

    for name in ("w.safetensors", "w.h5", "w.keras", "w.pth"):
        path = _in_file(data, name)
        try:
            format_of(path)
            read(path)
        except (*EXPECTED, ImportError) as error:
            _checked(error)


READERS = {f.__name__: f for f in (records, example, jpeg, yaml, checkpoint, header, weights)}


def _checked(error):
    text = str(error)
    if not text or len(text.splitlines()) != 1 or len(text) > MOST_CHARACTERS:
        raise AssertionError(f"not one line: {text!r}") from error


def attempt(name: str, data: bytes) -> str:
    """Give a reader an input; return what it says of it, "" for nothing. Raises whatever else comes out."""
    try:
        READERS[name](data)
    except EXPECTED as error:
        _checked(error)
        return str(error)
    return ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reader", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--keep", help="folder for findings and for inputs that reach new code")
    args = parser.parse_args()
    import atheris

    with atheris.instrument_imports(include=["effnet_repro"]):
        import effnet_repro.checkpoint
        import effnet_repro.config
        import effnet_repro.convert
        import effnet_repro.data  # noqa: F401
    from effnet_repro import messages

    messages.LOG.addHandler(logging.NullHandler())  # nothing is printed
    kept = Path(args.keep or f"fuzz-{args.reader}")
    kept.mkdir(parents=True, exist_ok=True)
    seeds = CORPUS / args.reader
    limits = [f"-max_total_time={args.seconds}", "-timeout=20", "-rss_limit_mb=4000"]
    folders = [str(kept), *([str(seeds)] if seeds.is_dir() else [])]
    words = [sys.argv[0], *limits, "-max_len=8192", f"-artifact_prefix={kept}/found-", *folders]
    atheris.Setup(words, lambda data: attempt(args.reader, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
