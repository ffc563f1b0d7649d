"""Mentions, in backticks, of pages, modules and names: on the site each is a link. That of a page says its title,
that of a module leads to its page or else to its source. nbdev links names of pages' modules itself."""

import ast
import collections
import json
import re

import tree

FENCED = re.compile(r"(?ms)(^```.*?^```)")
SPAN = re.compile(r"(?<![\[`])`([\w./]+(?:\(\))?)`(?![`\]])")
TITLED = re.compile(r"\[`?(\d\d_\w+)(?:\.ipynb)?`?\](?=\()")  # a link that says the notebook's file
# What stands between a name and these words names parts of the published code, which is not ours to link.
PUBLISHED = re.compile(
    r"(?:,?\s+(?:and\s+)?(?:`[^`]+`|\[`[^`]+`\]\([^)]*\)))*\s+of\s+the\s+published\b"
)
GUESS = re.compile(r"(?<!\[)\[`(\w+)(?:\(\))?`\]\((\w+)\.html#\w+\)")  # nbdev's, of a name


def title(path):
    "The title of a notebook's page."
    cells = json.loads(path.read_text()).get("cells", [])
    heads = (re.match(r"# (.+)", "".join(c["source"])) for c in cells)
    return next((m[1].strip() for m in heads if m), path.stem)


def definitions(path):
    "The functions and classes at the top of a module: name -> line."
    nodes = ast.parse(path.read_text()).body
    return {n.name: n.lineno for n in nodes if isinstance(n, (ast.FunctionDef, ast.ClassDef))}


class Mentions:
    "What becomes of each mention; sources are at `source_url`."

    def __init__(self, source_url=""):
        modules = tree.modules()
        defined = {module: definitions(path) for module, path in modules.items()}
        times = collections.Counter(name for names in defined.values() for name in names)
        files = collections.Counter(path.name for path in modules.values())
        # A name that several modules define: which one is meant, only their own page can tell.
        self.ambiguous = {name for name, n in times.items() if n > 1}
        numbered = (path for path in tree.notebooks() if path.name[:2].isdigit())
        self.titles = {path.stem: title(path) for path in numbered}
        self.links = {stem: f"[{said}]({stem}.ipynb)" for stem, said in self.titles.items()}
        self.links |= {f"{stem}.ipynb": link for stem, link in self.links.items()}
        for module, path in modules.items():
            page, source = tree.page_of(path), path.relative_to(tree.ROOT).as_posix()
            at = f"{source_url}/{source}#L"
            inside = source.partition("/")[2]
            written = {source, inside, path.name} if files[path.name] == 1 else {source, inside}
            for file in written - ({path.name} if files[path.name] > 1 else set()):
                self.links[file] = f"[`{file}`]({f'{page}.ipynb' if page else f'{at}1'})"
            for name, line in defined[module].items():
                if not page and name[0] != "_":
                    word = name in self.ambiguous or name.islower() and "_" not in name  # any word
                    for said in (f"{module}.{name}", *([] if word else [name])):
                        self.links.setdefault(said, f"[`{said}`]({at}{line})")
                        self.links.setdefault(f"{said}()", f"[`{said}()`]({at}{line})")

    def link(self, text, page=""):
        "Markdown of a page in which every mention outside of code is a link, and nbdev's guesses are none."
        titled = lambda m: f"[{self.titles[m[1]]}]" if m[1] in self.titles else m[0]
        ours = lambda m: not PUBLISHED.match(m.string, m.end())
        span = lambda m: self.links.get(m[1], m[0]) if ours(m) else m[0]
        clear = lambda m: m[1] not in self.ambiguous or m[2] == page
        sure = lambda m: m[0] if clear(m) and ours(m) else f"`{m[1]}`"
        parts = FENCED.split(text)
        parts[::2] = [GUESS.sub(sure, SPAN.sub(span, TITLED.sub(titled, p))) for p in parts[::2]]
        return "".join(parts)
