"The files of this project, and copies of them to work in, so that no check changes the tree."

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = {
    ".git",
    ".venv",
    "_proc",
    "_docs",
    "_screenshots",
    "runs",
    "data",
    "build",
    "dist",
    "__pycache__",
    ".ipynb_checkpoints",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
}


def files():
    "Every file that is tracked or could be: uncommitted ones count, ignored and deleted ones do not."
    git = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if git.returncode == 0:
        names = sorted(set(filter(None, git.stdout.split("\0"))))
        return [Path(n) for n in names if os.path.lexists(ROOT / n)]
    found = []  # an unpacked archive
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [n for n in inner if n not in IGNORED and not n.endswith(".egg-info")]
        found += [(Path(folder) / n).relative_to(ROOT) for n in names]
    return sorted(found)


def notebooks():
    "The notebooks of the site in reading order, index first."
    found = sorted(p for p in (ROOT / "nbs").glob("*.ipynb") if p.name != "index.ipynb")
    index = ROOT / "nbs" / "index.ipynb"
    return ([index] if index.exists() else []) + found


def copy(dest, skip=lambda path: False):
    "Copy the project's files to the folder `dest`, links as links, without those that `skip` names."
    for name in files():
        if skip(name):
            continue
        target = Path(dest) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    return Path(dest)


def environment(root):
    "Environment variables to run this project from `root` (the tree, or a copy of it) and quietly."
    env = dict(os.environ)
    env["PATH"] = str(Path(sys.executable).parent) + os.pathsep + env.get("PATH", "")
    env["PYTHONPATH"] = str(root)
    for name, value in {
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }.items():
        env.setdefault(name, value)
    return env


def page_name(name):
    "The page of a notebook: `12_proxy_norm.ipynb` is `proxy_norm.ipynb`, as nbdev's links say."
    return re.sub(r"^\d+[a-zA-Z0-9]*_", "", name)
