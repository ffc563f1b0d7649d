"""Which of several processes this one is: every launcher, wrong and half environments, and a host's GPUs."""

import socket
import time

import pytest

from effnet_repro.distributed import Ranks, count_gpus, find_ranks, first_host, join, own_gpus

SLURM = {
    "SLURM_JOB_ID": "81923",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08,12],cpu1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}
OPENMPI = {f"OMPI_COMM_WORLD_{n}": v for n, v in (("RANK", "3"), ("SIZE", "4"))}
OPENMPI.update(OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2")
URI = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
JAX = {
    "JAX_COORDINATOR_ADDRESS": "a:1234",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": "1",
}
KERAS = {
    "KERAS_DISTRIBUTION_JOB_ADDRESSES": "a:1234,b:1234",
    "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
    "KERAS_DISTRIBUTION_PROCESS_ID": "1",
}


def without(env, *names):
    return {n: v for n, v in env.items() if n not in names}


def test_slurm_tells_all():
    found = find_ranks(SLURM)
    assert found == Ranks(5, 8, "gpu07:61443", "Slurm", 1, 4)
    assert find_ranks({**SLURM, "SLURM_JOB_ID": "81924"}).coordinator == "gpu07:61444"
    assert "process 5 of 8, coordinator gpu07:61443 (Slurm)" in found.describe()


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("gpu[007-012]", "gpu007"),
        ("r[1,3]n2,x", "r1n2"),
        ("a-b.c", "a-b.c"),
    ],
)
def test_first_host_of_a_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize("spread, node, there", [("1", 0, 1), ("4(x2),3", 2, 3), ("2,1(x3)", 3, 1)])
def test_tasks_of_a_node(spread, node, there):
    env = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": spread, "SLURM_NODEID": str(node)}
    assert find_ranks(env).local_count == there


