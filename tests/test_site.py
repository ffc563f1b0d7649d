"""The site's and the README's own checks: each is shown what it must find, and what it must let pass."""

import base64
import html
import io
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import build_docs  # noqa: E402
import build_readme  # noqa: E402
import finish  # noqa: E402
import mentions  # noqa: E402
import tree  # noqa: E402
from bs4 import BeautifulSoup  # noqa: E402
from PIL import Image  # noqa: E402

GOOD = """<html><head><link rel="stylesheet" href="a.css"></head><body><h2 id="part">Part</h2>
<a href="#part">up</a> <a href="other.html#there">other</a> <a href="https://arxiv.org/abs/1">paper</a>
<img src="data:image/png;base64,AA" alt="x"></body></html>"""

RENDERED = """<html><head><title>T</title></head><body><nav class="navbar"><div class="navbar-container">
<button class="navbar-toggler"></button><div class="collapse"><div class="quarto-navbar-tools">
<a class="quarto-color-scheme-toggle" href=""></a></div></div></div></nav>
<nav id="quarto-sidebar"><div class="sidebar-item-section"><div class="sidebar-item-container">
<a data-bs-toggle="collapse" data-bs-target="#s1">Learn</a>
<a data-bs-toggle="collapse" data-bs-target="#s1"><i></i></a></div><ul id="s1"></ul></div></nav>
<main id="main"><table border="1"><thead><tr><th></th><th>macs</th><th>what</th></tr>
<tr><th>case</th><th></th><th></th></tr></thead><tbody><tr><th>a</th><td>1,234</td><td>b1</td></tr>
<tr><th>b</th><td>-</td><td>7</td></tr></tbody></table></main></body></html>"""
MATPLOTLIB = """<?xml version="1.0"?>
<svg alt="A line" viewBox="0 0 9 9"><metadata>matplotlib</metadata><g id="figure_1">
<path id="m1" style="stroke: #000000; fill: #ffffff"/><use xlink:href="#m1" style="fill: #1f77b4"/>
<g clip-path="url(#m1)"></g></g></svg>"""


@pytest.fixture
def site(tmp_path):
    (tmp_path / "index.html").write_text(GOOD)
    (tmp_path / "other.html").write_text('<p id="there">there</p>')
    (tmp_path / "a.css").write_text("p { color: red; background: url(data:image/png;base64,AA) }")
    return tmp_path


def test_check_lets_a_good_site_pass(site):
    wrong, pages = build_docs.check(site, {"index.html", "other.html"})
    assert wrong == [] and len(pages) == 2


@pytest.mark.parametrize(
    "text, said",
    [
        ('<a href="gone.html">x</a>', "leads nowhere"),
        ('<img src="gone.png" alt="x">', "leads nowhere"),
        ('<a href="other.html#gone">x</a>', "has no place #gone"),
        ('<a href="#gone">x</a>', "has no place #gone"),
        ('<script src="https://cdn.example.org/x.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="//fonts.example.org/x.css">', "from elsewhere"),
        ('<a href="https://example.invalid/blob/x">x</a>', "placeholder"),
        ('<a href="file:///x">x</a>', "one machine"),
        ("<pre>Traceback (most recent call last):</pre>", "traceback"),
        ("<p>as @fig-proxy shows</p>", "cross-reference"),
        ('<img src="data:image/png;base64,AA">', "no alternative text"),
        ("<svg><path/></svg>", "no alternative text"),
        ('<p id="main">x</p><p id="main">y</p>', "two elements have the id main"),
        ('<div class="cell-output-stderr">W</div>', "stderr"),
        (f"<p>{'x' * 1_500_000}</p>", "weighs"),
    ],
)
def test_check_finds(site, text, said):
    (site / "index.html").write_text(GOOD.replace("</body>", text + "</body>"))
    wrong, _ = build_docs.check(site, {"index.html"})
    assert len(wrong) == 1 and said in wrong[0]


def test_check_finds_missing_pages_and_fonts(site):
    (site / "a.css").write_text("@import url(https://fonts.example.org/css2?family=A:wght@3;4);p{}")
    wrong, _ = build_docs.check(site, {"index.html", "lost.html"})
    assert len(wrong) == 2 and "lost.html: the page is missing" in wrong
    (site / "site_libs").mkdir()
    build_docs.make_local(site)
    assert build_docs.check(site, {"index.html"})[0] == []


