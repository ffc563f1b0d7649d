"""Two hosts on one machine, for tests: network namespaces with a name and an address each, and a cable between them.

Their loopback devices are apart, so nothing reaches the other but over the cable. Needs Linux with `unshare`,
`nsenter` and `ip`, and user namespaces that a user may make; no root.
"""

import contextlib
import shutil
import subprocess
import time

NAMES = "first-host", "second-host"
ADDRESSES = "10.99.0.1", "10.99.0.2"
LOOPBACK = "127.0.1.1"
_SPACES = ["--user", "--net", "--uts", "--mount"]


class Hosts:
    """The two hosts, in a `with` statement; RuntimeError where they cannot be made here.

    With `loopback` each believes that its own name is an address of its loopback device, as Debian writes it.
    """

    def __init__(self, loopback=False):
        self.loopback = loopback

    def __enter__(self):
        missing = [tool for tool in ("unshare", "nsenter", "ip") if not shutil.which(tool)]
        if missing:
            raise RuntimeError(f"no {' and no '.join(missing)}")
        self._stack = contextlib.ExitStack()
        try:
            first = self._hold(["unshare", "--map-root-user", *_SPACES[1:], "--user"])
            second = self._hold([*_within(first), "unshare", *_SPACES[1:]])
            self._pids = first, second
            self._connect()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _hold(self, words):
        "A process that keeps namespaces; its number once it is in them"
        held = subprocess.Popen([*words, "sh", "-c", "echo $$; exec sleep 3600"], **_PIPES)
        self._stack.callback(held.wait)
        self._stack.callback(held.kill)
        if not held.stdout.readline():
            raise RuntimeError(f"unshare: {held.stderr.read().strip()}")
        return held.pid

    def _connect(self):
        first, second = self._pids
        cable = ["ip", "link", "add", "name", "cable", "type", "veth", "peer", "name", "cable"]
        self._run(first, *cable, "netns", str(second))
        for pid, name, address in zip(self._pids, NAMES, ADDRESSES):
            self._run(pid, "hostname", name)
            known = "".join(self._known(name))
            self._run(pid, "mount", "-t", "tmpfs", "none", "/mnt")
            self._run(pid, "sh", "-c", f"printf '{known}' > /mnt/hosts")
            self._run(pid, "mount", "--bind", "/mnt/hosts", "/etc/hosts")
            self._run(pid, "ip", "address", "add", f"{address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                self._run(pid, "ip", "link", "set", device, "up")
        time.sleep(0.2)

    def _known(self, own):
        "The lines of a host's list of names"
        yield "127.0.0.1 localhost\\n"
        for name, address in zip(NAMES, ADDRESSES):
            yield f"{LOOPBACK if self.loopback and name == own else address} {name}\\n"

    def _run(self, pid, *words):
        done = subprocess.run([*_within(pid), *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{words[0]}: {done.stderr.strip()}")

    def command(self, index, words):
        "What runs a command on one of the hosts"
        return [*_within(self._pids[index]), *words]


_PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _within(pid):
    return ["nsenter", "--target", str(pid), "--preserve-credentials", *_SPACES]
