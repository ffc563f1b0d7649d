"""What each page of the site gets after rendering: a header that fits a phone, names for its
landmarks, buttons where something is pressed, figures as files or in the page's own colors, and
tables whose numbers line up. `finish` does it; `build_docs` calls it. smalldocs does none of this yet;
tests/test_site.py and tests/test_browser.py say what each part is for."""

import base64
import copy
import html
import io
import json
import re

from bs4 import BeautifulSoup, NavigableString
from PIL import Image

ENDINGS = {"png": "png", "jpeg": "jpg", "gif": "gif", "svg+xml": "svg", "webp": "webp"}
DATA_URI = re.compile(r"data:image/([\w+]+);base64,(.*)", re.DOTALL)
NUMBER = re.compile(
    r"[-+\u2212]?(?=[\d.])(?:\d{1,3}(?:[,\u202f]\d{3})+|\d*)(?:\.\d+)?(?:e[-+]?\d+)?\s?[%*]?$"
)
# What a figure was drawn in, and what it is in the page, light or dark: ink, ground, notes, and the palette of
# `effnet_repro.figures`.
COLOURS = {
    "#000000": "currentColor",
    "#ffffff": "var(--page)",
    **dict.fromkeys(("#808080", "#696969", "#666666", "#555555", "#4d4d4d"), "var(--quiet)"),
    **dict.fromkeys(("#e6e6e6", "#eeeeee"), "var(--rule)"),  # bands behind lines
    "#f5f5f5": "var(--wash)",
    "#0072b2": "var(--figure-blue)",
    "#56b4e9": "var(--figure-sky)",
    "#d55e00": "var(--figure-orange)",
    "#009e73": "var(--figure-green)",
    "#e69f00": "var(--figure-amber)",
}
LONG_WORD = re.compile(r"\S{25,}")
BLOCKS = re.compile(r"\(?block\w+(?:/\w)?(?:,? block\w+(?:/\w)?){1,3}\)?")
NAMED = re.compile(r"`([^`]+)`")
JOINT = re.compile(r"(?<=::)|(?<=[_/.])(?=\w)")
LONGEST_TABLE = 8000  # characters of a section's tables that can be searched for
LONGEST_OPEN = 30  # lines of source that a page shows unasked
PHONE, DESK = 341, 753  # pixels that the column of text has
MOST_CARDS = (
    16  # rows; a longer table of numbers is scrolled on a phone, where its columns can be compared
)
FIELD = re.compile(r"[a-zA-Z]\w*_\w+$")
UNITS = {"per s": "/s", "ms": ", ms", "gib": ", GiB", "mb": ", MB", "percent": ", %"}
EMPTY = {"", "-", "\u2013", "\u2014", "nan", "none", "<na>"}


def mark(tag, *names):
    "Give an element classes that it does not have yet."
    tag["class"] = list(dict.fromkeys([*tag.get("class", []), *names]))


# ---------------------------------------------------------------- figures


def drawn(svg, number, alt):
    "A figure of Matplotlib as a part of the page: black and white become the page's ink and ground."
    svg = svg[re.search(r"<svg\b", svg).start() :]
    svg = re.sub(r"(?s)<metadata>.*?</metadata>|<!--.*?-->", "", svg)
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    for pattern in (r'(\bid=")([^"]+)', r'(href="#)([^"]+)', r"(url\(#)([^)]+)"):
        svg = re.sub(pattern, lambda m: f"{m[1]}{f'f{number}-' if m[2] in ids else ''}{m[2]}", svg)
    for colour, own in COLOURS.items():
        svg = re.sub(rf"(fill|stroke|stop-color)(:\s*|=\"){colour}\b", rf"\1\2{own}", svg)
    svg = re.sub(r"(font: [^;\"']*|font-family: )'[^;\"]*", r"\1var(--text-font)", svg)
    head = re.match(r"<svg\b[^>]*>", svg)[0]
    open_tag = re.sub(r' (?:alt|role|class|aria-label)="[^"]*"', "", head)
    open_tag = open_tag.replace("<svg", '<svg class="figure" role="img" fill="currentColor"', 1)
    if alt:
        open_tag = open_tag.replace("<svg", f'<svg aria-label="{alt}"', 1)
    return open_tag + svg[len(head) :]


