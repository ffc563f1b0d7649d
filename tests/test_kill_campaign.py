"""Fifteen kills; `python tests/kill_campaign.py --kills 1000` does more."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import PYTHON

CAMPAIGN = Path(__file__).parent / "kill_campaign.py"


def campaign(folder, *flags):
    "Run the program; returns (kills, chains that differ)."
    command = [sys.executable, CAMPAIGN, *flags, "--folder", folder]
    done = subprocess.run(list(map(str, command)), env=PYTHON, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"(\d+) kills in .* (\d+) differ", done.stdout)
    return tuple(map(int, found.groups()))


def test_kills_leave_what_no_kill_leaves(tmp_path):
    kills, wrong = campaign(tmp_path, "--kills", 15, "--jobs", 2)
    assert kills >= 15 and wrong == 0


@pytest.mark.long
@pytest.mark.parametrize("flags", [("--kills", 300), ("--kills", 20, "--graph")])
def test_hundreds_of_kills_leave_what_no_kill_leaves(tmp_path, flags):
    kills, wrong = campaign(tmp_path, *flags, "--seed", 7, "--jobs", 2)
    assert kills >= flags[1] and wrong == 0


def test_the_campaign_sees_a_difference(tmp_path):
    "Weights, averages, rows and leftovers of another run are told apart."
    sys.path.insert(0, str(CAMPAIGN.parent))
    import kill_campaign
    from test_recorder import Loop

    runs = []
    for name in ("a", "b"):
        Loop(tmp_path / name).run()
        (tmp_path / name / "validation.csv").write_text("weights,top1\nlast,0.5\n")
        runs.append(kill_campaign.left_behind(tmp_path / name))
    assert runs[0] == runs[1]
    folder = tmp_path / "b"
    for name, harm in {
        "metrics.csv": lambda path: path.write_text(path.read_text().replace("3.0,9", "3.0,8")),
        "validation.csv": lambda path: path.write_text("weights,top1\nlast,0.25\n"),
        "checkpoints/average.safetensors": lambda path: path.write_bytes(path.read_bytes() + b" "),
        ".x.0123abcd.tmp": lambda path: path.write_bytes(b"left over"),
    }.items():
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        harm(folder / name)
        assert kill_campaign.left_behind(folder) != runs[0], name
        (folder / name).unlink()
        if before is not None:
            (folder / name).write_bytes(before)
    assert json.dumps(sorted(kill_campaign.left_behind(folder))) == json.dumps(sorted(runs[0]))
