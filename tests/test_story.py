"""The pages that tell the ideas, in a browser: figures with captions and alternative texts, folded answers, and what
can be played with: the Proxy Norm slider and the cost calculator."""

import re

import numpy as np
import pytest
from test_browser import DESK, DOCS, PHONE, ROOT, barriers, browser, site, visit  # noqa: F401

from effnet_repro import figures
from effnet_repro.ops import get_ops
from effnet_repro.proxy_norm import proxy_statistics

STORY = """twenty_minutes group_conv norms proxy_norm half_resolution mbconv network efficientnet
proxy_norm_elsewhere pipeline""".split()


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


def test_one_palette():
    "Scripts draw in the colors of `effnet_repro.figures`, which the light theme's sheet repeats."
    sheet = (ROOT / "nbs" / "styles.css").read_text()
    light = dict(re.findall(r"--figure-(\w+): (#\w+);", sheet.partition("alternate")[0]))
    assert light == {
        name: getattr(figures, name.upper()) for name in ("blue", "sky", "orange", "green", "amber")
    }
    assert figures.arm_style("G16-LN+PN", "Half")["label"].endswith("Proxy Norm, half resolution")
    assert len({arm.color for arm in figures.ARMS.values()}) == len(figures.ARMS)