def draw_in_place(text):
    "The page with its Matplotlib figures drawn in the page's colors."
    count = 0

    def one(match):
        nonlocal count
        if "matplotlib" not in match[0] and 'id="figure_1"' not in match[0]:
            return match[0]
        count += 1
        alt = re.search(r'<svg\b[^>]*? alt="([^"]*)"', match[0])
        return drawn(match[0], count, alt[1] if alt else "")

    prolog = r"(?:<\?xml[^>]*\?>\s*)?(?:<!DOCTYPE svg[^>]*>\s*)?"
    return re.sub(rf"(?s){prolog}<svg\b.*?</svg>", one, text)


def figures_as_files(soup, folder, page):
    "Write images that are in the page as text to files, which a browser loads when it gets there."
    for number, img in enumerate(soup.find_all("img", src=DATA_URI), 1):
        kind, data = DATA_URI.fullmatch(img["src"]).groups()
        data = base64.b64decode(data)
        folder.mkdir(exist_ok=True)
        name = f"{page}-{number}.{ENDINGS[kind]}"
        (folder / name).write_bytes(data)
        img["src"] = f"{folder.name}/{name}"
        img["loading"] = "lazy"
        if "svg" not in kind:  # the room it takes, so that nothing jumps when it arrives
            img["width"], img["height"] = Image.open(io.BytesIO(data)).size


# ---------------------------------------------------------------- tables


def break_points(soup, cell):
    "Let a browser break what has no spaces, such as the name of a test, at its joints."
    for text in cell.find_all(string=lambda t: LONG_WORD.search(t)):
        parts = JOINT.split(text)
        for part in parts[:-1]:
            text.insert_before(NavigableString(part), soup.new_tag("wbr"))
        text.replace_with(NavigableString(parts[-1]))


def name_code(cell):
    "Show names in backticks as code. The message of an error stays as it was printed, so that it can be searched for."
    text = cell.string
    if text and "Error: " not in text and NAMED.search(text):
        marked = NAMED.sub(r"<code>\1</code>", html.escape(text, quote=False))
        text.replace_with(BeautifulSoup(marked, "html.parser"))


def keep_together(text):
    "Whether a cell reads better on one line: a number, a shape, the name of a case, a list of blocks."
    named = "-" in text and " " not in text
    shape = len(text) <= 20 and re.fullmatch(r"\([\d, ]+\)", text)
    return len(text) <= 14 or (len(text) <= 32 and named) or bool(shape or BLOCKS.fullmatch(text))


def is_number(cell):
    return bool(NUMBER.match(cell)) or cell.lower() in EMPTY


def in_words(name):
    "A heading that names a field, in words that may wrap: `images_per_s` is `images/s`."
    if not FIELD.match(name):
        return name
    words = name.strip("_").replace("_", " ")
    for unit, written in UNITS.items():
        words = re.sub(rf" {unit}$", written, words)
    return words


def without_counter(head, body):
    "Take the column off that only counts the rows: an index without a name, in growing whole numbers."
    rows = [row.find_all(["th", "td"], recursive=False) for row in body.find_all("tr")]
    heads = [row.find_all(["th", "td"], recursive=False) for row in head.find_all("tr")]
    first = [row[0].get_text(strip=True) for row in rows if row]
    if len(heads) != 1 or not first or heads[0][0].get_text(strip=True) or len(heads[0]) < 2:
        return
    counts = all(re.fullmatch(r"\d{1,4}", text) for text in first) and rows[0][0].name == "th"
    if counts and all(int(a) < int(b) for a, b in zip(first, first[1:])):
        for row in [*heads, *rows]:
            row[0].decompose()


def tidy_numbers(cells):
    "Whole numbers without their `.0`, thousands set apart, a dash for none, in the cells of a column of numbers."
    texts = [c.get_text(strip=True) for c in cells]
    whole = all(re.fullmatch(r"-?\d+\.0", t) or t.lower() in EMPTY for t in texts)
    least = 4 if any(re.match(r"-?(\d{5}|\d+,\d)", t) for t in texts) else 5  # the same in a column
    for cell, text in zip(cells, texts):
        new = text[:-2] if whole and text.endswith(".0") else text
        new = "\u2013" if new.lower() in ("nan", "<na>") else new  # there is no number
        if re.fullmatch(rf"-?\d{{{least},}}(\.\d+)?", new):
            before, dot, after = new.partition(".")
            new = f"{int(before):,}{dot}{after}"
        if new != text and cell.string is not None:
            cell.string.replace_with(new)