def test_finish_names_what_is_pressed_and_where_one_is(tmp_path):
    (tmp_path / "index.html").write_text(RENDERED)
    finish.finish(tmp_path, card="assets/card.png")
    page = BeautifulSoup((tmp_path / "index.html").read_text(), "html.parser")
    assert page.select_one(".skip-link")["href"] == "#main" and not page.select(".navbar-toggler")
    assert page.select_one(".navbar-container > .quarto-navbar-tools > button.scheme-switch")
    folds = page.select("#quarto-sidebar button")
    assert [b.get_text() for b in folds] == ["Learn"] and folds[0]["aria-controls"] == "s1"
    assert not page.select("#quarto-sidebar [data-bs-toggle]:not(button)")
    assert page.find("meta", property="og:image")["content"] == "assets/card.png"
    names = [nav["aria-label"] for nav in page.select("nav")]
    assert len(set(names)) == len(names) == 2


def test_finish_tidies_tables_of_numbers(tmp_path):
    (tmp_path / "index.html").write_text(RENDERED)
    finish.finish_page(tmp_path / "index.html")
    page = BeautifulSoup((tmp_path / "index.html").read_text(), "html.parser")
    heads = page.select("thead tr")
    assert len(heads) == 1 and [h.get_text() for h in heads[0]("th")] == ["case", "macs", "what"]
    assert [c.get_text() for c in page.select(".num")] == ["macs", "1,234", "-"]
    assert page.select_one("tbody th")["scope"] == "row" and not page.select("[border]")


def test_thousands_are_set_apart_alike_in_a_column():
    column = lambda texts: BeautifulSoup(
        "".join(f"<td>{html.escape(t)}</td>" for t in texts), "html.parser"
    )("td")
    for texts, tidy in (
        (["9231", "28496"], ["9,231", "28,496"]),
        (["2026", "1999"], ["2026", "1999"]),
        (["NaN", "0.5", "<NA>"], ["\u2013", "0.5", "\u2013"]),
    ):
        cells = column(texts)
        finish.tidy_numbers(cells)
        assert [c.get_text() for c in cells] == tidy


@pytest.mark.parametrize(
    "text", ["7", "-1.5", "1,234", "12,345,678.9", "97.1 %", "1e-05", ".5", "1,234.5*"]
)
def test_numbers_are_seen(text):
    assert finish.is_number(text)


@pytest.mark.parametrize("text", ["2 x 8", "96, 128", "96,12", "b4", "1.2.3", "block2b", "."])
def test_words_are_not_numbers(text):
    assert not finish.is_number(text)


def tables(rows, names):
    "A finished page with a table of these rows, and of the same with the first cell standing for two rows."
    body = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
    merged = body.replace("<td>a</td>", "<td rowspan='2'>a</td>", 1).replace("<td>a</td>", "")
    head = f"<thead><tr>{''.join(f'<th>{n}</th>' for n in names)}</tr></thead>"
    for text in (body, merged):
        yield f"<body><main><table>{head}<tbody>{text}</tbody></table></main></body>"


def test_tables_of_sentences_become_cards(tmp_path):
    said = ["one of the longer sentences of a table", "what is to be done about that, then"]
    for text in tables([["a", *said], ["a", *said]], ["name", "message", "way out"]):
        (tmp_path / "page.html").write_text(text)
        finish.finish_page(tmp_path / "page.html")
        page = BeautifulSoup((tmp_path / "page.html").read_text(), "html.parser")
        assert len(page.select("table.cards tbody td[data-label='way out'][role=cell]")) == 2
        assert [c.get_text() for c in page.select("td[data-label=name]")] == ["a", "a"]
        assert len(page.select(".again")) == ("rowspan" in text)


def test_wide_tables_are_set_small_and_long_ones_scroll(tmp_path):
    names = ["images_per_s", *(f"a_number_{i}" for i in range(14))]
    for rows, found in ((3, "cards"), (40, "long")):
        table = [["1234567.0"] * len(names)] * rows
        (tmp_path / "page.html").write_text(next(tables(table, names)))
        finish.finish_page(tmp_path / "page.html")
        page = BeautifulSoup((tmp_path / "page.html").read_text(), "html.parser")
        assert page.table["class"] == ["dense", "denser", found]
        assert page.select_one("th").get_text() == "images/s"
        assert page.select_one("td").get_text() == "1,234,567"


