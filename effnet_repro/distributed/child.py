"""What a process knows of the parent that `supervisor` is: that there is one, and when it is gone."""

import os
import threading
import time

#: Exit status that asks to be started again: EX_TEMPFAIL of sysexits.h, which means "try again later".
AGAIN = 75
#: Variable that tells a process the id of its parent.
PARENT = "EFFNET_PARENT"


def is_child() -> bool:
    """Return whether this process was started by `supervise`."""
    return os.environ.get(PARENT) == str(os.getppid())


def watch_parent() -> None:
    """End this process when its parent is gone: nobody would stop it or tell how it ended."""
    parent = os.getppid()

    def look():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(AGAIN)

    threading.Thread(target=look, daemon=True).start()