def least_width(cells, name, letter, phone):
    "The pixels that a column needs: its longest word, an unbroken cell, on a phone what the style sheet asks."
    kinds = [set(cell.get("class", [])) for cell in cells]
    parts = [len(word) for word in name.replace(",", " ").split()]
    for cell, kind in zip(cells, kinds):
        text = cell.get_text(strip=True)
        parts += [len(text)] if {"num", "whole"} & kind else map(len, re.split(r"[\s_/]+", text))
    asked = 208 if any("words" in k for k in kinds) else 0 if all(k for k in kinds) else 96
    return max(letter * max(parts, default=0), asked if phone else 0)


def labels(head):
    "The name of each column, from all rows of headings: `output, forward` where they are nested."
    named = []
    for row in head.find_all("tr"):
        texts = []
        for cell in row.find_all(["th", "td"], recursive=False):
            texts += [cell.get_text(" ", strip=True)] * int(cell.get("colspan", 1))
        named.append(texts)
    return [", ".join(dict.fromkeys(filter(None, parts))) for parts in zip(*named)]


def fit(table, columns, names):
    """Mark a table of sentences, or one too wide for a phone: there each of its rows becomes a card, its cells
    one below the other. One too wide for a desk is set in smaller letters."""
    if table.find_parent(class_="sortable"):
        return
    width = lambda letter, more, phone=False: sum(
        least_width(cells, name, letter, phone) + more for cells, name in zip(columns, names)
    )
    sizes = [n for n, need in (("dense", (9.7, 20)), ("denser", (7.4, 11))) if width(*need) > DESK]
    wordy = [any(len(c.get_text()) > 30 and " " in c.get_text() for c in n) for n in columns]
    wide, cards = width(8.6, 10, phone=True) > PHONE, len(columns) > 2 and sum(wordy) > 1
    rows = max(map(len, columns))  # a merged cell of the index stands for several
    long = rows > (MOST_CARDS if len(columns) > 4 else 4 * MOST_CARDS)
    mark(table, *sizes, *(["long"] if wide and long else []))
    if (wide or cards) and not long:
        unmerge(table)
        as_cards(table, names)


def unmerge(table):
    "Repeat, out of sight on a desk, what stands for several rows: on a phone each row is a card."
    rows = table.select("tbody tr")
    for place, row in enumerate(rows):
        for cell in row.find_all(["th", "td"], recursive=False):
            count = int(cell.attrs.pop("rowspan", 1))
            before = len(cell.find_previous_siblings(["th", "td"]))
            for other in rows[place + 1 : place + count]:
                again = copy.copy(cell)
                mark(again, "again")
                other.insert(before, again)


def as_cards(table, names):
    "Name in each cell the column that it belongs to."
    mark(table, "cards")
    table["role"] = "table"
    for row in table.find_all("tr"):
        row["role"] = "row"
    for row in table.select("tbody tr"):
        for cell, name in zip(row.find_all(["th", "td"], recursive=False), names):
            cell["role"] = "rowheader" if cell.name == "th" else "cell"
            cell["data-label"] = name


def one_heading(head):
    "Merge two rows of headings, of which the second only names the index, as pandas writes them."
    rows = head.find_all("tr")
    above, below = [row.find_all("th") for row in rows] if len(rows) == 2 else ([], [0])
    if len(above) != len(below):
        return
    names = [cell.get_text(strip=True) for cell in below]
    if not any(name and cell.get_text(strip=True) for cell, name in zip(above[1:], names[1:])):
        for cell, name in zip(above, names):
            if name:
                cell.string = name
        rows[1].decompose()


def name_columns(head):
    "Headings in words; an index without a name heads nothing."
    for cell in head.find_all("th"):
        cell["scope"] = "col"
        if cell.string is not None:
            cell.string.replace_with(in_words(cell.get_text(strip=True)))
        if not cell.get_text(strip=True):
            cell.name = "td"
            del cell["scope"]


def columns_of(soup, body):
    "The cells of each column, numbered from the last; each is marked as whole, or may be broken."
    columns = {}
    for row in body.find_all("tr"):
        cells = row.find_all(["th", "td"], recursive=False)
        for n, cell in enumerate(cells, -len(cells)):
            if cell.name == "th":
                cell["scope"] = "row"
            columns.setdefault(n, []).append(cell)
            name_code(cell)
            text = cell.get_text(strip=True)
            if keep_together(text):
                mark(cell, "whole")
                continue
            if len(text) > 32 and len(cells) > 3:  # it will be scrolled
                mark(cell, "words")
            break_points(soup, cell)
    return columns


