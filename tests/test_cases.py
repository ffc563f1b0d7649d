"""The thirty published cases: the same values as published, and each one builds, counts and learns."""

import dataclasses
import json
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_repro.augment import draw_mixing
from effnet_repro.config import (
    PUBLISHED_KEYS,
    Case,
    case_from_dict,
    case_to_dict,
    for_one_device,
    get_case,
    load_cases,
    override,
)
from effnet_repro.efficientnet import build_model, get_weights, weights_by_name
from effnet_repro.recipe import trained_segments
from effnet_repro.scaling import ModelSpec, count
from effnet_repro.training import Program, TrainingModel

PUBLISHED_FILE = Path(__file__).parent / "data" / "published_cases.json"
PUBLISHED = json.loads(PUBLISHED_FILE.read_text())
CASES, READ_AS_PUBLISHED = load_cases(), load_cases(PUBLISHED_FILE)
# Half and Native are one network
NETWORKS = {(c.model_size, c.group_size, c.norm): n for n, c in sorted(CASES.items())}


def test_the_same_thirty_names():
    assert set(CASES) == set(PUBLISHED) and len(CASES) == 30


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_resolved_values_are_the_published_ones(name):
    case, published = CASES[name], dict(PUBLISHED[name])
    assert READ_AS_PUBLISHED[name] == case
    assert case.weight_average_decay == 0.97 and not case.stochastic_rounding
    assert name.startswith(f"B{published['model_size']}-{published['name_suffix']}_")
    assert case.proxy_norm is published["proxy_norm"]
    assert case.pipeline_splits == tuple(published["pipeline_splits"])
    for key in set(published) & {*PUBLISHED_KEYS, *(f.name for f in dataclasses.fields(Case))}:
        if key not in ("optimiser", "pipeline_splits", "available_memory_proportion"):
            assert getattr(case, PUBLISHED_KEYS.get(key, key)) == published[key], key


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_counts_as_its_network(name):
    case = CASES[name]
    same = CASES[NETWORKS[case.model_size, case.group_size, case.norm]]
    assert count(case).params == count(same).params


@pytest.mark.parametrize("name", sorted(NETWORKS.values()))
def test_every_network_builds_counts_and_learns(name):
    """One weight update on two 32-pixel pictures, not compiled: every trained array moves and stays finite."""
    published = CASES[name]
    counts = count(published)
    small = override(for_one_device(published, 2, 2), image_size=32, warmup_epochs=0)
    spec = ModelSpec.from_case(small)
    network = build_model(spec, image_size=32)
    before = get_weights(network)
    assert sum(v.size for v in before.values()) == counts.params == network.count_params()
    names = [layer.segment.name for layer in network.layers[1:]]
    program = Program(small, spec, trained_segments(names, None), "float32", 0)
    model, rng = TrainingModel(network, program), np.random.default_rng(0)
    mixing = dict(mixup_alpha=small.mixup_alpha, cutmix_lambda=small.cutmix_lambda)
    batch = {
        "images": rng.integers(0, 256, (2, 32, 32, 3)).astype("uint8"),
        "labels": np.int32([1, 999]),
        "update": np.int32(0),
        "learning_rate": np.float32(0.01),
        **draw_mixing(**mixing, seed=0, update=0, micro_batches=1, micro_batch_size=2),
    }
    logs = model.train_step({k: keras.ops.convert_to_tensor(v) for k, v in batch.items()})
    assert np.isfinite(float(logs["loss"])) and 4 < float(logs["loss"]) < 12
    after = get_weights(network)
    dropped = {b.name for b in network.layers[1:] if b.segment.name not in _alive(spec, program)}
    for key, value in after.items():
        assert np.isfinite(value).all(), key
        if not any(key.startswith(f"all/{d}") for d in dropped):
            assert (value != before[key]).any(), key
    assert len(weights_by_name(network)) == len(after)


def _alive(spec, program):
    """Segments whose residual branch was not dropped for both pictures."""
    from effnet_repro.ops import Rng, get_ops
    from effnet_repro.scaling import blocks

    ops = get_ops("tensorflow")
    rng = Rng(ops, program.seed, 0, 0)
    gone = set()
    for b in blocks(spec):
        if b.residual and b.drop_path_rate:
            if not np.asarray(rng.mask(b.name, "drop_path", b.drop_path_rate, (2, 1, 1, 1))).any():
                gone.add(b.name)
    return set(program.trained) - gone


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 4096))
def test_batch_arithmetic_holds_or_is_refused(micro, replicas, whole):
    case = get_case("B0-G16-GN-Half_16IPU_2x8")
    try:
        new = override(case, micro_batch_size=micro, num_replicas=replicas, global_batch_size=whole)
    except ValueError as e:
        assert whole % (micro * replicas) and "multiple of micro_batch_size" in str(e)
    else:
        assert new.micro_batch_size * new.gradient_accumulation * new.num_replicas == whole


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(CASES)), st.data())
def test_cases_survive_json_whatever_is_overridden(name, data):
    changes = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "image_size": st.integers(32, 600),
                "epochs": st.floats(0.5, 400),
                "drop_path_rate": st.floats(0, 0.9),
                "label_smoothing": st.floats(0, 0.9),
                "mixup_alpha": st.floats(0, 1),
            },
        )
    )
    case = override(CASES[name], **changes)
    assert case_from_dict(json.loads(json.dumps(case_to_dict(case)))) == case


def test_fields_are_documented():
    source = (Path(__file__).parents[1] / "effnet_repro" / "config.py").read_text()
    for field in dataclasses.fields(Case):
        line = next(li for li in source.splitlines() if li.strip().startswith(f"{field.name}: "))
        assert "  # " in line, field.name
