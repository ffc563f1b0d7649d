"Mentions of pages and modules: on the site each is a link; that of a page says its title, not the notebook's file."

import collections
import functools
import json
import re

import tree

FENCED = re.compile(r"(?ms)(^```.*?^```)")
LINKED = re.compile(r"\[`?(\d\d_\w+)(?:\.ipynb)?`?\](?=\()")
MODULE = re.compile(r"(?<![\[`])`([\w/]+\.py)`(?![`\]])")
BARE = re.compile(r"(?<![\[`])`(\d\d_\w+)(?:\.ipynb)?`(?![`\]])")


def outside_code(change, text):
    "Markdown with `change` made to all of it but fenced code."
    parts = FENCED.split(text)
    return "".join(p if i % 2 else change(p) for i, p in enumerate(parts))


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

    linked = lambda m: f"[{known[m[1]]}]" if m[1] in known else m[0]
    bare = lambda m: f"[{known[m[1]]}]({m[1]}.ipynb)" if m[1] in known else m[0]
    return outside_code(lambda prose: BARE.sub(bare, LINKED.sub(linked, prose)), text)


@functools.lru_cache(maxsize=None)
def files():
    "How a page may write a module's file -> the module: its path, that below the package, a name that no other has."
    found, names = {}, collections.Counter(path.name for path in tree.modules().values())
    for module, path in tree.modules().items():
        inside = path.relative_to(tree.ROOT / "effnet_repro").as_posix()
        found[f"effnet_repro/{inside}"] = module
        written = {inside, path.name} if names[path.name] == 1 else {inside} - {path.name}
        found.update(dict.fromkeys(written, module))
    return found


def link_modules(text, source_url):
    "Markdown in which the file of a module, in backticks, is a link to its page or, without one, to its source."

    def one(match):
        module = files().get(match[1])
        if module is None:
            return match[0]
        path = tree.modules()[module]
        page = tree.page_of(path)
        inside = path.relative_to(tree.ROOT).as_posix()
        return f"[`{match[1]}`]({f'{page}.ipynb' if page else f'{source_url}/{inside}#L1'})"

    return outside_code(lambda prose: MODULE.sub(one, prose), text)
