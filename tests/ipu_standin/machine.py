"""The pretended hardware of one process: configuration, compiled programs, popdist, and what aborts."""

import threading

_local = threading.local()

# Features by SDK, as far as this project meets them. TF1 builds of 2.1 and 2.2 and TF2 builds alike.
SDKS = ("2.1", "2.2", "2.4", "2.5", "2.6", "3.0", "3.4")


class ProcessAbort(BaseException):
    "Hardware would abort the whole process here (LOG(FATAL)); no Python code could catch it"


class ReplicasDiverged(AssertionError):
    "Replicas would hold different weights from here on. The real system says nothing about it."


class World:
    "Processes started by one poprun, here threads, that meet at collectives"

    def __init__(self, num_instances):
        self.count, self.barrier = num_instances, threading.Barrier(num_instances)
        self.values = [None] * num_instances

    def exchange(self, index, value):
        "Give a value, get everybody's"
        self.values[index] = value
        self.barrier.wait(timeout=300)
        everybody = list(self.values)
        self.barrier.wait(timeout=300)
        return everybody


class Machine:
    "One process and the IPUs it sees"

    def __init__(
        self, sdk="3.4", ipus=16, execute=True, check_divergence=True, shallow=False, popdist=None
    ):
        if sdk not in SDKS:
            raise ValueError(f"Unknown SDK {sdk}. The stand-in knows {', '.join(SDKS)}.")
        self.sdk, self.ipus, self.execute = sdk, ipus, execute
        self.check_divergence = check_divergence
        self.shallow = shallow  # Build stages, but neither gradients nor most of the step
        self.popdist = popdist or {}  # total_replicas, instances, index, ipus_per_replica, world
        self.config = None  # The configuration in force: {dotted name: value}
        self.programs, self.building, self.stage = [], None, None
        self.device, self.calls = [], {}  # calls: name -> list of what was passed, for assertions
        self.seed, self.popdist_initialised = None, False

    def at_least(self, sdk):
        number = lambda s: tuple(map(int, s.split(".")))
        return number(self.sdk) >= number(sdk)

    def note(self, what, **values):
        self.calls.setdefault(what, []).append(values)

    @property
    def instances(self):
        return self.popdist.get("instances", 1)

    @property
    def index(self):
        return self.popdist.get("index", 0)

    def everybody(self, value):
        "What each instance passed here, in order"
        if self.instances == 1:
            return [value]
        return self.popdist["world"].exchange(self.index, value)

    def configured_ipus(self):
        "IPUs of the configuration in force, over all instances"
        for name in ("auto_select_ipus", "select_ipus"):
            value = self.config[name]
            if value or value == 0 and not isinstance(value, list):
                count = value[0] if isinstance(value, (list, tuple)) else value
                if name == "select_ipus":  # an index of `gc-info -l`; here the one popdist gives
                    count = self.popdist.get("ipus_per_replica", 1) * (
                        self.popdist.get("total_replicas", 1) // self.instances
                    )
                return count * self.instances
        return 1


def machine() -> Machine:
    "The machine of this thread"
    if getattr(_local, "machine", None) is None:
        raise RuntimeError("No stand-in is installed in this thread.")
    return _local.machine


def current():
    return getattr(_local, "machine", None)


def set_machine(value):
    _local.machine = value
