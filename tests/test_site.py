"""The site's and the README's own checks: each is shown what it must find, and what it must let pass."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import build_docs  # noqa: E402
import build_readme  # noqa: E402
import tree  # noqa: E402

GOOD = """<html><head><link rel="stylesheet" href="a.css"></head><body><h2 id="part">Part</h2>
<a href="#part">up</a> <a href="other.html#there">other</a> <a href="https://arxiv.org/abs/1">paper</a>
<img src="data:image/png;base64,AA" alt="x"></body></html>"""


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
        ('<img src="gone.png">', "leads nowhere"),
        ('<a href="other.html#gone">x</a>', "has no place #gone"),
        ('<a href="#gone">x</a>', "has no place #gone"),
        ('<script src="https://cdn.example.org/x.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="//fonts.example.org/x.css">', "from elsewhere"),
        ('<a href="https://example.invalid/blob/x">x</a>', "placeholder"),
        ('<a href="file:///x">x</a>', "one machine"),
        ("<pre>Traceback (most recent call last):</pre>", "traceback"),
        ("<p>as @fig-proxy shows</p>", "cross-reference"),
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


def test_links_get_the_names_of_the_site():
    linked = set()
    text = "[a](12_proxy_norm.ipynb#x) [b](../config.yml) [c](https://x.org/00_a.html) [d](https://x.org)"
    assert build_docs.plain_links(text, linked) == (
        "[a](proxy_norm.ipynb#x) [b](files/config.yml) [c](https://x.org/00_a.html) [d](https://x.org)"
    )
    assert linked == {"config.yml"}


def test_sidebar_names_and_drops_pages():
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
    kept = build_docs.drop_missing(contents, {"index.ipynb", "01_b.ipynb"})
    assert kept == [contents[0], {"section": "Learn", "contents": ["01_b.ipynb"]}]


def test_names_without_a_heading_lead_to_their_source(site, monkeypatch):
    monkeypatch.setattr(tree, "ROOT", site)
    (site / "styles.css").write_text("")
    (site / "effnet_repro").mkdir()
    (site / "effnet_repro" / "other.py").write_text("import os\n\n\ndef _hidden():\n    pass\n")
    link = '<a href="https://example.invalid/blob/main/effnet_repro/other.py#L4" target="_blank">source</a>'
    names = '<a href="other.html#_hidden">a</a> <a href="other.html#there">b</a> <a href="other.html#no">c</a>'
    (site / "index.html").write_text(link + names)
    assert build_docs.add_sources(site, "https://example.invalid") == {"other"}
    made = (site / "index.html").read_text()
    assert '<a href="source/other.html#L-4">source</a>' in made
    assert '<a href="source/other.html#L-4">a</a> <a href="other.html#there">b</a>' in made
    wrong, pages = build_docs.check(site, {"index.html"})
    assert wrong == ["index.html: other.html has no place #no"] and len(pages) == 3


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
    readme, pictures, wrong = project(
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
    assert wrong == [] and pictures == {"README_files/figure-1.png": b"\0\0\0"}
    for part in (
        "```text\n2\n```",
        "```python\nf()\n```\n\n<table>\n<tr>",
        "![](README_files",
        "```text\n3\n```",
    ):
        assert part in readme
    for part in ("import numpy", "1 + 1", "#|", "style", "<Figure>"):
        assert part not in readme
