"""`ipu.config`: options with exact types, categories that cannot be assigned, checks at configure time."""

import difflib
import enum
import typing
import warnings

from .machine import machine


class StochasticRoundingBehaviour(enum.Enum):
    OFF, ON, REPLICA_IDENTICAL_ONLY = range(3)

    @classmethod
    def from_bool(cls, value):
        return cls.ON if value else cls.OFF


class DeviceConnectionType(enum.Enum):
    ALWAYS, ON_DEMAND, PRE_COMPILE, NEVER = range(4)


class SchedulingAlgorithm(enum.Enum):
    CHOOSE_BEST, CLUSTERING, POST_ORDER, LOOK_AHEAD, SHORTEST_PATH = range(5)


class SelectionOrder(enum.Enum):
    AUTO, ZIGZAG, SNAKE, HOOF = range(4)


class MergeRemoteBuffersBehaviour(enum.Enum):
    NO_MERGING, MERGE, IF_BENEFICIAL = range(3)


# Of `compilation_poplar_options`, as far as this project sets them: name -> values, the default first
ENGINE_OPTIONS = {
    "opt.internalExchangeOptimisationTarget": ("cycles", "balanced", "memory"),
    "target.deterministicWorkers": ("true", "false", "portable"),
}
IPUs = typing.Union[int, typing.List[int], typing.Tuple[int, ...]]


def fields(at_least):
    "{dotted name: (type, default)} for an SDK; `at_least` tells whether it is so new"
    table = {
        "auto_select_ipus": (IPUs, []),
        "select_ipus": (IPUs, []),
        "selection_order": (SelectionOrder, SelectionOrder.AUTO),
        "allow_recompute": (bool, False),
        "compilation_poplar_options": (dict, {}),
        "gcl_poplar_options": (dict, {}),
        "serialization_output_folder": (str, ""),
        "convolutions.poplar_options": (dict, {}),
        "matmuls.poplar_options": (dict, {}),
        "matmuls.clear_pass_type": (bool, False),
        "pooling.poplar_options": (dict, {}),
        "norms.use_stable_statistics": (bool, False),
        "norms.experimental.distributed_batch_norm_replica_group_size": (int, 1),
        "floating_point_behaviour.inv": (bool, False),
        "floating_point_behaviour.div0": (bool, False),
        "floating_point_behaviour.oflo": (bool, False),
        "floating_point_behaviour.nanoo": (bool, False),
        "floating_point_behaviour.set_all": (bool, False),
        "optimizations.merge_infeed_io_copies": (bool, at_least("2.5")),
        "optimizations.minimum_remote_tensor_size": (int, 128),
        "optimizations.maximum_cross_replica_sum_buffer_size": (int, 0),
        "optimizations.maximum_inter_ipu_copies_buffer_size": (int, 0),
        "optimizations.enable_graph_outlining": (bool, True),
        "io_tiles.num_io_tiles": (int, 0),
        "io_tiles.place_ops_on_io_tiles": (bool, False),
        "io_tiles.available_memory_proportion": (float, 0.9),
        "device_connection.type": (DeviceConnectionType, DeviceConnectionType.ALWAYS),
        "device_connection.version": (str, ""),
        "device_connection.enable_remote_buffers": (bool, False),
        "scheduling.algorithm": (SchedulingAlgorithm, SchedulingAlgorithm.CHOOSE_BEST),
        "experimental.always_rearrange_copies_on_the_host": (bool, False),
        "experimental.multi_replica_distribution.process_count": (int, 0),
        "experimental.multi_replica_distribution.process_index": (int, 0),
    }
    if at_least("2.2"):
        table["experimental.enable_prng_stability"] = (bool, False)
    if at_least("2.4"):
        table["slices.poplar_options"] = (dict, {})
    esr = (bool, False)
    if at_least("2.4"):
        kinds = (
            (StochasticRoundingBehaviour,)
            if at_least("2.5")
            else (StochasticRoundingBehaviour, bool)
        )
        esr = (typing.Union[kinds], StochasticRoundingBehaviour.OFF)
    table["floating_point_behaviour.esr"] = esr
    return table


