"""The built site in a browser, as a reader meets it: every page, both themes, a phone and a desk,
with the keyboard alone. Debian's Chromium is driven by Playwright; nothing is downloaded."""

import functools
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import tree  # noqa: E402

from effnet_repro.config import load_cases  # noqa: E402
from effnet_repro.pipeline import (  # noqa: E402
    SCHEDULES,
    describe_schedule,
    overlap,
    schedule,
)
from effnet_repro.scaling import mod32_warning  # noqa: E402

DOCS, SHOTS = ROOT / "_docs", ROOT / "_screenshots"
AXE = (ROOT / "tests" / "vendor" / "axe-core" / "axe.min.js").read_text()
PAGES = [tree.page_name(p.name).replace(".ipynb", ".html") for p in tree.notebooks()]
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 740}
TALLEST_SHOT = 3000  # pixels; the longest page has fifty thousand


def unavailable(what):
    "Skip on a reader's own machine; fail where the whole check runs."
    if os.environ.get("CI") == "true":
        pytest.fail(what, pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="module")
def site():
    "The address of the built site, which is the docs step's and must not be older than its sources."
    if not (DOCS / "index.html").exists():
        unavailable("there is no _docs/: run `make docs` first")
    built = (DOCS / "index.html").stat().st_mtime
    sources = [*(ROOT / "nbs").rglob("*"), *(ROOT / ".ci").glob("*.py"), ROOT / "_quarto.yml"]
    newer = [p for p in sources if p.is_file() and p.stat().st_mtime > built]
    if newer and os.environ.get("CI") != "true":
        names = ", ".join(str(p.relative_to(ROOT)) for p in newer[:3])
        unavailable(f"_docs/ is older than {names}: run `make docs` first")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(DOCS))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
    if path is None:
        unavailable("there is no Chromium here: apt-get install -y chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed: run `make venv`")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path)
        yield started
        started.close()


