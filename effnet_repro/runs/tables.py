"""Small tables and JSON files, whole or absent, that several processes may write."""

import csv
import io
import json
from pathlib import Path

from effnet_repro.checkpoint import atomic_write
from effnet_repro.messages import shown
from effnet_repro.outside import read_file
from effnet_repro.paths import local_path
from effnet_repro.runs.lock import wait_for_folder


def write_json(
    path,  # File to write
    values,  # JSON values
):
    "Write a small file whole or not at all"
    atomic_write(path, (json.dumps(values, indent=1) + "\n").encode())


def read_rows(
    path,  # A CSV file; may be missing
    must: bool = False,  # Raise OSError where it is there and the disk does not give it
):  # (rows: name -> text, messages about rows that are not whole)
    "Read the whole rows of a CSV file, whatever else is in it"
    path = local_path(path)
    try:
        text = read_file(path).decode()
        lines = list(csv.reader(io.StringIO(text, newline=""), strict=True))
    except (FileNotFoundError, NotADirectoryError):
        return [], []
    except OSError as e:
        if must:
            raise OSError(e.errno, f"Cannot read {path}: {e.strerror}. It is unchanged.") from None
        return [], [f"{path} cannot be read: {e.strerror}."]
    except (UnicodeDecodeError, csv.Error) as e:
        return [], [f"{path} is not a table ({e})."]
    except ValueError as e:  # no regular file, or too large
        return [], [str(e)]
    if not lines or not any(lines[0]) or "\0" in text:
        return [], [f"{path} is empty." if not text else f"{path} is not a table."]
    names, rows, wrong = lines[0], [], []
    if not text.endswith("\n"):  # its last value may be cut, too
        wrong.append(f"{path}: its last row is cut off.")
        lines = lines[:-1]
    for number, values in enumerate(lines[1:], 1):
        if len(values) == len(names):
            rows.append(dict(zip(names, values)))
        elif values:
            wrong.append(f"{path}: row {number} is not whole.")
    return rows, wrong


def write_rows(
    path,  # A CSV file
    rows,  # Dictionaries; a column for every key, in the order of their first use
):
    "Write a CSV file whole or not at all"
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, names)
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, shown(text.getvalue()).encode())


def append_rows(
    path,  # A CSV file; made when missing
    rows,  # Dictionaries; a new key becomes a new column
    keep=lambda row: True,  # Whether an old row, a dictionary of text, stays
):
    "Add rows to a CSV file, which is rewritten whole"
    path = Path(path)
    with wait_for_folder(path.parent):
        old, wrong = read_rows(path)
        try:
            old = [row for row in old if keep(row)]
        except (KeyError, TypeError, ValueError) as e:
            wrong = [f"{path} is damaged ({e!r})."]
        if wrong:
            raise ValueError(f"{wrong[0]} Mend it, or move it away.")
        write_rows(path, old + [{k: str(v) for k, v in row.items()} for row in rows])