def _fits(value, kind):
    origin = typing.get_origin(kind)
    if origin is typing.Union:
        return any(_fits(value, k) for k in typing.get_args(kind))
    if origin in (list, tuple):
        return type(value) is origin and all(type(v) is int for v in value)
    return type(value) is kind  # exactly: True is no int, 1 is no bool


class _Category:
    def __init__(self, table, values, prefix=""):
        object.__setattr__(self, "_parts", (table, values, prefix))

    def _look_up(self, name):
        table, values, prefix = self._parts
        full = prefix + name
        inside = [f for f in table if f.startswith(full + ".")]
        if full not in table and not inside:
            near = difflib.get_close_matches(full, table, n=1, cutoff=0.0)
            raise ValueError(
                f"'{full}' is not a valid attribute of this config. Did you mean '{near[0]}'?"
            )
        return full, bool(inside)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        table, values, _ = self._parts
        full, category = self._look_up(name)
        return _Category(table, values, full + ".") if category else values[full]

    def __setattr__(self, name, value):
        table, values, _ = self._parts
        full, category = self._look_up(name)
        if category:
            raise Exception(f"{full} is a category and cannot be assigned to.")
        kind = table[full][0]
        if not _fits(value, kind):
            raise TypeError(f"Trying to set {full} to {value}, but it must be of type {kind}")
        values[full] = value


class IPUConfig(_Category):
    def __init__(self):
        table = fields(machine().at_least)
        values = {
            k: type(d)(d) if isinstance(d, (dict, list)) else d for k, (_, d) in table.items()
        }
        super().__init__(table, values)

    def to_dict(self):
        return dict(self._parts[1])

    def configure_ipu_system(self, device="cpu"):
        configure_ipu_system(self, device)


def configure_ipu_system(config, device="cpu", reset_configuration=True):
    if not isinstance(config, IPUConfig):
        raise TypeError("`config` must be an IPUConfig instance")
    values = config.to_dict()
    if values["auto_select_ipus"] and values["select_ipus"]:
        raise Exception("Only one of `auto_select_ipus` and `select_ipus` can be set.")
    chosen = values["select_ipus"]
    if isinstance(chosen, (list, tuple)) and len(set(chosen)) != len(chosen):
        raise ValueError("All device indices in `select_ipus` must be unique.")
    for name, value in values.items():
        if name.endswith("poplar_options"):
            for k, v in value.items():
                if type(k) is not str or type(v) is not str:
                    raise TypeError(f"{name}[{k!r}] = {v!r}: bad argument type for a string field")
    for name, legal in ENGINE_OPTIONS.items():
        value = values["compilation_poplar_options"].get(name, legal[0])
        if value not in legal:  # the engine refuses it when it is made; said here at once
            raise ValueError(f"Unrecognised value {value!r} for {name}. Legal: {', '.join(legal)}")
    if values["io_tiles.place_ops_on_io_tiles"] and not values["io_tiles.num_io_tiles"]:
        raise ValueError("Cannot place ops on I/O tiles when io_tiles.num_io_tiles == 0")
    needs_version = (DeviceConnectionType.PRE_COMPILE, DeviceConnectionType.NEVER)
    if (
        values["device_connection.type"] in needs_version
        and not values["device_connection.version"]
    ):
        raise ValueError("device_connection.version must be set for this device_connection.type")
    if values["norms.experimental.distributed_batch_norm_replica_group_size"] < 1:
        raise ValueError("distributed_batch_norm_replica_group_size must be at least 1")
    count = values["experimental.multi_replica_distribution.process_count"]
    index = values["experimental.multi_replica_distribution.process_index"]
    if not 0 <= index < max(count, 1):
        raise ValueError("experimental.multi_replica_distribution is inconsistent")
    m = machine()
    if m.config is not None and m.config != values:
        warnings.warn("IPU system was configured already: resetting the devices", stacklevel=2)
    m.config = values
    m.note("configure_ipu_system", **values)


def reset_ipu_configuration():
    machine().config = None


def get_ipu_config(session=None):
    if machine().config is None:
        raise RuntimeError("No IPU devices configured.")
    return [dict(machine().config)]