@pytest.mark.parametrize(
    "text, names",
    [("`-a` in `b`, twice", ["-a", "b"]), ("x `y`", ["y"]), ("plain", []), ("AError: `a` is", [])],
)
def test_names_in_cells_are_code(text, names):
    soup = BeautifulSoup(f"<td>{text}</td>", "html.parser")
    finish.name_code(soup.td)
    assert [code.get_text() for code in soup.select("code")] == names
    assert soup.get_text() == (text.replace("`", "") if names else text)


def test_a_merged_cell_of_an_index_counts_as_all_its_rows():
    head = "".join(f"<th>a_number_{i}</th>" for i in range(15))
    row = "<td>1234567.0</td>" * 14
    rows = f"<tr><th rowspan='40'>B0</th>{row}</tr>" + f"<tr>{row}</tr>" * 39
    text = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    soup = BeautifulSoup(text, "html.parser")
    finish.tidy_table(soup, soup.table)
    assert "long" in soup.table["class"] and "cards" not in soup.table["class"]


def test_an_index_without_a_name_is_left_out():
    text = "<table><thead><tr><th></th><th>a</th></tr></thead><tbody>{}</tbody></table>"
    for first, kept in ((("0", "1"), 2), (("3", "8"), 2), (("8", "3"), 4), (("B0", "B1"), 4)):
        rows = "".join(f"<tr><th>{n}</th><td>x</td></tr>" for n in first)
        soup = BeautifulSoup(text.format(rows), "html.parser")
        finish.tidy_table(soup, soup.table)
        assert len(soup.select("tbody > tr > *")) == kept


@pytest.mark.parametrize(
    "text, found",
    [
        ("short", []),
        ("a sentence " * 4, ["flow"]),
        ("a sentence " * 9, ["wrap"]),
        ("name      value     " * 2 + "more", ["columns"]),
        ("name      value     " * 4, ["columns", "flow"]),
        ("name      value     " * 8, ["wrap"]),
    ],
)
def test_what_is_printed_fits_the_page(text, found):
    soup = BeautifulSoup(
        f"<main><div class='cell-output'><pre>{text}\n{text}</pre></div></main>", "html.parser"
    )
    finish.wrap_sentences(soup)
    assert soup.pre.get("class", []) == found
    assert ("--columns" in soup.pre.get("style", "")) == ("columns" in found)


def test_lines_of_code_are_told_apart():
    spans = '<span class="k">def</span> f():\n    <span class="s">"all\n</span>  x <span class="o">\\\n</span>end\n'
    shell = '<span class="c"># all\n</span>make test <span class="se">\\\n</span>  -q\n'
    for text, lines, indents in (
        (shell, ["# all\n", "make test \\\n", "  -q\n"], [None, None, "--in:2ch"]),
        (
            spans,
            ["def f():\n", '    "all\n', "  x \\\n", "end\n"],
            [None, "--in:4ch", "--in:2ch", None],
        ),
    ):
        page = f'<main><pre class="sourceCode"><code>{text}</code></pre></main>'
        soup = BeautifulSoup(page, "html.parser")
        finish.code_lines(soup)
        assert [line.get_text() for line in soup.select(".line")] == lines
        assert [line.get("style") for line in soup.select(".line")] == indents


@pytest.mark.parametrize("summary, inside", [("Answer", 1), ("Code", 0)])
def test_what_an_answer_puts_out_is_folded_with_it(summary, inside):
    code = f'<details class="code-fold"><summary>{summary}</summary><pre>6 * 7</pre></details>'
    output = '<div class="cell-output cell-output-display"><pre>42</pre></div>'
    page = f'<main><div class="cell">{code}{output}</div></main>'
    soup = BeautifulSoup(page, "html.parser")
    finish.answers(soup)
    assert len(soup.select("details .cell-output")) == inside
    assert len(soup.select(".cell-output")) == 1


