"""Open pages in JupyterLab as a reader does, restart the kernel, run all cells, and say how it went:

    python tests/jupyterlab.py nbs/10_group_conv.ipynb nbs/12_proxy_norm.ipynb

It works on a copy of the project and shows Debian's Chromium the pages; an image of each page's end
is left in _screenshots/. Not a part of the check: nbdev_test and papermill run the same cells there.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / ".ci"))
import tree  # noqa: E402

PORT, PATIENCE = 8899, 900  # seconds for a page
SHOTS = ROOT / "_screenshots"


def ask(address, path):
    return json.load(urllib.request.urlopen(f"{address}/api/{path}"))


def wait(done, seconds, what):
    end = time.time() + seconds
    while not done():
        if time.time() > end:
            sys.exit(f"jupyterlab: {what} took more than {seconds} s")
        time.sleep(1)


def answers(address):
    try:
        return bool(ask(address, "status"))
    except OSError:
        return False


def run(browser, address, copy, name):
    "Run all cells of a page in the browser; returns what is wrong with it afterwards."
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(f"{address}/lab/tree/{name}?reset")
    page.locator(".jp-Notebook").wait_for()
    page.wait_for_timeout(3000)  # menus and kernel arrive one after the other
    page.get_by_role("menuitem", name="Kernel").click()
    page.get_by_text("Restart Kernel and Run All Cells").click()
    page.locator(".jp-Dialog .jp-mod-accept").click()
    cells = []

    def ran():
        page.keyboard.press("Control+s")
        page.wait_for_timeout(2000)
        cells[:] = [c for c in json.loads((copy / name).read_text())["cells"] if c["source"]]
        code = [c for c in cells if c["cell_type"] == "code"]
        failed = any(o["output_type"] == "error" for c in code for o in c["outputs"])
        idle = all(k["execution_state"] == "idle" for k in ask(address, "kernels"))
        return idle and (failed or all(c["execution_count"] for c in code))

    wait(ran, PATIENCE, name)
    SHOTS.mkdir(exist_ok=True)
    page.screenshot(path=SHOTS / f"{Path(name).stem}-jupyterlab.png")
    page.close()
    outputs = [o for c in cells if c["cell_type"] == "code" for o in c["outputs"]]
    figures = sum(any(kind.startswith("image/") for kind in o.get("data", {})) for o in outputs)
    print(f"{name}: {len(cells)} cells, {figures} figures", flush=True)
    return [f"{name}: {o['ename']}: {o['evalue']}" for o in outputs if o["output_type"] == "error"]


def main(names):
    from playwright.sync_api import sync_playwright

    address = f"http://127.0.0.1:{PORT}"
    with tempfile.TemporaryDirectory(prefix="effnet_lab_") as folder:
        copy = tree.copy(Path(folder) / "copy")
        words = (
            "lab --no-browser --allow-root --ServerApp.token= --ServerApp.port_retries=0".split()
        )
        server = subprocess.Popen(
            ["jupyter", *words, f"--port={PORT}"],
            cwd=copy,
            env={**tree.environment(copy), "IN_TEST": "1"},  # the smoke budget
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait(lambda: answers(address), 60, "starting JupyterLab")
            with sync_playwright() as playwright:
                path = shutil.which("chromium") or shutil.which("chromium-browser")
                browser = playwright.chromium.launch(executable_path=path)
                wrong = [line for name in names for line in run(browser, address, copy, name)]
                browser.close()
        finally:
            server.terminate()
            server.wait()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main(sys.argv[1:] or sys.exit(__doc__))