@pytest.fixture
def visit(browser, site):
    "A function that opens a page; whatever goes wrong on it fails the test."
    wrong, contexts = [], []

    def one(name, size=DESK, theme="light", base=site):
        context = browser.new_context(viewport=size, color_scheme=theme, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(10_000)

        def asked(request):
            if not request.url.startswith((base, "data:", "blob:")):
                wrong.append(f"{name}: asks {request.url}")

        def answered(response):
            if response.status >= 400:
                wrong.append(f"{name}: {response.status} for {urlsplit(response.url).path}")

        def said(message):
            if message.type in ("error", "warning"):
                wrong.append(f"{name}: the console says {message.text}")

        def failed(request):
            if request.failure != "net::ERR_ABORTED":  # the reader went on to another page
                wrong.append(f"{name}: could not load {request.url}")

        page.on("request", asked)
        page.on("response", answered)
        page.on("console", said)
        page.on("pageerror", lambda error: wrong.append(f"{name}: {error}"))
        page.on("requestfailed", failed)
        page.goto(base + name, wait_until="load")
        return page

    yield one
    for context in contexts:
        context.close()
    assert wrong == []


def barriers(page, only_colours=False):
    "What axe finds that is serious or critical."
    # Code is colored by one palette: its first blocks speak for the others.
    away = "main div.cell:nth-of-type(n + 9) pre code span"
    rules = '{runOnly: ["color-contrast"], ' if only_colours else "{"
    page.evaluate(AXE)
    found = page.evaluate(
        f"axe.run({{exclude: [{away!r}]}}, {rules}resultTypes: ['violations']}})"
    )["violations"]
    return [
        f"{v['id']}: {v['nodes'][0]['html'][:150]} ({v['nodes'][0]['failureSummary'][:250]})"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]


def too_wide(page):
    "What stands out of the page at the right, and is in no box that scrolls by itself."
    return page.evaluate(
        """() => {
        const width = document.documentElement.clientWidth;
        const scrolls = (e) => e && e !== document.body
            && (["auto", "scroll"].includes(getComputedStyle(e).overflowX)
                || getComputedStyle(e).textOverflow === "ellipsis" || scrolls(e.parentElement));
        const hidden = (e) => e.closest("#quarto-sidebar, .katex, .skip-link, svg");
        const out = [...document.querySelectorAll("body *")].filter((e) =>
            e.getBoundingClientRect().right > width + 1 && !hidden(e) && !scrolls(e.parentElement));
        if (document.documentElement.scrollWidth > width) out.push(document.documentElement);
        return out.slice(0, 5).map((e) => e.outerHTML.slice(0, 120));
        }"""
    )


def scrolled(page):
    """Code, output, formulas and tables that are wider than the room they have, folded ones opened.

    Tables that can be searched may be, and on a phone tables of many numbers.
    """
    return page.evaluate(
        """() => {
        document.querySelectorAll("main details").forEach((d) => { d.open = true; });
        const phone = document.documentElement.clientWidth < 576;
        const boxes = "main :is(pre, .cell-output-display, .sd-table, .math.display, .katex-display, .play-scroll)";
        return [...document.querySelectorAll(boxes)].filter((e) => e.offsetParent
            && e.scrollWidth > e.clientWidth + 1 && !e.closest(".sortable") && !e.querySelector(".sortable")
            && !(phone && e.querySelector("table.long")))
            .map((e) => `${e.scrollWidth} in ${e.clientWidth}: ${e.textContent.trim().slice(0, 80)}`);
        }"""
    )


def uncaptioned(page):
    "Drawn figures without a caption, by their alternative text."
    return page.eval_on_selector_all(
        "main svg.figure",
        "(all) => all.filter((s) => !s.closest('figure')?.querySelector('figcaption')).map((s) => s.ariaLabel)",
    )


def unrendered(page):
    "Marks of Markdown or of a formula in running text, where they should have become something."
    return page.evaluate(
        r"""() => {
        const text = document.querySelector("main").cloneNode(true);
        text.querySelectorAll("pre, code, .katex, svg, script").forEach((e) => e.remove());
        return text.textContent.match(/\]\(|```|\\[[(]|\\(?:frac|times|text|beta|gamma|sqrt)|\$\$|:::/g) || [];
        }"""
    )


def shoot(page, name):
    "Keep an image of the page for who looks at it; nobody does where the whole check runs."
    if os.environ.get("CI") == "true":
        return
    SHOTS.mkdir(exist_ok=True)
    height = page.evaluate("document.documentElement.scrollHeight")
    size = {**page.viewport_size, "height": min(height, TALLEST_SHOT)}
    page.screenshot(path=SHOTS / f"{name}.png", full_page=True, clip={"x": 0, "y": 0, **size})


@pytest.mark.parametrize("name", [*PAGES, "source/config.html"])
def test_page(visit, name):
    page = visit(name)
    stem = name.replace("/", "-").removesuffix(".html")
    assert page.title() and page.locator("h1").count() >= 1
    assert page.locator(".katex-error").count() == 0
    assert unrendered(page) == [] and uncaptioned(page) == []
    assert barriers(page) == []
    assert name not in PAGES or scrolled(page) == []
    shoot(page, f"{stem}-desk-light")
    if name in PAGES:
        page.locator(".scheme-switch").click()
        page.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
        assert barriers(page, only_colours=True) == []
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(50)
    assert too_wide(page) == []
    assert name not in PAGES or scrolled(page) == []
    shoot(page, f"{stem}-phone-dark")


def test_the_pages_follow_each_other(visit):
    page, seen = visit(PAGES[0], PHONE), []
    while True:
        seen.append(urlsplit(page.url).path.lstrip("/"))
        onward = page.locator(".nav-page-next a")
        if not onward.count():
            break
        with page.expect_navigation():
            onward.click()
    assert sorted(seen) == sorted(PAGES) and seen[0] == "index.html"
    with page.expect_navigation():
        page.locator(".nav-page-previous a").click()
    assert page.url.endswith(seen[-2])


def test_the_text_and_the_pages_by_keyboard(visit):
    page = visit("config.html")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip-link"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "MAIN"
    fold = page.get_by_role("button", name="How it is built")
    link = page.get_by_role("navigation", name="Pages").get_by_role("link", name="Scaling")
    assert link.is_visible()
    fold.focus()
    page.keyboard.press("Enter")
    link.wait_for(state="hidden")
    page.keyboard.press("Space")
    link.wait_for(state="visible")
    link.focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/scaling.html")


def test_the_pages_on_a_phone(visit):
    page = visit("norms.html", PHONE)
    button, sidebar = page.get_by_role("button", name="Pages"), page.locator("#quarto-sidebar")
    assert not sidebar.locator("a.active").is_visible()
    button.focus()
    page.keyboard.press("Enter")
    sidebar.locator("a.active").wait_for(state="visible")
    assert button.get_attribute("aria-expanded") == "true"
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "page"
    assert barriers(page) == []
    page.keyboard.press("Escape")
    sidebar.locator("a.active").wait_for(state="hidden")
    assert "Pages" in page.evaluate("document.activeElement.textContent")


@pytest.mark.parametrize(
    "query, first",
    [
        ("proxy norm", "proxy_norm.html"),
        ("mod-32", "half_resolution.html"),
        ("Unknown case 'B9-G1-GN'. Did you mean", "errors.html"),
        ("build_model", "efficientnet.html#build_model"),
        ("resume after an interruption", ""),
    ],
)
def test_search_finds(visit, query, first):
    page = visit("index.html", PHONE)
    page.keyboard.press("/")
    page.keyboard.type(query)
    results = page.locator(".search-result")
    results.first.wait_for()
    box = page.locator(".smalldocs-search-results").bounding_box()
    assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
    assert results.first.get_attribute("href").removeprefix("./").startswith(first)
    place = results.nth(1).get_attribute("href").removeprefix("./")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_url(f"**/{place}")


def test_search_forgives_and_says_when_it_finds_nothing(visit):
    page = visit("index.html")
    page.get_by_role("searchbox").fill("proxi norn")
    page.locator(".search-result").first.wait_for()
    page.get_by_role("searchbox").fill("zyzzyva quagga")
    page.get_by_text("No results").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("No results").wait_for(state="hidden")


def test_search_and_theme_work_in_files(visit):
    page = visit("index.html", base=DOCS.as_uri() + "/")
    page.get_by_role("searchbox").fill("proxy norm")
    page.locator(".search-result").first.wait_for()
    assert (
        page.locator(".search-result").first.get_attribute("href").startswith("./proxy_norm.html")
    )


def test_theme_is_the_systems_until_chosen(visit):
    page = visit("index.html", theme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    switch = page.get_by_role("button", name="Dark theme")
    dark = page.evaluate(ground)
    assert switch.get_attribute("aria-pressed") == "true"
    switch.focus()
    page.keyboard.press("Enter")
    page.wait_for_function(f"{ground} !== {dark!r}")
    assert switch.get_attribute("aria-pressed") == "false"
    page.goto(page.url.replace("index", "ops"))
    assert page.evaluate(ground) != dark, "the choice is forgotten on the next page"
    assert page.get_by_role("button", name="Dark theme").get_attribute("aria-pressed") == "false"


def test_cases_are_searched_and_sorted_by_keyboard(visit):
    page = visit("cases.html")
    table = page.get_by_role("region", name="The thirty cases").locator("table")
    rows = table.locator("tbody tr:visible")
    first = table.locator("tbody tr >> nth=0").locator("th")
    published = list(load_cases())
    assert rows.count() == 30 and first.inner_text() == published[0]
    page.get_by_role("searchbox", name="Search the cases").focus()
    page.keyboard.type("b2 half")
    page.get_by_text("2 of 30").wait_for()
    expected = [name for name in published if name.startswith("B2") and "Half" in name]
    assert rows.locator("th").all_inner_texts() == expected
    page.keyboard.press("Escape")
    page.get_by_text("30 of 30").wait_for()

    def column(title):
        titles = [t.strip() for t in table.locator("thead th").all_inner_texts()]
        return [
            row.split("\t")[titles.index(title)] for row in table.inner_text().splitlines()[-30:]
        ]

    title = "paper: POD16, images/s"
    button = table.get_by_role("button", name=title)
    button.focus()
    page.keyboard.press("Enter")
    speeds = [float(v.replace(",", "")) for v in column(title)]
    assert speeds == sorted(speeds) and speeds[0] < speeds[-1]
    assert table.locator("[aria-sort]").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Enter")
    assert [float(v.replace(",", "")) for v in column(title)] == speeds[::-1]
    page.keyboard.press("Enter")
    assert first.inner_text() == published[0] and table.locator("[aria-sort]").count() == 0


def test_fine_tune_sizes_are_those_of_the_library(visit):
    page = visit("cases.html")
    pairs = [
        (train, other) for train in (160, 176, 196, 204, 252, 328) for other in range(32, 500, 7)
    ]
    told = page.evaluate("pairs => pairs.map(([a, b]) => sizePicker.nearest(a, b))", pairs)
    for (train, other), sizes in zip(pairs, told):
        warning = mod32_warning(train, other)
        assert (warning is None) == (sizes == [])
        assert warning is None or warning.endswith(f"Use {' or '.join(map(str, sizes))}.")
    picker = page.locator("#size-picker")
    assert "1.8 times" in picker.inner_text() and "-p image_size 240" in picker.inner_text()
    picker.get_by_label("fine-tune at").fill("224")
    picker.get_by_text("Take 208 or 240").wait_for()
    picker.get_by_role("button", name="208").focus()
    page.keyboard.press("Space")
    picker.get_by_text("fine-tuned at 208").wait_for()
    picker.get_by_label("trained case").select_option("B2-G16-LN_PN-Half_16IPU_4x4")
    picker.get_by_text("Trained at 196, fine-tuned at 260").wait_for()


def test_explorer_counts_as_the_library_does(visit):
    page = visit("pipeline.html")
    asked = [
        (name, stages, blocks * overlap(name, stages))
        for name in SCHEDULES
        for stages in (1, 2, 3, 4, 6, 8)
        for blocks in (1, 2, 5)
    ]
    told = page.evaluate(
        "asked => asked.map((a) => [pipelineExplorer.schedule(...a), pipelineExplorer.describe(...a)])",
        asked,
    )
    for arguments, (table, facts) in zip(asked, told):
        assert table == [w._asdict() for w in schedule(*arguments)], arguments
        expected = describe_schedule(*arguments)
        assert facts.pop("bubble") == pytest.approx(expected.pop("bubble")), arguments
        assert facts == expected, arguments


def test_explorer_by_keyboard(visit):
    page = visit("pipeline.html")
    explorer = page.locator("#pipeline-explorer")
    grid, facts = explorer.locator("svg"), explorer.locator("dl")
    assert grid.locator("rect").count() == 1 + 3 * 2 * 4 * 8  # all three, on one axis
    assert all(f"{name}: " in grid.text_content() for name in SCHEDULES) and facts.is_hidden()
    explorer.get_by_role("combobox", name="schedule").focus()
    page.keyboard.press("ArrowDown")  # Grouped
    assert grid.locator("rect").count() == 1 + 2 * 4 * 8 and "15" in facts.inner_text()
    page.keyboard.press("ArrowDown")  # Interleaved
    bubble = describe_schedule("Interleaved", 4, 8)["bubble"]
    explorer.get_by_text(f"{100 * bubble:.1f} %").wait_for()
    page.keyboard.press("Tab")
    page.keyboard.type("2")
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("7")
    explorer.get_by_text("take 6 or 8").wait_for()
    page.keyboard.press("ArrowUp")
    explorer.get_by_text("Blocks of 2").wait_for()
    assert grid.locator("rect").count() == 1 + 2 * 2 * 8
    clock = explorer.get_by_role("slider", name="clock")
    clock.focus()
    page.keyboard.press("ArrowRight")
    explorer.get_by_text("Clock 1. stage 0: idle; stage 1: micro-batch 0 forward.").wait_for()
    assert barriers(page) == []
    page.set_viewport_size(PHONE)
    assert too_wide(page) == []


def test_explorer_works_in_files(visit):
    page = visit("pipeline.html", base=DOCS.as_uri() + "/")
    page.locator("#pipeline-explorer svg").wait_for()


@pytest.mark.parametrize(
    "name, kept",
    [("cases.html", "B5-G16-LN_PN-Half_16IPU_4x4"), ("pipeline.html", "ramp-up")],
)
def test_pages_keep_their_point_without_scripts(browser, site, name, kept):
    context = browser.new_context(java_script_enabled=False, viewport=PHONE)
    page = context.new_page()
    page.goto(site + name)
    assert page.get_by_text(kept).first.is_visible()
    assert page.locator(".play:visible").count() == 0
    context.close()


def test_what_scrolls_sideways_can_be_reached_by_keyboard(visit):
    page = visit("pod.html", PHONE)
    stuck = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter((e) =>
            ["auto", "scroll"].includes(getComputedStyle(e).overflowX)
            && e.scrollWidth > e.clientWidth + 1 && e.tabIndex < 0).map((e) => e.outerHTML.slice(0, 90))"""
    )
    assert stuck == []
    assert page.locator("main .cell-output-display[tabindex='0']").count() > 0


def test_a_figure_fits_a_phone_and_opens_in_full(visit):
    page = visit("planner.html", PHONE)
    figure = page.locator("main svg.figure").last
    width = "(e) => e.getBoundingClientRect().width"
    small = figure.evaluate(width)
    assert small < PHONE["width"]
    page.get_by_role("button", name="Enlarge the figure").last.focus()
    page.keyboard.press("Enter")
    full = page.locator("dialog svg.figure")
    assert full.evaluate(width) > 1.5 * small and barriers(page) == []
    page.keyboard.press("Escape")
    full.wait_for(state="detached")
    assert figure.evaluate(width) == small
    page.set_viewport_size(DESK)
    page.get_by_role("button", name="Enlarge the figure").last.wait_for(state="hidden")


def test_the_checks_see_mistakes(visit):
    page = visit("testing.html", PHONE)
    page.evaluate(
        """() => {
        const main = document.querySelector("main");
        main.insertAdjacentHTML("beforeend", '<div style="width: 900px">wide</div>'
            + '<p style="color: #999; background: #aaa">pale [a](b)</p><img src="assets/card.png">');
        }"""
    )
    said = " ".join(barriers(page))
    assert "color-contrast" in said and "image-alt" in said
    assert "wide" in too_wide(page)[0] and unrendered(page) == ["]("]
