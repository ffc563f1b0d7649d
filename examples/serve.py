"""A web service that names images.

MODEL=b1.onnx uvicorn --app-dir examples serve:app
curl --data-binary @photo.jpg http://127.0.0.1:8000/predict
"""

import io
import json
import os
import sys

import anyio
import numpy as np
import onnxruntime
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.routing import Route

from effnet_repro.data.files import SquaresJob

MOST_BYTES, MOST_PIXELS = 20_000_000, 40_000_000  # of an image
MOST_SENT, MOST_SECONDS = 10 * MOST_BYTES, 60  # that a client may send, and take for it
Image.MAX_IMAGE_PIXELS = None  # ours is smaller, and an answer
model = os.environ.get("MODEL") or sys.exit(
    "serve: name a file of effnet-export: MODEL=b1.onnx ..."
)
try:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    names, how = (json.loads(about[name]) for name in ("class_names", "preprocessing"))
except Exception as e:  # ONNX Runtime's errors have no class in common
    lacks = f"it does not say {e}" if isinstance(e, KeyError) else str(e).splitlines()[0]
    sys.exit(f"serve: {model} is no file of effnet-export ({lacks}).")
square = SquaresJob(int(about["image_size"]), how["image_resize"])
at_once = anyio.CapacityLimiter(os.cpu_count() or 1)  # images in memory as pixels


def answer(data):
    "The most likely classes of an image file, or what is wrong with it, and the status"
    try:
        width, height = Image.open(io.BytesIO(data)).size  # reads the file's head only
    except Exception:
        hint = "Send the bytes of a file as the body, as curl --data-binary does."
        return {"error": f"This is no image that can be read. {hint}"}, 400
    if width * height > MOST_PIXELS:
        return {"error": f"{width} x {height} pixels are too many: {MOST_PIXELS:,} at most."}, 413
    batch, (problem,) = square([data])
    if problem:
        return {"error": problem}, 400
    logits = session.run(None, {"images": batch})[0][0].astype("float64")
    p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    best = np.argsort(-p, kind="stable")[:5]
    return [{"class": names[i], "probability": round(float(p[i]), 6)} for i in best], 200


async def body(request):
    "What a client sends, as far as an image may be long; None where it was too slow, or is gone"
    data, sent = bytearray(), 0
    try:
        with anyio.fail_after(MOST_SECONDS):
            async for chunk in request.stream():
                data += chunk if len(data) <= MOST_BYTES else b""
                sent += len(chunk)
                if sent > MOST_SENT:
                    break
    except (TimeoutError, ClientDisconnect):
        return None
    return bytes(data)


async def predict(request):
    data = await body(request)
    if data is None:
        return JSONResponse({"error": f"No whole file came in {MOST_SECONDS} s."}, 408)
    if len(data) > MOST_BYTES:
        return JSONResponse({"error": f"The file is larger than {MOST_BYTES:,} bytes."}, 413)
    found, status = await anyio.to_thread.run_sync(answer, data, limiter=at_once)
    return JSONResponse(found, status)


async def home(request):
    return JSONResponse(dict(about))


app = Starlette(routes=[Route("/", home), Route("/predict", predict, methods=["POST"])])
