"""What an exported file says about itself: an archive at its end, which the program that runs the file ignores."""

import json
import zipfile
from typing import Dict, Optional

ABOUT = "metadata.json"  # Entry of the archive


def append_metadata(
    path, metadata: dict, entry: str = ABOUT, texts: Optional[Dict[str, str]] = None
) -> None:
    """Add JSON values to a file, as an entry of its archive; `texts` are further entries, name -> text."""
    with zipfile.ZipFile(str(path), "a") as archive:
        archive.writestr(entry, json.dumps(metadata, indent=1))
        for name, text in (texts or {}).items():
            archive.writestr(name, text)


def read_appended(path, entry: str = ABOUT) -> dict:
    """Return what `append_metadata` added to a file."""
    with zipfile.ZipFile(str(path)) as archive:
        return json.loads(archive.read(entry))
