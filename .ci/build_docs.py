"""Build the site into _docs from the notebooks, without Quarto and without a network.

nbdev prepares the notebooks (hidden cells, `show_doc`, links of names in backticks), smalldocs
renders them with _quarto.yml, and this script adds what the two leave open: pages called as nbdev
links to them (`config.html`), the vendored KaTeX, pages of the exported source, copies of linked
files, what `finish` does to every page, and checks. Any problem ends it with a list and status 1.
"""

import argparse
import ast
import html
import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import finish
import mentions
import tree
import yaml

KATEX_URL = "https://cdn.jsdelivr.net/npm/katex@0.16.11/dist"
SCHEME = re.compile(r"^[a-zA-Z][a-zA-Z0-9+.-]*:|^//")
LINK_IN_LINK = re.compile(r"\[\[(`[^`]+`)\]\([^()\s]+\)\]\(")
CODE_LINK = re.compile(r"\[(`[^`]+`)\]\([^()\s]+\)")
ANY_ARGUMENTS = re.compile(r"def (\w+)\(\s*\*args, \*\*kwargs\s*\):")
CROSS_REFERENCE = re.compile(r"(?<![\w`])@(?:fig|eq|tbl|sec)-\w")
ELSEWHERE = re.compile(
    r"(?:url\(|@import\s)\s*['\"]?((?:https?:)?//[^)'\";\s]+)"
)  # in a style sheet
HEAVIEST_PAGE = 1_500_000  # bytes, with its images and without what all pages share
PAGE_LINK = re.compile(r"(?<![\w/.-])(?:\./)?((?:\d+[a-zA-Z0-9]*_)[\w-]+)\.(ipynb|html)")


# ---------------------------------------------------------------- before rendering


def listed_pages(config):
    "The notebooks that the sidebar of _quarto.yml names."
    listed = yaml.safe_dump(config["website"]["sidebar"]["contents"], sort_keys=False)
    return re.findall(r"[\w-]+\.ipynb", listed)


def listing_problems(config, present):
    "What the sidebar names that is not there, leaves out, or names twice."
    listed = listed_pages(config)
    wrong = [f"_quarto.yml lists nbs/{n}, which does not exist" for n in listed if n not in present]
    wrong += [f"_quarto.yml does not list nbs/{n}" for n in sorted(present - set(listed))]
    twice = (n for n in sorted(set(listed)) if listed.count(n) > 1)
    return wrong + [f"_quarto.yml lists nbs/{n} twice" for n in twice]


def prepare(copy):
    "Run nbdev's processing in the copy, with the package visible as if it were installed."
    meta = copy / "effnet_repro-0.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: effnet_repro\nVersion: 0\n")
    (meta / "entry_points.txt").write_text("[nbdev]\neffnet_repro = effnet_repro._modidx:d\n")
    for path in (copy / "nbs").glob("*.ipynb"):
        nb = json.loads(path.read_text())
        if "#| exports" in "".join(nb["cells"][-1]["source"]):  # nbdev looks at the cell after it
            nb["cells"].append(
                {"cell_type": "markdown", "id": "end", "metadata": {}, "source": "<!-- end -->"}
            )
            path.write_text(json.dumps(nb))
    code = "from nbdev.serve import proc_nbs; proc_nbs(force=True, n_workers=2)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=copy,
        env=tree.environment(copy),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nbuild_docs: a page's code failed (see above)")
    return copy / "_proc"


def plain_links(text, linked):
    "Links in Markdown, to pages by the names they have on the site; files elsewhere go to `linked`."

    def one(match):
        href = match[2]
        if SCHEME.match(href) or href.startswith("#"):
            return match[0]
        path, mark, tail = href.partition("#")
        if path.startswith("../"):
            inside = posixpath.normpath(posixpath.join("nbs", path))
            if not inside.startswith("../") and (tree.ROOT / inside).is_file():
                linked.add(inside)
                return f"{match[1]}files/{inside}{mark}{tail}{match[3]}"
        return match[1] + PAGE_LINK.sub(lambda m: f"{tree.page_name(m[1])}.{m[2]}", href) + match[3]

    # In what a cell puts out, nbdev links names in backticks that are links already.
    return tree.MD_LINK.sub(one, LINK_IN_LINK.sub(r"[\1](", text))


def one_stream(outputs):
    "Outputs in which what was printed in several goes is one block, as it was on the terminal."
    joined = []
    for output in outputs:
        before = joined[-1] if joined else {}
        if output["output_type"] == "stream" and before.get("name") == output["name"]:
            before["text"] = "".join(before["text"]) + "".join(output["text"])
        else:
            joined.append(output)
    return joined


