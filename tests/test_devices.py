"""Several devices of one process: each makes its own images, and nothing but sums goes from one to another."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import PYTHON, SMALL

from effnet_repro.config import for_one_device, get_case, override

PROGRAM = "import sys, test_devices; test_devices.main(*sys.argv[1:])"


def case_of(micro):
    case = for_one_device(get_case("B1-G16-LN_PN-Half_16IPU_4x4"), micro, 64)
    return override(case, model_size="cifar", image_size=32, mix_group_size=8, **SMALL)


def main(devices, path):
    "One training step on a resident set; saves the weights, and what the compiled step sends"
    import re

    import jax
    import keras
    import tiny

    from effnet_repro.data import open_data
    from effnet_repro.efficientnet import build_model, get_weights, set_weights, weights_by_name
    from effnet_repro.network import segments
    from effnet_repro.scaling import ModelSpec
    from effnet_repro.training import Program, TrainingModel, stream, use_devices

    stream.has_jax_gpu = lambda: True  # the set stays on the device
    tiny.shrink()
    case, data = case_of(8 if devices == "4" else 32), open_data(verbose=False)
    spec = ModelSpec.from_case(case, num_classes=data.num_classes)
    program = Program(case, spec, tuple(s.name for s in segments(spec)), "float32", 0)
    with use_devices(case):
        network = build_model(spec, image_size=32, dtype="float32", seed=0)
        model = TrainingModel(network, program)
        ((batch,),) = [one for one, _ in zip(stream.updates(case, data, 0), range(1))]
        some = (model.trainable_variables, model.non_trainable_variables)
        state = tuple([v.value for v in vs] for vs in (*some, model.optimizer.variables, []))
        assert batch["pixels"].sharding.is_fully_replicated
        layout = keras.distribution.distribution()
        if layout is not None:
            place = lambda v: jax.device_put(v, layout.get_data_layout(v.shape).backend_layout)
            own = {n: jax.tree.map(place, v) for n, v in batch.items() if n != "pixels"}
            batch = {**own, "pixels": batch["pixels"]}
        step = jax.jit(model.train_step).lower(state, (batch,)).compile()
        _, (trained, *_) = step(state, (batch,))
        names = {id(v): n for n, v in weights_by_name(network).items()}
        values = [np.asarray(v) for v in trained]
        set_weights(
            network,
            {**get_weights(network), **{names[id(v)]: x for v, x in zip(some[0], values)}},
        )
        found = re.findall(r" (all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", step.as_text())
        places = len(values and trained[0].sharding.device_set)
    np.savez(path, **{n.replace("/", "|"): w for n, w in get_weights(network).items()})
    print(json.dumps({"sent": sorted(set(found)), "places": places}))


def run(devices, path):
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = {**PYTHON, "KERAS_BACKEND": "jax", "XLA_FLAGS": flags}
    words = [sys.executable, "-c", PROGRAM, str(devices), str(path)]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), np.load(path)


def join():
    "What two devices have made becomes one batch, and the message about devices that stay out"
    import jax
    import jax.numpy as jnp
    import keras

    from effnet_repro.training import stream, use_devices

    with use_devices(case_of(8)):
        parts = [jax.device_put(jnp.full((2, 3, 3, 3), i), jax.local_devices()[i]) for i in (0, 1)]
        whole = stream.joined(parts)
        layout = keras.distribution.distribution().get_data_layout(whole.shape).backend_layout
        places = [int(one.data.mean()) for one in whole.addressable_shards]
        print(json.dumps([whole.shape, places, whole.sharding == layout, stream.joined(3)]))
    with use_devices(override(case_of(32), mix_group_size=64)):
        pass


def test_parts_of_a_batch_are_joined_where_they_are():
    env = {**PYTHON, "KERAS_BACKEND": "jax"}
    env["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    words = [sys.executable, "-c", "import test_devices; test_devices.join()"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    both, found, alone = done.stdout.splitlines()
    assert both == "devices: 2 of 2 share the 8 micro-batches of a step"
    assert json.loads(found) == [[4, 3, 3, 3], [0, 1], True, 3]
    assert alone.startswith("devices: 1 of 2 share the 2 micro-batches of a step: 2 do not divide")
    assert "1 groups of mixed images (mix_group_size)" in alone


@pytest.mark.long
def test_four_devices_send_sums_alone_and_train_as_one(tmp_path):
    said, four = run(4, tmp_path / "four.npz")
    assert said == {"sent": ["all-reduce"], "places": 4}
    said, one = run(1, tmp_path / "one.npz")
    assert said == {"sent": [], "places": 1}
    for name in one.files:
        error = np.linalg.norm(one[name] - four[name])
        assert error <= 1e-4 * np.linalg.norm(one[name]) + 1e-6, name


def test_what_several_processes_have_is_put_together_leaf_by_leaf(monkeypatch):
    "The cuts of a resident set are a dictionary within the batch; a part of each belongs to each process"
    jax, keras = pytest.importorskip("jax"), pytest.importorskip("keras")
    from types import SimpleNamespace

    from effnet_repro.training import steps

    layout = lambda shape: SimpleNamespace(backend_layout=tuple(shape))
    shared = SimpleNamespace(get_data_layout=layout)
    monkeypatch.setattr(keras.distribution, "distribution", lambda: shared)
    monkeypatch.setattr(steps, "has_other_processes", lambda: True)
    whole = lambda layout, value: (layout, len(np.atleast_1d(value)))
    monkeypatch.setattr(jax, "make_array_from_process_local_data", whole)
    cuts = {"begin": np.zeros(4), "parts": np.zeros((4, 4)), "zero": np.int32(0)}
    (found,) = steps._placement()(({"pixels": 7, "cuts": cuts, "labels": np.zeros(4)},))
    assert found["pixels"] == 7 and found["labels"] == ((4,), 4)
    assert found["cuts"] == {"begin": ((4,), 4), "parts": ((4, 4), 4), "zero": ((), 1)}
