"""The pages that tell the ideas, in a browser: figures with captions and alternative texts, folded answers, and what
can be played with: the Proxy Norm slider and the cost calculator."""

import json
import re

import numpy as np
import pytest
from test_browser import DESK, DOCS, PHONE, ROOT, barriers, browser, site, visit  # noqa: F401

from effnet_repro import figures
from effnet_repro.config import load_cases
from effnet_repro.gpu_plan import IMAGENET, plan_gpus
from effnet_repro.ops import get_ops
from effnet_repro.proxy_norm import proxy_statistics

STORY = """twenty_minutes group_conv norms proxy_norm half_resolution mbconv network efficientnet
proxy_norm_elsewhere batch_norm_limits pipeline""".split()


@pytest.mark.parametrize("name", STORY)
def test_a_story_has_figures_and_exercises(visit, name):  # noqa: F811
    page = visit(f"{name}.html")
    assert page.locator("main h2", has_text="Exercises").count() == 1
    folded = page.locator(
        "main details:not([open])", has=page.locator("summary", has_text="Answer")
    )
    assert folded.count() >= 2
    assert folded.locator(".cell-output").count() == folded.count()  # not shown before asked
    without = "(svgs) => svgs.filter((s) => !s.getAttribute('aria-label')).length"
    assert page.locator("main svg.figure").count() >= 1
    assert page.eval_on_selector_all("main svg.figure", without) == 0
    uncaptioned = "(fs) => fs.filter((f) => f.querySelector('svg.figure') && !f.querySelector('figcaption')).length"
    assert page.eval_on_selector_all("main figure", uncaptioned) == 0