def test_finish_draws_figures_in_the_colours_of_the_page(tmp_path):
    drawn = RENDERED.replace("</main>", MATPLOTLIB * 2 + "</main>")
    (tmp_path / "index.html").write_text(drawn)
    finish.finish_page(tmp_path / "index.html")
    text = (tmp_path / "index.html").read_text()
    page = BeautifulSoup(text, "html.parser")
    one, two = page.select("main svg")
    assert one["aria-label"] == "A line" and one["role"] == "img" and "alt" not in one.attrs
    assert [p["id"] for p in page.select("path")] == ["f1-m1", "f2-m1"]
    assert two.find("use")["xlink:href"] == "#f2-m1" and "url(#f2-m1)" in str(two)
    assert "stroke: currentColor" in str(one) and "fill: var(--page)" in str(one)
    assert "#1f77b4" in str(one) and "<?xml" not in text and "metadata" not in text


@pytest.mark.parametrize("kind, ending", [("png", "png"), ("jpeg", "jpg")])
def test_finish_writes_images_to_files(tmp_path, kind, ending):
    file = io.BytesIO()
    Image.new("RGB", (640, 480)).save(file, kind)
    uri = f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode()
    (tmp_path / "page.html").write_text(f'<body><img alt="x" src="{uri}"></body>')
    finish.finish_page(tmp_path / "page.html")
    img = BeautifulSoup((tmp_path / "page.html").read_text(), "html.parser").img
    assert (img["src"], img["width"], img["height"]) == (f"figures/page-1.{ending}", "640", "480")
    assert (tmp_path / "figures" / f"page-1.{ending}").read_bytes() == file.getvalue()


def test_printed_lines_are_one_block_and_comments_show_no_links():
    def stream(name, text):
        return {"output_type": "stream", "name": name, "text": text}

    shown = {"output_type": "display_data", "data": {}}
    outputs = [stream("stdout", "a\n"), stream("stdout", ["b\n"]), shown, stream("stdout", "c\n")]
    assert [o.get("text") for o in build_docs.one_stream(outputs)] == ["a\nb\n", None, "c\n"]
    text = "[`a`](a.html)\n```python\nf( # [`a`](a.html#a)\n```\n[`a`](a.html)"
    bare = mentions.FENCED.sub(lambda m: build_docs.CODE_LINK.sub(r"\1", m[0]), text)
    assert bare == "[`a`](a.html)\n```python\nf( # `a`\n```\n[`a`](a.html)"


