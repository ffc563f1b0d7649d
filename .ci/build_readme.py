"""Write README.md from nbs/index.ipynb: text, code and stored outputs, with links for a plain
repository page. `--check` writes nothing and says whether README.md is up to date."""

import base64
import html
import json
import posixpath
import re
import sys

import tree

NOTE = "<!-- Written by `make readme` from nbs/index.ipynb: edit that. -->\n"
FIGURES = {"image/svg+xml": "svg", "image/png": "png", "image/jpeg": "jpg"}


def for_repository(markdown, wrong):
    "The Markdown with links that were relative to nbs/ made relative to the top."

    def one(match):
        href = match[2]
        if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//|#", href):
            return match[0]
        path, mark, tail = href.partition("#")
        if path.endswith(".html"):  # a page of the site: its notebook
            page = posixpath.basename(path)[:-5]
            names = [p.name for p in tree.notebooks() if tree.page_name(p.name) == f"{page}.ipynb"]
            path, mark, tail = (names[0], "", "") if names else (path, mark, tail)
        target = posixpath.normpath(posixpath.join("nbs", path))
        if target.startswith("../") or not (tree.ROOT / target).exists():
            wrong.append(f"nbs/index.ipynb links to {href}, which does not exist")
        return f"{match[1]}{target}{mark}{tail}{match[3]}"

    parts = re.split(r"(?ms)(^```.*?^```[^\n]*$)", markdown)  # not inside fences
    return "".join(p if i % 2 else tree.MD_LINK.sub(one, p) for i, p in enumerate(parts))


def output_text(output, figures, wrong, alt=""):
    "Markdown for one stored output; an image becomes a file in README_files/ and says `alt`."
    if output["output_type"] == "stream":
        return (
            ""
            if output["name"] == "stderr"
            else f"```text\n{''.join(output['text']).rstrip()}\n```\n"
        )
    if output["output_type"] == "error":
        wrong.append("nbs/index.ipynb has an error as output")
        return ""
    data = output["data"]
    if "text/markdown" in data:
        return for_repository("".join(data["text/markdown"]), wrong).rstrip() + "\n"
    for kind, ending in FIGURES.items():
        if kind in data:
            name = f"README_files/figure-{len(figures) + 1}.{ending}"
            value = "".join(data[kind])
            figures[name] = value.encode() if ending == "svg" else base64.b64decode(value)
            return f"![{alt}]({name})\n"
    if "text/html" in data:
        table = re.sub(r"(?s)<style.*?</style>", "", "".join(data["text/html"]))
        return re.sub(r"\n\s*\n", "\n", table).strip() + "\n"
    return f"```text\n{html.unescape(''.join(data['text/plain'])).rstrip()}\n```\n"


def build():
    "README.md's text, its images by name, and what is wrong."
    nb = json.loads((tree.ROOT / "nbs" / "index.ipynb").read_text())
    parts, figures, wrong = [NOTE], {}, []
    for cell in nb["cells"]:
        source = "".join(cell["source"]).strip("\n")
        lines = source.split("\n")
        head = [line[2:].strip() for line in lines if line.startswith("#|")]
        if cell["cell_type"] == "raw" or any(
            re.match(r"(hide|default_exp|include:\s*false)\b", h) for h in head
        ):
            continue
        if cell["cell_type"] == "markdown":
            parts.append(for_repository(source, wrong) + "\n")
            continue
        code = "\n".join(line for line in lines if not line.startswith("#|")).strip("\n")
        quiet = any(re.match(r"(hide_input|echo:\s*false)\b", h) for h in head)
        if code and not quiet:
            parts.append(f"```python\n{code}\n```\n")
        if not any(re.match(r"(hide_output|output:\s*false)\b", h) for h in head):
            alt = next((h[8:].strip() for h in head if h.startswith("fig-alt:")), "")
            parts += [out for o in cell["outputs"] if (out := output_text(o, figures, wrong, alt))]
    return "\n".join(parts), figures, wrong


def main():
    if not (tree.ROOT / "nbs" / "index.ipynb").exists():
        sys.exit("build_readme: nbs/index.ipynb does not exist")
    readme, figures, wrong = build()
    if wrong:
        sys.exit("\n".join(wrong) + f"\nbuild_readme: {len(wrong)} problems")
    made = {"README.md": readme.encode(), **figures}
    stale = [
        n
        for n, data in made.items()
        if not (tree.ROOT / n).exists() or (tree.ROOT / n).read_bytes() != data
    ]
    left = [str(n) for n in tree.files() if n.parts[0] == "README_files" and str(n) not in made]
    if "--check" in sys.argv[1:]:
        if stale or left:
            sys.exit(
                f"{', '.join(stale + left)}: not what nbs/index.ipynb says now; run 'make readme'"
            )
        print("build_readme: README.md is up to date")
        return
    for name in left:
        (tree.ROOT / name).unlink()
    for name in stale:
        (tree.ROOT / name).parent.mkdir(exist_ok=True)
        (tree.ROOT / name).write_bytes(made[name])
    print(
        "build_readme: wrote " + ", ".join(stale)
        if stale
        else "build_readme: README.md is up to date"
    )


if __name__ == "__main__":
    main()