def modules_of(page):
    "Module -> file, of those that a page of the site is about."
    of = {m: tree.page_of(path) for m, path in tree.modules().items()}
    return {m: p for m, p in tree.modules().items() if of[m] and tree.page_name(of[m]) == page}


def named_fields(name, page):
    "The fields of a page's NamedTuple with their comments, as a signature; None for others."
    own = modules_of(page) or tree.modules()  # two pages may have a class of one name
    for path in own.values():
        text = path.read_text()
        if f"class {name}(NamedTuple):" not in text:
            continue
        lines, shown = text.splitlines(), []
        body = next(n for n in ast.parse(text).body if getattr(n, "name", None) == name).body
        for field in (n for n in body if isinstance(n, ast.AnnAssign)):
            default = f" = {ast.unparse(field.value)}" if field.value else ""
            comment = re.search(r"#.*", "\n".join(lines[field.lineno - 1 : field.end_lineno]))
            declared = f"{ast.unparse(field.target)}: {ast.unparse(field.annotation)}{default},"
            shown.append(f"    {declared}{'  ' + comment[0] if comment else ''}")
        return f"def {name}(\n" + "\n".join(shown) + "\n):"
    return None


def signatures(text, page):
    "What nbdev shows of a symbol, with the fields of a NamedTuple, and no type where it only knows None."
    fields = lambda m: named_fields(m[1], page) or m[0]
    return ANY_ARGUMENTS.sub(fields, text).replace(":NoneType=None", "=None")


