"""Write timm_vectors.json: logits of timm's EfficientNets for weights that follow from their names.

Needs PyTorch and timm, which nothing else here needs: pip install torch timm, then
python tests/data/make_timm_vectors.py. The committed file holds the versions it was made with.
"""

import json
import zlib
from pathlib import Path

import numpy as np

CASES = (  # model, side of the image in pixels
    ("tf_efficientnet_b0", 64),
    ("tf_efficientnet_b0", 75),
    ("tf_efficientnet_b3", 64),
    ("efficientnet_b0", 64),
    ("efficientnet_b0", 65),
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def draw(name, shape):
    """The array that stands under a name: kernels that keep a signal alive, batch norms away from their start."""
    z = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    end = name.rsplit(".", 1)[-1]
    if end == "weight":
        z = z * np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 1 + 0.2 * z
    else:
        z = {"bias": 0.2 * z, "running_mean": 0.1 * z, "running_var": np.exp(0.4 * z)}[end]
    return z.astype("float32")


def state_dict(shapes):
    """Name -> array for a list of (name, shape); counters of batches are zero."""
    counter = lambda name: name.endswith("num_batches_tracked")
    zero = np.zeros((), "int64")
    return {n: zero if counter(n) else draw(n, tuple(s)) for n, s in shapes}


def images(size):
    """(2, size, size, 3) float32, whole numbers of 0..255."""
    return np.random.default_rng(size).integers(0, 256, (2, size, size, 3)).astype("float32")


def main():
    import timm
    import torch

    found = {"versions": {"timm": timm.__version__, "torch": torch.__version__}, "logits": []}
    shapes_of = lambda model: [[n, list(v.shape)] for n, v in model.state_dict().items()]
    found["shapes"] = {a: shapes_of(timm.create_model(a, num_classes=10)) for a, _ in CASES}
    found["checksums"] = {}
    for size in range(8):
        for arch in (f"tf_efficientnet_b{size}", f"efficientnet_b{size}"):
            listed = json.dumps(sorted(shapes_of(timm.create_model(arch))))
            found["checksums"][arch] = zlib.crc32(listed.encode())
    for arch, size in CASES:
        model = timm.create_model(arch, num_classes=10).eval().double()  # so that rounding is ours
        state = {n: torch.from_numpy(v) for n, v in state_dict(found["shapes"][arch]).items()}
        model.load_state_dict(state, strict=True)
        x = (images(size).astype("float64") / 255 - MEAN) / STD
        with torch.no_grad():
            y = model(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()))
        row = {"arch": arch, "size": size, "values": [[float(v) for v in r] for r in y.numpy()]}
        found["logits"].append(row)
    found["shapes"] = {a: s for a, s in found["shapes"].items() if a.startswith("tf_")}
    text = json.dumps(found, separators=(",", ":")).replace('],["', '],\n["')
    (Path(__file__).parent / "timm_vectors.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