def test_open_mpi_tells_all_or_asks_for_the_coordinator():
    found = find_ranks({**OPENMPI, **URI})
    assert found == Ranks(3, 4, found.coordinator, "Open MPI", 1, 2)
    host, port = found.coordinator.split(":")
    assert host == "10.96.0.1" and 61440 <= int(port) < 65536
    one_host = {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-1"}
    assert find_ranks(one_host).coordinator.startswith("127.0.0.1:")
    with pytest.raises(ValueError, match="--coordinator"):
        find_ranks(OPENMPI)
    assert find_ranks(OPENMPI, "head:9999").coordinator == "head:9999"
    assert find_ranks({**OPENMPI, "JAX_COORDINATOR_ADDRESS": "x:7"}).coordinator == "x:7"


def test_variables_of_keras_and_jax_and_the_order():
    assert find_ranks(JAX) == Ranks(1, 2, "a:1234", "JAX's variables")
    assert find_ranks(KERAS) == Ranks(1, 2, "a:1234", "Keras' variables")
    assert find_ranks({**SLURM, **OPENMPI, **JAX}).source == "JAX's variables"
    assert find_ranks({**JAX, **KERAS}).source == "Keras' variables"
    assert find_ranks({**SLURM, **OPENMPI, **URI}).source == "Open MPI"
    assert find_ranks(KERAS, "c:1", 3, 2) == Ranks(2, 3, "c:1", "flags")


def test_nothing_is_alone():
    assert find_ranks({}) == Ranks() == Ranks(0, 1, "", "no launcher")
    assert find_ranks({}, None, 1, 0).count == 1
    assert "one process" in find_ranks({}).describe()


@pytest.mark.parametrize("missing", list(JAX)[1:])
def test_half_of_jax_is_refused(missing):
    with pytest.raises(ValueError, match=f"{missing} missing"):
        find_ranks(without(JAX, missing))


@pytest.mark.parametrize("missing", KERAS)
def test_half_of_keras_is_refused(missing):
    with pytest.raises(ValueError, match=f"{missing} missing"):
        find_ranks(without(KERAS, missing))


@pytest.mark.parametrize("missing", [n for n in SLURM if n in list(SLURM)[:4]])
def test_half_of_slurm_is_refused(missing):
    if missing == "SLURM_JOB_ID":
        with pytest.raises(ValueError, match=missing):
            find_ranks(without(SLURM, missing))
        return
    with pytest.raises(ValueError, match=f"{missing} missing.*srun"):
        find_ranks(without(SLURM, missing))


def test_half_of_open_mpi_is_refused():
    with pytest.raises(ValueError, match="LOCAL_SIZE missing"):
        find_ranks(without(OPENMPI, "OMPI_COMM_WORLD_LOCAL_SIZE"))


@pytest.mark.parametrize(
    "flags, message",
    [
        (("a:1", 2, None), "--process missing"),
        ((None, 2, 0), "--coordinator missing"),
        (("a:1", None, 1), "--processes missing"),
        (("a:1", 2, 2), "process 2 of 2"),
        (("a:1", 0, 0), "process 0 of 0"),
        (("a", 2, 0), "host:port"),
        (("a:0", 2, 0), "host:port"),
        (("a:70000", 2, 0), "host:port"),
        ((":80", 2, 0), "host:port"),
        (("a:1", None, None), "which process this is"),
    ],
)
def test_wrong_flags_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        find_ranks({}, *flags)


@pytest.mark.parametrize(
    "change",
    [
        {"JAX_PROCESS_ID": "one"},
        {"JAX_PROCESS_ID": "-1"},
        {"JAX_PROCESS_ID": "2"},
        {"JAX_NUM_PROCESSES": "0"},
        {"JAX_NUM_PROCESSES": "2.0"},
        {"JAX_COORDINATOR_ADDRESS": "localhost"},
    ],
)
def test_wrong_variables_are_refused(change):
    with pytest.raises(ValueError):
        find_ranks({**JAX, **change})


def test_addresses_must_be_one_or_one_each():
    with pytest.raises(ValueError, match="lists 2 addresses"):
        find_ranks({**KERAS, "KERAS_DISTRIBUTION_NUM_PROCESSES": "3"})


@pytest.mark.parametrize("name", ["PMI_RANK", "RANK", "JOB_COMPLETION_INDEX"])
def test_a_launcher_that_is_not_read_is_no_reason_to_train_alone(name):
    with pytest.raises(ValueError, match=name):
        find_ranks({name: "1"})


# ---------------------------------------------------------------- GPUs of a host


@pytest.mark.parametrize(
    "local, gpus, own",
    [
        ((None, None), 4, None),  # not known: all
        ((0, 1), 4, None),  # one process a host takes all
        ((1, 4), 1, None),  # the launcher gave one
        ((1, 4), 4, [1]),
        ((1, 2), 4, [2, 3]),
        ((3, 4), 0, None),  # no GPUs
    ],
)
def test_processes_of_a_host_share_its_gpus(local, gpus, own):
    assert own_gpus(Ranks(1, 8, "a:1", "", *local), gpus) == own


def test_gpus_that_cannot_be_shared_are_refused():
    with pytest.raises(ValueError, match="3 processes on this host cannot share 4 GPUs"):
        own_gpus(Ranks(1, 8, "a:1", "", 1, 3), 4)


def test_gpus_are_counted_without_waking_them(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert count_gpus({}, tmp_path) == 2
    assert count_gpus({"CUDA_VISIBLE_DEVICES": "3"}, tmp_path) == 1
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}, tmp_path) == 0


# ---------------------------------------------------------------- the coordinator


@pytest.fixture
def unused(monkeypatch):
    "As if JAX had not been used yet, whatever other tests did"
    bridge = pytest.importorskip("jax._src.xla_bridge")
    monkeypatch.setattr(bridge, "backends_are_initialized", lambda: False)


def test_a_coordinator_that_never_answers_ends_after_the_stated_time(unused):
    with socket.socket() as held:  # bound, but nobody listens
        held.bind(("127.0.0.1", 0))
        begin, port = time.monotonic(), held.getsockname()[1]
        with pytest.raises(
            RuntimeError, match=f"nobody at the coordinator 127.0.0.1:{port} within 1 s"
        ):
            join(Ranks(1, 2, f"127.0.0.1:{port}", "flags"), seconds=1)
        assert time.monotonic() - begin < 10


def test_a_port_in_use_is_one_error(unused):
    with socket.socket(socket.AF_INET6) as held:
        held.bind(("", 0))
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(RuntimeError, match=f"Port {port}.*in use"):
            join(Ranks(0, 2, f"127.0.0.1:{port}", "flags"), seconds=1)
