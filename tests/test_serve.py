"""examples/serve.py: started as a reader starts it, and asked."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from images import ROOT, encode, smooth_image
from tiny import PYTHON

from effnet_repro.data.files import SquaresJob
from effnet_repro.export import onnx_file

pytest.importorskip("uvicorn", reason="uvicorn is in the lock: run `make venv`")
MODEL = ROOT / "tests" / "data" / "exported.onnx"
NAMES = onnx_file.read_metadata(MODEL)["class_names"]


@pytest.fixture(scope="module")
def ask():
    "Start the service; returns a function that posts bytes: (status, what it answers)"
    words = ["-m", "uvicorn", "--app-dir", "examples", "--port", "0", "serve:app"]
    given = {**PYTHON, "MODEL": str(MODEL), "PYTHONUNBUFFERED": "1"}
    service = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, env=given, stderr=subprocess.PIPE, text=True
    )
    said = []
    for line in service.stderr:
        said.append(line)
        if "running on" in line:
            break
    port = re.search(r":(\d+) ", said[-1] if said else "")
    assert port, "".join(said)
    threading.Thread(target=lambda: said.extend(service.stderr), daemon=True).start()

    def post(data, method="POST", path="/predict"):
        link = http.client.HTTPConnection("127.0.0.1", int(port[1]), timeout=60)
        link.request(method, path, data)
        got = link.getresponse()
        return got.status, json.loads(got.read() or b"null") if got.status != 405 else None

    post.port, post.said = int(port[1]), said
    yield post
    os.kill(service.pid, signal.SIGTERM)
    assert service.wait(20) in (0, -signal.SIGTERM)


def huge_png(side):
    "A PNG that says it has side x side pixels, in a few bytes"
    chunk = lambda kind, data: (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    )
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_an_image_is_named_as_the_file_names_it(ask):
    data = encode(smooth_image(50, 70, 1), "PNG")
    status, found = ask(data)
    assert status == 200 and len(found) == 5
    shares = [one["probability"] for one in found]
    assert shares == sorted(shares, reverse=True) and all(one["class"] in NAMES for one in found)
    batch, _ = SquaresJob(32, "modern")([data])
    logits = onnx_file.opened(MODEL)(batch)[0]
    assert found[0]["class"] == NAMES[int(np.argmax(logits))]
    assert shares[0] == pytest.approx(float(np.exp(logits).max() / np.exp(logits).sum()), abs=1e-5)


@pytest.mark.parametrize(
    "data, expected, said",
    [
        (b"", 400, "no image"),
        (b"no image", 400, "no image.*--data-binary"),
        (encode(smooth_image(50, 70, 1), "PNG")[:600], 400, "decoded|cut|Truncated|truncated"),
        (encode(smooth_image(50, 70, 1), "JPEG")[:300], 400, "."),
        (huge_png(60_000), 413, "too many"),
        (huge_png(6_000), 400, "decoded"),
        (b"x" * 30_000_000, 413, "larger than"),
    ],
    ids=["empty", "text", "cut PNG", "cut JPEG", "huge", "empty PNG", "many bytes"],
)
def test_what_is_no_image_gets_an_answer(ask, data, expected, said):
    status, found = ask(data)
    assert status == expected and re.search(said, found["error"]), found
    assert ask(encode(smooth_image(40, 40, 2), "PNG"))[0] == 200  # it is still there


def test_several_at_once_get_their_own_answers(ask):
    images = [encode(smooth_image(40 + i, 60, i), "PNG") for i in range(8)]
    one_by_one = [ask(data) for data in images]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, images * 3)) == one_by_one * 3


def test_clients_that_go_or_send_without_end_leave_no_trace(ask):
    "Nothing in the log, and the next one is answered."
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
    with socket.create_connection(("127.0.0.1", ask.port), 20) as link:
        link.sendall(head + b"Content-Length: 9000\r\n\r\n" + bytes(100))
    with socket.create_connection(("127.0.0.1", ask.port), 20) as link:
        link.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        piece = b"400000\r\n" + bytes(2**22) + b"\r\n"
        with contextlib.suppress(OSError):  # it hangs up
            for _ in range(80):
                link.sendall(piece)
        with contextlib.suppress(OSError):
            assert b" 413 " in link.recv(100)
    assert ask(encode(smooth_image(40, 40, 2), "PNG"))[0] == 200
    assert not [line for line in ask.said if "Traceback" in line or "Exception" in line], ask.said


def test_home_says_what_is_served(ask):
    status, found = ask(None, "GET", "/")
    assert status == 200 and json.loads(found["class_names"]) == NAMES
    assert ask(None, "GET")[0] == 405


@pytest.mark.parametrize(
    "kind, says",
    [("nothing", "xist"), ("a text", "is no file of"), ("other", "not say 'class_names'")],
)
def test_what_is_no_exported_file_is_one_line(tmp_path, kind, says):
    path = tmp_path / "x.onnx"
    if kind == "a text":
        path.write_text("hello")
    elif kind == "other":
        onnx = pytest.importorskip("onnx")
        model = onnx.load(str(MODEL))
        del model.metadata_props[:]
        path.write_bytes(model.SerializeToString())
    words = [sys.executable, "-c", "import serve"]
    given = {**PYTHON, "MODEL": str(path), "PYTHONPATH": f"{ROOT / 'examples'}:{ROOT}"}
    done = subprocess.run(words, env=given, capture_output=True, text=True)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"serve: {path}") and says in done.stderr