def lay_out(proc, site, linked, source_url):
    "Copy nbdev's pages to the folder `site` under the names that its links use."
    mentioned = mentions.Mentions(source_url)
    for path in sorted(proc.rglob("*")):
        inside = path.relative_to(proc)
        if path.is_dir():
            continue
        target = site / inside.parent / tree.page_name(inside.name)
        if target.exists():
            sys.exit(f"build_docs: two notebooks make the page {target.name}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix != ".ipynb":
            shutil.copy2(path, target)
            continue
        link = lambda text, page=target.stem: plain_links(mentioned.link(text, page), linked)
        nb = json.loads(path.read_text())
        for cell in nb["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "raw":
                cell["source"] = re.sub(r"(?m)^output-file:.*\n", "", source)
            elif cell["cell_type"] == "markdown":
                cell["source"] = link(source)
            if cell["cell_type"] == "code":
                cell["outputs"] = one_stream(cell["outputs"])
            for output in cell.get("outputs", []):
                data = output.get("data", {})
                if "image/svg+xml" in data:  # smalldocs puts an alternative text on what begins so
                    svg = "".join(data["image/svg+xml"])
                    data["image/svg+xml"] = svg[svg.index("<svg") :]
                if "text/markdown" in data:
                    text = signatures("".join(data["text/markdown"]), target.stem)
                    # nbdev links names in the comments of a signature, where a link is shown as typed
                    text = mentions.FENCED.sub(lambda m: CODE_LINK.sub(r"\1", m[0]), text)
                    data["text/markdown"] = link(text)
        target.write_text(json.dumps(nb))


# ---------------------------------------------------------------- after rendering

SOURCE_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{module} - source - effnet_repro</title>
<link rel="icon" href="../assets/favicon.svg"><link rel="stylesheet" href="../styles.css">
<script>{scheme}</script><script src="../assets/site.js" defer></script></head>
<body class="source-page"><main><h1>{module}</h1>
<p>The module <code>{path}</code>{where}.</p>
{code}
</main></body></html>
"""
# The theme that the reader chose on the pages, or that the system prefers.
SOURCE_SCHEME = (
    'try { var chosen = localStorage.getItem("smalldocs-scheme"); } catch (e) {} '
    'if (chosen ? chosen === "alternate" : matchMedia("(prefers-color-scheme: dark)").matches) '
    'document.documentElement.dataset.scheme = "alternate";'
)


def place_of(symbol, page):
    "The module and the line that define a name of a page, or None."
    name = re.escape(symbol.split(".")[-1])
    for case in (0, re.IGNORECASE):  # nbdev writes the anchor of a class in small letters
        define = re.compile(rf"\s*(?:(?:async )?def|class) {name}\b|{name}\s*[:=]", case)
        for module, path in modules_of(page).items():
            lines = path.read_text().splitlines()
            found = next((n for n, line in enumerate(lines, 1) if define.match(line)), None)
            if found:
                return module, found
    return None


def source_page(module):
    "A page that shows a module, with a number for each line."
    from pygments import highlight
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    path = tree.modules()[module]
    page = tree.page_of(path)
    link = f'<a href="../{tree.page_name(page or "")}.html">its notebook</a>'
    formatter = HtmlFormatter(linenos="inline", linespans="L")
    return SOURCE_PAGE.format(
        module=module,
        path=path.relative_to(tree.ROOT).as_posix(),
        where=f", exported from {link}" if page else "",
        scheme=SOURCE_SCHEME,
        code=highlight(path.read_text(), PythonLexer(), formatter),
    )


def add_sources(out, git_url):
    """Turn nbdev's links to a source repository into links to pages of this site; make those pages.

    A name without a heading of its own, such as a private helper's, is linked to its source, too.
    """
    outside = re.compile(
        re.escape(git_url) + r"/blob/[^/\"]+/effnet_repro/([\w/]+)\.py(?:#L(\w+))?"
    )
    inside = re.compile(r'href="(\w+)\.html#([\w.]+)"')
    anchors = {p.stem: Page(p.read_text()).anchors for p in out.glob("*.html")}
    modules = set()

    def to_source(module, line):
        modules.add(module)
        return f"source/{module}.html#L-{line}"

    def outward(match):
        line = match[2] if (match[2] or "").isdigit() else "1"
        return to_source(re.sub(r"/__init__$", "", match[1]).replace("/", "."), line)

    def inward(match):
        page, symbol = match[1], match[2]
        place = None if symbol in anchors.get(page, {symbol}) else place_of(symbol, page)
        return f'href="{to_source(*place)}"' if place else match[0]

    def same_tab(match):  # a tab of its own is for other sites
        tag = match[0]
        return (
            re.sub(r' (?:target="_blank"|rel="noopener")', "", tag) if outside.search(tag) else tag
        )

    for page in out.glob("*.html"):
        text = re.sub(r"<a\b[^>]*>", same_tab, page.read_text())
        page.write_text(inside.sub(inward, outside.sub(outward, text)))
    (out / "source").mkdir(exist_ok=True)
    for module in sorted(modules):
        (out / "source" / f"{module}.html").write_text(source_page(module))
    return modules


def make_local(out):
    "Serve KaTeX and the theme from the site itself."
    shutil.copytree(tree.ROOT / ".ci" / "katex", out / "site_libs" / "katex")
    for page in out.rglob("*.html"):
        up = "../" * (len(page.relative_to(out).parts) - 1)
        page.write_text(page.read_text().replace(KATEX_URL, f"{up}site_libs/katex"))
    for sheet in out.rglob("*.css"):
        text = sheet.read_text()
        new = re.sub(r"@import\s+url\(['\"]?(?:https?:)?//[^)]*\)[^;]*;", "", text)
        if new != text:
            sheet.write_text(new)


def offer_notebooks(out):
    "Put the notebook behind each page into the site, and a link to it under the page's title."
    (out / "files" / "nbs").mkdir(parents=True, exist_ok=True)
    for path in tree.notebooks():
        page = out / tree.page_name(path.name).replace(".ipynb", ".html")
        if not page.is_file():  # the check says so
            continue
        shutil.copy2(path, out / "files" / "nbs" / path.name)
        link = f'<p class="take-away"><a href="files/nbs/{path.name}" download>Download this page as a notebook</a></p>'
        page.write_text(re.sub(r"(</h1>)", rf"\1{link}", page.read_text(), count=1))


class Page(HTMLParser):
    "What a page refers to: links a reader may follow, resources a browser loads, its own anchors."

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.links, self.loads, self.anchors, self.no_alt = [], [], {"", "top"}, []
        self.twice = set()  # ids
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        at = dict(attrs)
        self.twice |= {at["id"]} & self.anchors if at.get("id") else set()
        self.anchors.update(v for k, v in at.items() if k in ("id", "name") and v)
        if tag == "a" and at.get("href") is not None:
            self.links.append(at["href"])
        elif tag == "link" and at.get("href"):
            self.loads.append(at["href"])
        for name in ("src", "data-src", "poster", "data"):
            if tag != "a" and at.get(name) and (name != "data" or tag == "object"):
                self.loads.append(at[name])
        alt = {"img": "alt", "svg": "aria-label"}.get(tag)
        if alt and not at.get(alt) and at.get("aria-hidden") != "true":
            self.no_alt.append(at.get("src", tag)[:80])


def broken_links(out, name, page, pages):
    "The links and the resources of a page that lead nowhere, or away from the site."
    for href in page.loads + page.links:
        if SCHEME.match(href):
            if href in page.loads and not href.startswith("data:"):
                yield f"{name}: loads {href} from elsewhere"
            elif (urlsplit(href).hostname or "").endswith(".invalid"):
                yield f"{name}: links to the placeholder {href}"
            elif href.startswith("file:"):
                yield f"{name}: links to a file of one machine, {href}"
            continue
        path, _, anchor = href.partition("#")
        path = path.partition("?")[0]
        target = posixpath.normpath(posixpath.join(posixpath.dirname(name), unquote(path)))
        target = name if not path else target
        if (out / target).is_dir():
            target = posixpath.join(target, "index.html")
        if not (out / target).is_file():
            yield f"{name}: the link {href} leads nowhere"
        elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
            yield f"{name}: {target} has no place #{anchor}"


def page_problems(out, name, page):
    "What is wrong with a page by itself."
    text = (out / name).read_text()
    for image in page.no_alt:
        yield f"{name}: the image {image} has no alternative text (in `#| fig-alt:`, quote colons)"
    for same in page.twice:
        yield f"{name}: two elements have the id {same}"
    own = [p for p in set(page.loads) if not SCHEME.match(p) and "site_libs" not in p]
    files = [out / posixpath.dirname(name) / unquote(p.partition("?")[0]) for p in own]
    weight = len(text.encode()) + sum(f.stat().st_size for f in files if f.is_file())
    if weight > HEAVIEST_PAGE:
        yield f"{name}: weighs {weight:,} bytes with its images, over {HEAVIEST_PAGE:,}"
    if "cell-output-stderr" in text:
        yield f"{name}: shows what was written to stderr"
    if "Traceback (most recent call last)" in text or "cell-output-error" in text:
        yield f"{name}: shows a traceback"
    if CROSS_REFERENCE.search(html.unescape(re.sub(r"<[^>]+>", " ", text))):
        yield f"{name}: has a cross-reference, which is printed as typed: name it in words"


def check(out, expected):
    "Everything that is wrong with the site, a line each; and its pages."
    paths = sorted(out.rglob("*.html"))
    pages = {p.relative_to(out).as_posix(): Page(p.read_text()) for p in paths}
    wrong = {f"{name}: the page is missing" for name in expected - set(pages)}
    for name, page in pages.items():
        wrong.update(broken_links(out, name, page, pages), page_problems(out, name, page))
    for sheet in out.rglob("*.css"):
        for url in ELSEWHERE.findall(sheet.read_text()):
            wrong.add(f"{sheet.relative_to(out)}: loads {url} from elsewhere")
    return sorted(wrong), pages


def end_with(wrong):
    "End with a list of what is wrong, if anything is."
    if wrong:
        sys.exit("\n".join(wrong) + f"\nbuild_docs: {len(wrong)} problems")


def write_config(config, site):
    "The configuration for smalldocs, with the pages by the names they have on the site."
    config["format"]["html"].pop("respect-user-color-scheme", None)  # smalldocs always does
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    text = PAGE_LINK.sub(lambda m: f"{tree.page_name(m[1])}.{m[2]}", text)
    (site / "_quarto.yml").write_text(text)


def copy_linked(linked, site):
    "The files outside of nbs/ that pages link to."
    for name in sorted(linked):
        target = site / "files" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tree.ROOT / name, target)


def main():
    parser = argparse.ArgumentParser(description="Build the site into _docs.")
    parser.add_argument("--out", default=str(tree.ROOT / "_docs"), help="the folder to write")
    args = parser.parse_args()

    config = yaml.safe_load((tree.ROOT / "_quarto.yml").read_text())
    present = {p.name for p in tree.notebooks()}
    end_with(listing_problems(config, present))
    with tempfile.TemporaryDirectory(prefix="effnet_docs_") as folder:
        # nbdev skips every file below a folder whose name starts with a dot, without a word.
        if any(part.startswith(".") for part in Path(folder).resolve().parts):
            sys.exit(
                f"build_docs: {folder} is below a folder whose name starts with a dot; set TMPDIR"
            )
        copy = tree.copy(Path(folder) / "copy")
        proc = prepare(copy)
        lost = present - {p.name for p in proc.glob("*.ipynb")}
        if lost:
            sys.exit(f"build_docs: nbdev left out {', '.join(sorted(lost))}")
        from nbdev.config import get_config

        git_url = get_config(path=tree.ROOT).git_url
        site, linked = Path(folder) / "site", set()
        lay_out(proc, site, linked, f"{git_url}/blob/main")
        write_config(config, site)
        copy_linked(linked, site)
        from smalldocs.site import build

        built = build(site, quiet=True)
        out = Path(built.out)
        modules = add_sources(out, git_url)
        make_local(out)
        finish.finish(out, card=config["website"].get("image"))
        offer_notebooks(out)
        expected = {Path(tree.page_name(n)).with_suffix(".html").as_posix() for n in present}
        wrong, pages = check(out, expected)
        wrong += [f"smalldocs: {w}" for w in built.warnings]
        final = Path(args.out)
        shutil.rmtree(final, ignore_errors=True)
        shutil.move(out, final)

    links = sum(len(p.links) + len(p.loads) for p in pages.values())
    print(
        f"build_docs: {len(expected)} pages and {len(modules)} source pages in {final.name}, "
        f"{links} links checked"
    )
    end_with(wrong)


if __name__ == "__main__":
    main()
