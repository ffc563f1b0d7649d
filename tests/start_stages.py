"""`effnet-train`, and when its stages were done: bench_use.py starts it to see where the time before a step goes.

    python tests/start_stages.py BEGIN train CASE ...     # BEGIN: when the caller started this, as `time.time()`

Prints a line of JSON behind "STAGES": seconds from BEGIN until all was imported and the run was settled ("settled"),
the network was built ("network"), the first images were there ("images"), the training step was compiled ("compiled")
and done ("step").

With BENCH_TURN=FOLDER in the environment it waits, once the training step is compiled, for FOLDER/go; FOLDER/compiled
says so.
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

PREFIX = "STAGES "


def watch(begin):
    """Note when each stage is done; returns the dictionary that fills up."""
    from effnet_repro.training import runtime, step

    found = {}

    def marked(owner, name, stage, wait=lambda result: None, before=False):
        inner = getattr(owner, name)

        def outer(*args, **named):
            if before:
                found.setdefault(stage, time.time() - begin)
            result = inner(*args, **named)
            if stage not in found:
                wait(result)
                found[stage] = time.time() - begin
            return result

        setattr(owner, name, outer)

    marked(runtime.KerasRuntime, "begin", "settled", before=True)
    marked(runtime.KerasRuntime, "begin", "network")
    marked(runtime, "updates", "images")
    marked(step, "compile_once", "compiled")
    marked(runtime.KerasRuntime, "advance", "step", lambda unread: float(unread.logs["loss"]))
    return found


def wait_for_turn(folder):
    """Let the first training step wait, once it is compiled, for the file `go` in a folder."""
    from effnet_repro.training import step

    inner = step.compile_once

    def outer(*args, **named):
        result = inner(*args, **named)
        (folder / "compiled").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)
        return result

    step.compile_once = outer


def main(words):
    from effnet_repro.cli import main as command

    if "BENCH_TURN" in os.environ:
        wait_for_turn(Path(os.environ["BENCH_TURN"]))
    found = watch(float(words[0]))
    status = command(words[1:])
    print(PREFIX + json.dumps({name: round(value, 1) for name, value in found.items()}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