def test_the_slider_counts_as_the_library_does(visit):  # noqa: F811
    page = visit("proxy_norm.html")
    asked = [(g, b) for g in (0.05, 0.7, 1.0, 3.0) for b in (-3.0, -1.5, 0.0, 2.0)]
    gamma, beta = np.array(asked).T
    mean, inv_std = proxy_statistics(get_ops("numpy"), gamma, beta, 0 * gamma, 0 * beta)
    told = page.evaluate("asked => asked.map((a) => proxySlider.statistics(...a))", asked)
    np.testing.assert_allclose([t["mean"] for t in told], mean, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose([t["inv_std"] for t in told], inv_std, rtol=1e-6)


def test_the_slider_by_keyboard(visit):  # noqa: F811
    page = visit("proxy_norm.html")
    box = page.locator("#proxy-slider")
    box.get_by_text("The proxy subtracts 0.21 and divides by 0.58.").wait_for()
    box.get_by_role("slider", name="bias").focus()
    page.keyboard.press("End")  # bias 3: nearly linear
    facts = box.locator("dd").all_inner_texts()
    assert float(facts[0]) > 2.5 and facts[2] == "0.00" and 0.95 < float(facts[3]) <= 1.0
    box.get_by_role("button", name="almost no signal").focus()
    page.keyboard.press("Enter")
    box.get_by_text("keeps Proxy Norm from blowing it up").wait_for()
    assert barriers(page) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_the_slider_works_in_files(visit):  # noqa: F811
    page = visit("proxy_norm.html", base=DOCS.as_uri() + "/")
    page.locator("#proxy-slider svg").wait_for()


# Name -> the place that every mention of it in running text leads to; "" for one that several modules have.
MEANT = {
    "build_model": "efficientnet.html#build_model",
    "ProxyNormAct": "keras_layers.html#proxynormact",
    "GroupConv2D": "keras_layers.html#groupconv2d",
    "MBConv": "keras_layers.html#mbconv",
    "proxy_statistics": "proxy_norm.html#proxy_statistics",
    "group_statistics": "norms.html#group_statistics",
    "Case": "config.html#case",
    "get_case": "config.html#get_case",
    "load_cases": "config.html#load_cases",
    "ModelSpec": "scaling.html#modelspec",
    "count": "scaling.html#count",
    "segments": "network.html#segments",
    "Segment": "network.html#segment",
    "Param": "network.html#param",
    "schedule": "pipeline.html#schedule",
    "describe_schedule": "pipeline.html#describe_schedule",
    "plan": "planner.html#plan",
    "learning_rate": "recipe.html#learning_rate",
    "rmsprop_step": "recipe.html#rmsprop_step",
    "mix": "augment.html#mix",
    "draw_mixing": "augment.html#draw_mixing",
    "epoch_path": "checkpoint.html#epoch_path",
    "get_ops": "ops.html#get_ops",
    "TrainContext": "ops.html#traincontext",
    "fused_norm": "fused_norm.html#fused_norm",
    "grouped_conv": "gpu_conv.html#grouped_conv",
    "draw_crops": "transforms.html#draw_crops",
    "epoch_order": "order.html#epoch_order",
    "check_layer": "testing.html#check_layer",
    "load": "checkpoint.html#load",
    "save": "checkpoint.html#save",
    "cross_entropy": "recipe.html#cross_entropy",
    "batch_statistics": "norms.html#batch_statistics",
    "load_keras_applications": "efficientnet.html#load_keras_applications",
    "training_batches": "source/data.readers.html",
    "Task": "source/runs.task.html",
    "Scores": "source/runs.scores.html",
    "mod32_warning": "half_resolution.html#mod32_warning",
    "Recorder": "source/runs.recorder.html",
    "Runtime": "source/runs.runtime.html",
    "open_data": "source/data.catalog.html",
    "train": "",
    "validate": "",
    "predict": "",
}


def test_names_lead_to_what_they_mean(site):  # noqa: F811
    link = re.compile(r'<a [^>]*?href="([^"]+)"[^>]*><code>(\w+)(?:\(\))?</code></a>')
    seen, wrong = set(), []
    for page in sorted(DOCS.glob("*.html")):
        if page.name == "api.html":  # lists every name under its module
            continue
        for href, name in link.findall(page.read_text()):
            if name not in MEANT:
                continue
            seen.add(name)
            full = page.name + href if href.startswith("#") else href.removeprefix("./")
            own = MEANT[name] and full.startswith(MEANT[name])
            if not own and page.name != full.partition("#")[0]:
                wrong.append(f"{page.name}: {name} leads to {href}")
    assert wrong == [] and len(seen) >= 30


def test_the_cost_calculator_counts_as_the_library_does(visit):  # noqa: F811
    page = visit("cases.html")
    data = json.loads(page.locator("#cost-data").text_content())
    assert set(data["cases"]) == set(load_cases())
    for gpus, device in ((1, "1 H100"), (4, "4 H100s")):
        for name in list(data["cases"])[::7]:
            case = load_cases()[name]
            told = page.evaluate(
                "([rate, epochs, images]) => costCalculator.hours(rate, epochs, images)",
                [data["cases"][name][device]["rate"], case.epochs, IMAGENET],
            )
            assert told == pytest.approx(plan_gpus(case, gpus)[0].hours)


def test_the_cost_calculator_by_keyboard(visit):  # noqa: F811
    page = visit("cases.html")
    box = page.locator("#cost-calculator")
    box.get_by_label("device").focus()
    page.keyboard.press("ArrowDown")  # one H100
    row = page.locator("table tbody tr", has_text="B0-G16-LN_PN-Half_16IPU_2x8").last
    told, unit = box.locator("dd").first.inner_text().split()
    assert unit == "hours" and float(told) == pytest.approx(
        float(row.locator("td").nth(1).inner_text()), abs=0.06
    )
    box.get_by_label("epochs").fill("0")
    box.get_by_text("numbers from 1 on").wait_for()
    box.get_by_label("epochs").fill("35")
    assert "minutes" in box.locator("dd").first.inner_text()
    assert barriers(page) == []
    page.set_viewport_size(PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_every_page_can_be_taken_away(site):  # noqa: F811
    for page in DOCS.glob("*.html"):
        (name,) = re.findall(r'href="files/nbs/(\w+\.ipynb)" download', page.read_text())
        assert (
            name.partition("_")[2].removesuffix(".ipynb") in (page.stem, "")
            or name == "index.ipynb"
        )
        assert json.loads((DOCS / "files" / "nbs" / name).read_text())["cells"]


def test_one_palette():
    "Scripts draw in the colors of `effnet_repro.figures`, which the light theme's sheet repeats."
    sheet = (ROOT / "nbs" / "styles.css").read_text()
    light = dict(re.findall(r"--figure-(\w+): (#\w+);", sheet.partition("alternate")[0]))
    assert light == {
        name: getattr(figures, name.upper()) for name in ("blue", "sky", "orange", "green", "amber")
    }
    assert figures.arm_style("G16-LN+PN", "Half")["label"].endswith("Proxy Norm, half resolution")
    assert len({arm.color for arm in figures.ARMS.values()}) == len(figures.ARMS)
