"Mentions of pages: on the site each is a link that says the page's title, not the notebook's file."

import functools
import json
import re

import tree

FENCED = re.compile(r"(?ms)(^```.*?^```)")
LINKED = re.compile(r"\[`?(\d\d_\w+)(?:\.ipynb)?`?\](?=\()")
BARE = re.compile(r"(?<![\[`])`(\d\d_\w+)(?:\.ipynb)?`(?![`\]])")


@functools.lru_cache(maxsize=None)
def titles():
    "Notebook without its ending -> the title of its page."
    found = {}
    for path in tree.notebooks():
        cells = json.loads(path.read_text())["cells"]
        heads = (re.match(r"# (.+)", "".join(c["source"])) for c in cells)
        found[path.stem] = next((m[1].strip() for m in heads if m), path.stem)
    return found


def link_pages(text, known):
    "Markdown in which `12_proxy_norm`, or a link that says so, is a link that says the title in `known`."

    def linked(match):
        return f"[{known[match[1]]}]" if match[1] in known else match[0]

    def bare(match):
        return f"[{known[match[1]]}]({match[1]}.ipynb)" if match[1] in known else match[0]

    parts = FENCED.split(text)
    return "".join(
        p if i % 2 else BARE.sub(bare, LINKED.sub(linked, p)) for i, p in enumerate(parts)
    )
