"""`effnet-train`, and when its stages were done: bench_use.py starts it to see where the time before a step goes.

    python tests/start_stages.py BEGIN train CASE ...     # BEGIN: when the caller started this, as `time.time()`

Prints a line of JSON behind "STAGES": seconds from BEGIN until all was imported and the run was settled ("settled"),
the network was built ("network"), the first images were there ("images"), the training step was compiled ("compiled")
and done ("step").
"""

import json
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


def main(words):
    from effnet_repro.cli import main as command

    found = watch(float(words[0]))
    status = command(words[1:])
    print(PREFIX + json.dumps({name: round(value, 1) for name, value in found.items()}), flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