def line_up_numbers(columns, headings):
    "Tidy the columns that hold numbers only, and mark their cells."
    for n, cells in columns.items():
        texts = [c.get_text(strip=True) for c in cells]
        if all(map(is_number, texts)) and not all(t.lower() in EMPTY for t in texts):
            tidy_numbers(cells)
            for cell in cells + ([headings[n]] if -n <= len(headings) else []):
                mark(cell, "num")


def tidy_table(soup, table):
    "One row of headings instead of two, no style of its own, numbers at the right."
    for part in (table, *table.find_all("tr")):
        for name in ("border", "style"):
            part.attrs.pop(name, None)
    head, body = table.find("thead"), table.find("tbody")
    if not head or not body:
        return
    one_heading(head)
    without_counter(head, body)
    name_columns(head)
    columns = columns_of(soup, body)
    last = head.find_all("tr")[-1].find_all(["th", "td"], recursive=False) if head.tr else []
    line_up_numbers(columns, last)
    names = labels(head)
    if len(last) == len(columns) == len(names):
        fit(table, [columns[n] for n in sorted(columns)], names)


# ---------------------------------------------------------------- code


def sources(soup):
    """One definition instead of two: where the source of a symbol follows, its signature is in there.

    A long source is folded, and then the signature stays.
    """
    for fold in soup.select("main details.code-fold"):
        summary = fold.find("summary")
        if summary.get_text(strip=True) != "Exported source":
            continue
        code = fold.get_text()
        lines = code.strip().count("\n")
        if lines > LONGEST_OPEN:
            fold.attrs.pop("open", None)
            summary.string = f"Exported source, {lines} lines"
            continue
        for above in fold.find_parent("div", class_="cell").find_previous_siblings():
            symbol = above.find("h3") if "cell" in above.get("class", []) else None
            if symbol and re.search(rf"(?m)^(?:def|class) {re.escape(symbol['id'])}\b", code):
                above.select_one(".code-copy-outer-scaffold").decompose()
            if symbol or above.name in ("h2", "h3"):
                break


def answers(soup):
    "What the code of an answer puts out is folded with it: a reader may think first."
    for fold in soup.select("main details.code-fold"):
        cell = fold.find_parent("div", class_="cell")
        if cell and fold.find("summary").get_text(strip=True) == "Answer":
            for output in cell.find_all("div", class_="cell-output", recursive=False):
                fold.append(output.extract())


def wrap_sentences(soup):
    """What was printed wraps when it is long (`flow`: for a phone), unless it is laid out in columns: then
    its letters become smaller, as far as they can be read."""
    for pre in soup.select("main .cell-output > pre"):
        text = pre.get_text()
        longest = max(map(len, text.splitlines()), default=0)
        if longest > 140 or longest > 80 and not re.search(r"\S {3,}\S", text):
            mark(pre, "wrap")
        elif longest > 40 and ("\n" not in text.strip() or not re.search(r"\S {2,}\S", text)):
            mark(pre, "flow")
        elif longest > 40:
            mark(pre, "columns", *(["flow"] if longest > 56 else []))
            pre["style"] = f"--columns: {longest}"


def code_lines(soup):
    "The lines of a block of code as elements, so that one that wraps on a phone is seen to go on."
    for code in soup.select("main pre.sourceCode code"):
        html = re.sub(r"(\n+)</span>", r"</span>\1", code.decode_contents())
        lines = html.splitlines(keepends=True)
        if all(line.count("<span") == line.count("</span") for line in lines):
            marked = []
            for line in lines:
                text = re.sub(r"<[^>]*>", "", line)
                inside = len(text) - len(text.lstrip(" "))
                style = f' style="--in:{inside}ch"' if inside else ""
                marked.append(f'<span class="line"{style}>{line}</span>')
            code.clear()
            # Outside a <pre>, the parser would make one space of several.
            new = BeautifulSoup(f"<pre>{''.join(marked)}</pre>", "html.parser").pre
            code.extend(list(new.contents))


# ---------------------------------------------------------------- header, sidebar, landmarks


