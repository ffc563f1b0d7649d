"""Two hosts that train one case, a process on each: they share nothing but a cable. All of it is marked long."""

import pytest
from process_runs import Runs, checkpoint, free_port, worst
from two_hosts import ADDRESSES, Hosts

pytest.importorskip("jax")
pytestmark = pytest.mark.long
TOLERANCE = 2e-6  # As in test_processes.py


@pytest.fixture(params=[False, True], ids=["named by address", "named by loopback"])
def hosts(request):
    try:
        with Hosts(request.param) as made:
            yield made
    except RuntimeError as error:
        pytest.skip(f"two hosts cannot be made here: {error}")


def test_two_hosts_train_as_one(tmp_path, hosts):
    (tmp_path / "one").mkdir()
    whole = Runs(tmp_path / "one", count=1)
    whole.alone("--max-steps", 2)
    port = free_port()
    runs = Runs(tmp_path, coordinator=f"{ADDRESSES[0]}:{port}", hosts=hosts)
    runs.start("--max-steps", 2)
    assert runs.wait(400) == [0, 0], (runs.err(0), runs.err(1))
    assert not runs.run_dir(1).exists()
    (step, ours), (last, theirs) = checkpoint(runs.run_dir()), checkpoint(whole.run_dir())
    assert step == last == 2 and worst(ours, theirs) < TOLERANCE
