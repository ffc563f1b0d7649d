"""The thirty published cases: the same values as published, and each one builds, counts and learns."""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Optional, Tuple

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effnet_repro.augment import draw_mixing
from effnet_repro.cli import cases_command
from effnet_repro.cli.fields import field_arguments
from effnet_repro.config import (
    FIELDS,
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
from effnet_repro.fields import UNCHANGED, describe, option
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


# ---------------------------------------------------------------- the published file's own form


def mapping(name, merges=(), **values):
    """A block with an anchor, as in the published file: each `<<` on its own line."""
    lines = [f"{name}: &{name}"] + [f"  <<: *{m}" for m in merges]
    return "\n".join(lines + [f"  {k}: {json.dumps(v)}" for k, v in values.items()]) + "\n"


def published_form():
    """Our cases as a file of the published form: repeated merge keys, native sizes left out, the other key names."""
    one, text = CASES["B1-G16-LN_PN-Half_16IPU_4x4"], ""
    common = dict(eight_bit_io=True, enable_half_partials=True, no_stochastic_rounding=True)
    what = dict(model="efficientnet", dataset="imagenet", standard_imagenet=True)
    text += mapping("network_base", **what, precision="16.32", **common)
    same = "disable_variable_offloading lr_schedule label_smoothing epochs enable_recomputation pipeline_schedule"
    same += " cutmix_version internal_exchange_optimisation_target"
    same = {key: getattr(one, key) for key in same.split()}
    train = dict(optimiser="RMSprop", weight_avg_exp=[one.weight_average_decay], pipeline=True)
    text += mapping("train_base", **same, **train)
    copy = dict(precision="16.16", disable_variable_offloading=False, offload_fp32_weight_copy=True)
    text += mapping("copy", **copy)
    text += mapping("GN", groups=4, proxy_norm=False) + mapping("LN_PN", groups=1, proxy_norm=True)
    text += mapping("G1", group_dim=1, expand_ratio=6) + mapping(
        "G16", group_dim=16, expand_ratio=4
    )
    for name, case in CASES.items():
        size, group, norm = name.split("-")[:3]
        if f"{size}: &" not in text:
            mixing = {k: getattr(case, k) for k in ("mixup_alpha", "cutmix_lambda")}
            mixing = {k: v for k, v in mixing.items() if v is not None}
            text += mapping(size, ["network_base"], model_size=case.model_size, **mixing)
        if f"{size}-{group}-{norm}: &" not in text:
            text += mapping(f"{size}-{group}-{norm}", [size, group, norm])
        merges = ["train_base", f"{size}-{group}-{norm}"]
        merges += ["copy"] if case.precision == "16.16" else []
        ours = {v: k for k, v in PUBLISHED_KEYS.items()}
        wanted = "micro_batch_size gradient_accumulation num_replicas num_stages pipeline_splits"
        wanted += " enable_conv_dithering internal_exchange_optimisation_target"
        fields = {k: getattr(case, k) for k in wanted.split()}
        fields["available_memory_proportion"] = [str(v) for v in case.available_memory_proportion]
        if "-Half_" in name:
            fields["image_size"] = case.image_size
        fields = {ours.get(k, k): v for k, v in fields.items()}
        text += mapping(name, merges, name_suffix=name.split("_16IPU")[0][3:], **fields)
    return text


def write(tmp_path, text):
    path = tmp_path / "configs.yml"
    path.write_text(text)
    return path


def test_a_file_of_the_published_form_gives_the_thirty_cases(tmp_path):
    text = published_form()
    assert text.count("  <<: ") > 2 * 30 and text.count("image_size") == 12
    assert load_cases(write(tmp_path, text)) == CASES
    name = "B5-G1-GN-Native_16IPU_4x4"  # its last merge wins
    assert get_case(name, tmp_path / "configs.yml").precision == "16.16"


def authors_file():
    """The authors' own file, which is theirs to hand out: from EFFNET_REPRO_AUTHORS_CONFIGS, or beside the project."""
    beside = Path(__file__).parents[2] / "shared" / "reference" / "authors_configs.yml"
    path = Path(os.environ.get("EFFNET_REPRO_AUTHORS_CONFIGS") or beside)
    return path if path.is_file() else None


@pytest.mark.skipif(authors_file() is None, reason="the authors' configs.yml is not here")
def test_the_authors_own_file_gives_the_thirty_cases():
    assert load_cases(authors_file()) == CASES


def test_the_command_reads_a_file_of_the_published_form(tmp_path, capsys):
    path = write(tmp_path, published_form())
    assert cases_command(["--config-path", str(path), "--json"]) == 0
    theirs = capsys.readouterr().out
    assert cases_command(["--json"]) == 0
    assert theirs == capsys.readouterr().out


REPEATED = {  # What stands twice, and where: refused, in either form
    "a key": ("  label_smoothing: 0.1\n", "  label_smoothing: 0.1\n  label_smoothing: 0.2\n"),
    "the same key with the same value": ("  group_dim: 16\n", "  group_dim: 16\n  group_dim: 16\n"),
    "a case": (
        "\nB0-G1-GN-Native",
        "\nB0-G1-GN-Native_16IPU_2x8: {batch_size: 3}\nB0-G1-GN-Native",
    ),
    "an anchored block": ("G16: &G16", "G16: {group_dim: 8}\nG16: &G16"),
    "a quoted key": ("  groups: 4\n", "  groups: 4\n  'groups': 4\n"),
    "a quoted << is a key like others": ("  groups: 4\n", "  groups: 4\n  '<<': 1\n  '<<': 2\n"),
    "two names of one field": ("  groups: 4\n", "  groups: 4\n  norm_groups: 4\n"),
}


@pytest.mark.parametrize("what", REPEATED)
def test_other_repeated_keys_of_the_published_form_are_refused(tmp_path, what):
    old, new = REPEATED[what]
    text = published_form()
    assert old in text
    with pytest.raises(ValueError, match="stands twice|has both"):
        load_cases(write(tmp_path, text.replace(old, new, 1)))


OWN = """
sizes: {B0: &B0 {model_size: 0, mixup_alpha: 0.1}}
norms: {GN: &GN {norm: GN, norm_groups: 4}}
cases:
  mine: {<<: [*B0, *GN], group_size: 16, expand_ratio: 4, image_size: 32,
    micro_batch_size: 768, gradient_accumulation: 1}
"""


@pytest.mark.parametrize(
    "old, new",
    [
        ("<<: [*B0, *GN]", "<<: *B0, <<: *GN"),  # on one line
        ("{<<: [*B0, *GN]", "\n    {<<: *B0,\n    <<: *GN"),
        ("group_size: 16", "group_size: 16, group_size: 16"),
        ("  mine:", "  mine: {}\n  mine:"),
        ("norms:", "sizes: {}\nnorms:"),
    ],
)
def test_every_repeated_key_of_our_form_is_refused(tmp_path, old, new):
    assert load_cases(write(tmp_path, OWN))["mine"].norm == "GN"
    with pytest.raises(ValueError, match="stands twice"):
        load_cases(write(tmp_path, OWN.replace(old, new, 1)))


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_case_counts_as_its_network(name):
    case = CASES[name]
    same = CASES[NETWORKS[case.model_size, case.group_size, case.norm]]
    assert count(case).params == count(same).params


# In the short run the three arms of the smallest size, and the largest with everything.
SHORT = [k for k in NETWORKS if k[0] == 0 or k == (5, 16, "LN_PN")]


@pytest.mark.parametrize(
    "name",
    [n if k in SHORT else pytest.param(n, marks=pytest.mark.long) for k, n in NETWORKS.items()],
)
def test_every_network_builds_counts_and_learns(name):
    """One weight update on two 32-pixel images, not compiled: every trained array moves and stays finite."""
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
        **draw_mixing(**mixing, seed=0, update=0, groups=1, group_size=2),
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
    """Segments whose residual branch was not dropped for both images."""
    from effnet_repro.ops import TrainContext, get_ops
    from effnet_repro.scaling import blocks

    ops = get_ops("tensorflow")
    context = TrainContext(ops, program.seed, 0, 0)
    gone = set()
    for b in blocks(spec):
        if b.residual and b.drop_path_rate:
            if not np.asarray(
                context.mask(b.name, "drop_path", b.drop_path_rate, (2, 1, 1, 1))
            ).any():
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


# ---------------------------------------------------------------- fields that describe themselves


def test_fields_describe_themselves():
    assert list(FIELDS) == [f.name for f in dataclasses.fields(Case)]
    for name, field in FIELDS.items():
        assert len(field.help) > 3 and field.help[-1] != ".", name
        if field.default is not dataclasses.MISSING and name not in MUST_BE_GIVEN:
            assert field.check(field.default) == field.default, name


MUST_BE_GIVEN = ("micro_batch_size", "gradient_accumulation")  # their default, 0, is refused


@dataclasses.dataclass(frozen=True)
class _Record:
    """small"""

    share: Optional[float] = option("A share", 0.5, range="[0, 1)", published="part")
    sizes: Tuple[int, ...] = option("Sizes", ())
    way: str = option("How", "left", choices=("left", "right"), earlier="right")
    scale: float = option("A factor", 1, range="(0, 2^3]", hint="Usual: 1.")
    on: bool = option("Whether", True)


@pytest.mark.parametrize(
    "name, good, bad, said",
    [
        ("share", [0, 0.99, None], [1, -0.1], "in \\[0, 1\\)"),
        ("share", [0.5], ["a", True, float("nan"), float("inf"), ()], "a finite number"),
        ("sizes", [(), (1, 2), [3]], [1, ("a",), (True,), None, (-1,)], "a list"),
        ("way", ["right"], ["up", True, None, ["left"]], "Unknown way .* in here"),
        ("scale", [8, 0.01], [0, 9, -1], "in \\(0, 2\\^3\\].*\\(here\\). Usual: 1."),
        ("on", [True, False], [1, "yes", None], "true or false"),
    ],
)
def test_values_are_checked_by_their_field(name, good, bad, said):
    field = describe(_Record)[name]
    for value in good:
        assert field.check(value) == (tuple(value) if isinstance(value, list) else value)
    for value in bad:
        with pytest.raises(ValueError, match=said):
            field.check(value, "here")


def test_a_field_is_all_that_there_is_to_say():
    fields = describe(_Record)
    assert fields["share"].about == "A share (in [0, 1); published: part)"
    assert fields["way"].earlier == "right" and fields["on"].earlier is UNCHANGED
    assert {f.group for f in fields.values()} == {"small"}
    with pytest.raises(ValueError, match="Unknown part of a field 'legal'"):
        option("A share", 0.5, legal=(1, 2))


@pytest.mark.parametrize("name", [n for n in FIELDS if n not in ("name", "precision")])
def test_every_field_is_a_flag_with_its_help(name):
    parser = argparse.ArgumentParser()
    field_arguments(parser)
    flags = {a.dest: a for a in reversed(parser._actions)}  # the first of each field
    assert flags[name].help == FIELDS[name].about.replace("%", "%%")
    assert f"--{name.replace('_', '-')}" in flags[name].option_strings