def test_signatures_of_named_tuples_name_their_fields(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    (tmp_path / "effnet_repro").mkdir()
    text = "class Work(NamedTuple):\n    'W'\n    clock: int  # When\n    what: str = (\n        'a'  # Which\n    )\n"
    head = '"""Rooms."""\n\n# File to edit: ../nbs/10_{}.ipynb.\n\n'
    (tmp_path / "effnet_repro" / "b.py").write_text(
        head.format("b") + text.replace("clock", "other")
    )
    (tmp_path / "effnet_repro" / "room").mkdir()
    (tmp_path / "effnet_repro" / "room" / "inner.py").write_text(head.format("a") + text)
    text = "def Work(\n    *args, **kwargs\n): def G(a:NoneType=None) def F(\n  *args, **kwargs\n):"
    shown = build_docs.signatures(text, "a")
    assert "def G(a=None)" in shown
    assert shown.startswith("def Work(\n    clock: int,  # When\n    what: str = 'a',  # Which\n):")
    assert shown.endswith("def F(\n  *args, **kwargs\n):")


def test_links_get_the_names_of_the_site():
    linked = set()
    text = "[a](12_proxy_norm.ipynb#x) [b](../config.yml) [c](https://x.org/00_a.html) [d](https://x.org)"
    assert build_docs.plain_links(text, linked) == (
        "[a](proxy_norm.ipynb#x) [b](files/config.yml) [c](https://x.org/00_a.html) [d](https://x.org)"
    )
    assert linked == {"config.yml"}
    doubled = "| [[`validate`](config.html#validate)](training.html#validate) |"
    assert build_docs.plain_links(doubled, set()) == "| [`validate`](training.html#validate) |"


@pytest.fixture(scope="module")
def mentioned():
    return mentions.Mentions("https://x")


def test_mentions_of_pages_are_links_with_titles(mentioned):
    text = "`12_proxy_norm`, [12_proxy_norm](12_proxy_norm.ipynb#x), [`12_proxy_norm`](12_proxy_norm.ipynb), `13_x`"
    assert mentioned.link(text) == (
        "[Proxy Norm](12_proxy_norm.ipynb), [Proxy Norm](12_proxy_norm.ipynb#x), "
        "[Proxy Norm](12_proxy_norm.ipynb), `13_x`"
    )
    beside = mentioned.link("[`TFOps`](ops.html#tfops) (`02_ops`)")
    assert beside == "[`TFOps`](ops.html#tfops) ([Tensor operations](02_ops.ipynb))"
    fenced = "```sh\n`12_proxy_norm`\n```"
    for code in (
        fenced,
        "``12_proxy_norm``",
        "nbs/12_proxy_norm.ipynb",
        "`index`",
        "`index.ipynb`",
    ):
        assert mentioned.link(code) == code


def test_files_of_modules_are_links(mentioned):
    linked = mentioned.link("`runs/loop.py`, `loop.py`, `kit.py`, `validate.py`, `tests/x.py`")
    there = "https://x/effnet_repro"
    assert linked == (
        f"[`runs/loop.py`]({there}/runs/loop.py#L1), [`loop.py`]({there}/runs/loop.py#L1), "
        f"[`kit.py`]({there}/cli/kit.py#L1), [`validate.py`]({there}/cli/validate.py#L1), `tests/x.py`"
    )
    page = "[`norms.py`](11_norms.ipynb) ``norms.py``"
    assert mentioned.link("`norms.py` ``norms.py``") == page
    assert (
        mentioned.link("`training.py` `figures.py`") == "`training.py` `figures.py`"
    )  # there are two


@pytest.mark.parametrize(
    "text, plain",
    [
        ("`norms.py` of the published code", "`norms.py` of the published code"),
        ("`loop.py` and `norms.py` of the published", "`loop.py` and `norms.py` of the published"),
        (
            "[`mix`](augment.html#mix)\nof the published CNN code",
            "`mix`\nof the published CNN code",
        ),
        (
            "`norms.py`, and one of the published",
            "[`norms.py`](11_norms.ipynb), and one of the published",
        ),
        ("`norms.py`. Of the published", "[`norms.py`](11_norms.ipynb). Of the published"),
    ],
)
def test_names_of_the_published_code_are_no_links(mentioned, text, plain):
    assert mentioned.link(text) == plain


def test_ambiguous_names_stay_plain_but_on_their_own_page(mentioned):
    text = "[`validate`](config.html#validate), [`mix()`](augment.html#mix), [[`validate`](a.html#b)](c.html#d)"
    plain = text.replace("[`validate`](config.html#validate)", "`validate`", 1)
    assert mentioned.link(text, "training") == plain
    assert mentioned.link(text, "config") == text
    assert {"validate", "predict"} < mentioned.ambiguous and "mix" not in mentioned.ambiguous


def test_the_sidebar_names_pages():
    contents = [
        {"text": "Overview", "href": "index.ipynb"},
        {"section": "Learn", "contents": ["00_a.ipynb", "01_b.ipynb"]},
        {"section": "Later", "contents": ["50_c.ipynb"]},
    ]
    config = {"website": {"sidebar": {"contents": contents}}}
    assert build_docs.listed_pages(config) == [
        "index.ipynb",
        "00_a.ipynb",
        "01_b.ipynb",
        "50_c.ipynb",
    ]


@pytest.mark.parametrize("name, page", [("other", "source/other"), ("room/one", "source/room.one")])
def test_names_without_a_heading_lead_to_their_source(site, monkeypatch, name, page):
    monkeypatch.setattr(tree, "ROOT", site)
    for path in ("styles.css", "assets/favicon.svg", "assets/site.js"):
        (site / path).parent.mkdir(exist_ok=True)
        (site / path).write_text("")
    (site / "effnet_repro" / "room").mkdir(parents=True)
    head = '"""R."""\n# File to edit: ../nbs/10_other.ipynb.\n\n\n'
    (site / "effnet_repro" / f"{name}.py").write_text(
        f"{head}def _hidden():\n    pass\n\n\nclass _Own:\n    pass\n"
    )
    url = f"https://example.invalid/blob/main/effnet_repro/{name}.py#L5"
    link = f'<a href="{url}" target="_blank">source</a>'
    own = '<a href="other.html#_own">o</a> '
    names = (
        own
        + '<a href="other.html#_hidden">a</a> <a href="other.html#there">b</a> <a href="other.html#no">c</a>'
    )
    (site / "index.html").write_text(link + names)
    assert build_docs.add_sources(site, "https://example.invalid") == {name.replace("/", ".")}
    made = (site / "index.html").read_text()
    assert f'<a href="{page}.html#L-5">source</a>' in made
    assert f'<a href="{page}.html#L-5">a</a> <a href="other.html#there">b</a>' in made
    assert f'<a href="{page}.html#L-9">o</a>' in made
    shown = (site / f"{page}.html").read_text()
    assert f"effnet_repro/{name}.py" in shown and 'href="../other.html"' in shown
    wrong, pages = build_docs.check(site, {"index.html"})
    assert wrong == ["index.html: other.html has no place #no"] and len(pages) == 3


def test_names_of_plain_modules_lead_to_their_source(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    (tmp_path / "effnet_repro" / "room").mkdir(parents=True)
    texts = {
        "room/__init__": '"""A room."""\n\n\ndef open_door():\n    pass\n',
        "room/lock": "def turn():\n    pass\n\n\ndef _hidden_one():\n    pass\n",
        "told": "# File to edit: ../nbs/10_told.ipynb.\ndef told_there():\n    pass\n",
    }
    for name, text in texts.items():
        (tmp_path / "effnet_repro" / f"{name}.py").write_text(text)
    link = mentions.Mentions("u").link
    door, turn = "u/effnet_repro/room/__init__.py#L4", "u/effnet_repro/room/lock.py#L1"
    assert link("`open_door` `open_door()`") == f"[`open_door`]({door}) [`open_door()`]({door})"
    assert link("`room.lock.turn`") == f"[`room.lock.turn`]({turn})"
    same = "`turn` `_hidden_one` `told_there` [`open_door`](x) ``open_door``\n```\n`open_door`\n```"
    assert link(same) == same


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with an index page and one notebook; returns a function that writes the index."
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "00_config.ipynb").write_text("{}")
    monkeypatch.setattr(tree, "ROOT", tmp_path)

    def write(*cells):
        nb = {"cells": [{"outputs": [], "metadata": {}, **c} for c in cells]}
        (tmp_path / "nbs" / "index.ipynb").write_text(json.dumps(nb))
        return build_readme.build()

    return write


def code(source, **output):
    return {"cell_type": "code", "source": source, "outputs": [output] if output else []}


def test_readme_links_work_at_the_top(project):
    text = "# T\n\n> S\n\n[a](00_config.ipynb) [b](config.html#x) [c](https://x.org)\n\n```sh\n[d](e)\n```"
    readme, _, wrong = project({"cell_type": "markdown", "source": text})
    assert "[a](nbs/00_config.ipynb) [b](nbs/00_config.ipynb) [c](https://x.org)" in readme
    assert "[d](e)" in readme and wrong == []
    assert project({"cell_type": "markdown", "source": "[a](gone.ipynb)"})[2]


def test_readme_shows_code_and_outputs(project):
    table = {
        "text/html": "<style scoped>x</style>\n<table>\n\n<tr></tr></table>",
        "text/plain": "t",
    }
    readme, figures, wrong = project(
        code("#| hide\nimport numpy"),
        code("#| echo: false\n1 + 1", output_type="execute_result", data={"text/plain": ["2"]}),
        code("#| code-fold: true\nf()", output_type="execute_result", data=table),
        code(
            "plot()",
            output_type="display_data",
            data={"image/png": "AAAA", "text/plain": "<Figure>"},
        ),
        code("print(3)", output_type="stream", name="stdout", text="3\n"),
    )
    assert wrong == [] and figures == {"README_files/figure-1.png": b"\0\0\0"}
    for part in (
        "```text\n2\n```",
        "```python\nf()\n```\n\n<table>\n<tr>",
        "![](README_files",
        "```text\n3\n```",
    ):
        assert part in readme
    for part in ("import numpy", "1 + 1", "#|", "style", "<Figure>"):
        assert part not in readme
