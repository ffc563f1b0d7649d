"""The calculator of hours on GPUs: from measured rates, and close to them where it projects."""

import json
from pathlib import Path

import pytest

from effnet_repro import gpu_plan
from effnet_repro.cli import plan_command
from effnet_repro.config import get_case, override

ROOT = Path(__file__).parents[1]
B0 = "B0-G16-LN_PN-Half_16IPU_2x8"


def test_rates_are_those_of_the_results():
    "`python tests/test_gpu_plan.py` writes the file anew."
    assert gpu_plan.rates() == gpu_plan.collect(ROOT / "results")


def test_a_measured_step_is_taken_as_it_is():
    known = gpu_plan.rates()
    rate, projected = gpu_plan.step_rate(get_case(B0), known)
    assert not projected
    assert rate == pytest.approx(known["steps"]["B0-G16-LN_PN 160"] * min(known["of_bare_step"], 1))


def test_projections_of_measured_networks_are_within_a_fifth():
    known = gpu_plan.rates()
    for name in (B0, "B4-G16-LN_PN-Half_16IPU_4x4", "B4-G16-LN_PN-Native_16IPU_4x4"):
        case = get_case(name)
        rate, _ = gpu_plan.step_rate(case, known)
        arm = f"{name.partition('-Half')[0].partition('-Native')[0]} {case.image_size}"
        steps = {n: v for n, v in known["steps"].items() if n != arm}
        guess, projected = gpu_plan.step_rate(case, {**known, "steps": steps})
        assert projected and 0.8 < guess / rate < 1.25, name


def test_hours_and_bottleneck():
    (one,) = gpu_plan.plan_gpus(get_case(B0), reader="photographs")
    assert one.bottleneck == "reader" and one.projected == ""
    per_s = 350 * gpu_plan.IMAGENET / one.hours / 3600
    assert per_s == pytest.approx(one.reader_images_per_s)
    (two,) = gpu_plan.plan_gpus(get_case(B0), 2, "photographs")
    assert two.hours == pytest.approx(one.hours / 2)
    best = gpu_plan.plan_gpus(get_case(B0))[0]
    assert best.reader == "raw 192" and best.bottleneck == "GPU" and best.hours < 6
    large = gpu_plan.plan_gpus(get_case("B4-G16-LN_PN-Half_16IPU_4x4"))[0]
    assert large.bottleneck == "GPU"
    with pytest.raises(ValueError, match="reader 'tape'"):
        gpu_plan.plan_gpus(get_case(B0), reader="tape")


@pytest.mark.parametrize(
    "name, size, packed",
    [
        (B0, 160, {"raw 192", "jpeg 256", "jpeg 256, GPU"}),
        ("B0-G16-LN_PN-Native_16IPU_2x8", 224, {"jpeg 256", "jpeg 256, GPU"}),
        ("B4-G16-LN_PN-Half_16IPU_4x4", 252, set()),
    ],
)
def test_packed_sets_are_only_offered_where_they_have_the_pixels(name, size, packed):
    case = get_case(name)
    assert case.image_size == size
    found = {p.reader for p in gpu_plan.plan_gpus(case)}
    assert found == packed | {"photographs", "photographs, GPU"}
    for reader in {"raw 192", "jpeg 256"} - packed:
        with pytest.raises(ValueError, match=f"too few pixels for {size} px.*photographs"):
            gpu_plan.plan_gpus(case, reader=reader)


def test_the_command(capsys):
    assert not plan_command([B0, "--device", "gpu", "--gpus", "4", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert said["plans"][0]["GPUs"] == 4
    plan_command([B0, "--device", "gpu", "--image-size", "224", "--reader", "photographs"])
    assert "224 px" in capsys.readouterr().out


def test_smaller_images_take_less_time():
    case = get_case("B2-G16-LN_PN-Half_16IPU_4x4")
    large = gpu_plan.plan_gpus(override(case, image_size=260))[0]
    assert gpu_plan.plan_gpus(case)[0].hours < large.hours


if __name__ == "__main__":
    found = gpu_plan.collect(ROOT / "results")
    (ROOT / "results" / gpu_plan.RATES).write_text(json.dumps(found, indent=1) + "\n")