def one_button_a_section(soup):
    "A section of the sidebar folds with one button, not with two links that lead nowhere."
    for box in soup.select(".sidebar-item-section > .sidebar-item-container"):
        links = box.find_all("a", attrs={"data-bs-toggle": "collapse"})
        if not links:
            continue
        button = soup.new_tag("button", type="button")
        target = links[0]["data-bs-target"]
        button.attrs |= {
            "class": "sidebar-fold",
            "data-bs-toggle": "collapse",
            "data-bs-target": target,
            "aria-controls": target.lstrip("#"),
            "aria-expanded": links[0].get("aria-expanded", "true"),
        }
        if button["aria-expanded"] == "false":
            button["class"] += " collapsed"
        label = soup.new_tag("span")
        label.string = links[0].get_text(strip=True)
        arrow = soup.new_tag("i", attrs={"class": "bi bi-chevron-right", "aria-hidden": "true"})
        button.extend([label, arrow])
        for link in links:
            link.decompose()
        box.append(button)


def header(soup):
    "Search and the theme switch stay in the bar on a phone; the pages are behind one named button."
    for toggler in soup.select(".navbar-toggler"):
        toggler.decompose()
    tools = soup.select_one(".quarto-navbar-tools")
    box = soup.select_one(".navbar-container")
    if tools and box:
        box.append(tools.extract())
        for link in soup.select("a.quarto-color-scheme-toggle"):
            link.decompose()
        switch = soup.new_tag("button", type="button")
        switch.attrs |= {
            "class": "scheme-switch",
            "aria-label": "Dark theme",
            "aria-pressed": "false",
            "title": "Light or dark",
        }
        switch.append(soup.new_tag("i", attrs={"class": "bi", "aria-hidden": "true"}))
        tools.append(switch)
    for toggle in soup.select(".quarto-btn-toggle"):
        toggle.attrs.pop("aria-label", None)
        toggle["aria-expanded"] = "false"
        toggle.append(NavigableString("Pages"))
        for icon in toggle.select("i"):
            icon["aria-hidden"] = "true"


def landmarks(soup):
    "Every landmark has its own name, and the text can be reached with one key."
    for nav in soup.select("nav.quarto-secondary-nav"):
        nav.name = "div"
    names = {
        "nav.navbar": "Site",
        "nav#quarto-sidebar": "Pages",
        "nav.page-navigation": "Previous and next page",
        "nav#TOC": "On this page",
        "nav.quarto-page-breadcrumbs": "Where this page is",
    }
    for where, name in names.items():
        for nav in soup.select(where):
            nav["aria-label"] = name
    main = soup.find("main")
    if main and main.get("id"):
        link = soup.new_tag("a", attrs={"class": "skip-link"}, href=f"#{main['id']}")
        link.string = "Skip to the text"
        soup.body.insert(0, link)
        main["tabindex"] = "-1"


def social_card(soup, image):
    "Name the card that a messenger shows for a link; with `site-url` set, the renderer has done it."
    if soup.find("meta", property="og:image"):
        return
    for name in ("og:image", "twitter:image"):
        key = "property" if name.startswith("og") else "name"
        soup.head.append(soup.new_tag("meta", attrs={key: name, "content": image}))


# ---------------------------------------------------------------- a page, the site


def tables_by_section(soup):
    "What the tables of each section say: the index of the search has code and prose only."
    found = {}
    for table in soup.select("main .cell-output table"):
        section = table.find_parent("section")
        place = section.get("id", "") if section else ""
        found[place] = found.get(place, "") + " " + table.get_text(" ", strip=True)
    return found


def finish_page(path, card=None):
    "Finish one page in place; returns what its tables say, by section."
    soup = BeautifulSoup(draw_in_place(path.read_text()), "html.parser")
    for style in soup.select("div.cell-output style[scoped]"):
        style.decompose()
    figures_as_files(soup, path.parent / "figures", path.stem)
    for table in soup.select("main table"):
        tidy_table(soup, table)
    sources(soup)
    answers(soup)
    wrap_sentences(soup)
    code_lines(soup)
    one_button_a_section(soup)
    header(soup)
    landmarks(soup)
    if card:
        social_card(soup, card)
    path.write_text(str(soup))
    return tables_by_section(soup)


def finish(out, card=None):
    "Finish every page at the top of the site, and bring the search index as a script, too."
    tables = {path.name: finish_page(path, card) for path in sorted(out.glob("*.html"))}
    index = out / "search.json"
    if index.exists():  # a page opened as a file may load a script, but not fetch
        entries = json.loads(index.read_text())
        for entry in entries:
            page, _, place = entry["href"].removeprefix("./").partition("#")
            entry["text"] += tables.get(page, {}).get(place, "")[:LONGEST_TABLE]
        index.write_text(json.dumps(entries))
        (out / "search.js").write_text(f"window.searchIndex = {json.dumps(entries)};\n")
