"""Write torchvision_names.json: names, shapes and logits of torchvision's EfficientNets, weights as in timm's vectors.

Needs PyTorch and torchvision, which nothing else here needs: python tests/data/make_torchvision_names.py [FILE].
B0 is the one with an epsilon of 1e-5, B5 the smallest with 1e-3.
"""

import json
import sys
from pathlib import Path

from make_timm_vectors import MEAN, STD, pictures, state_dict


def main(path):
    import torch
    import torchvision

    found = {"versions": {m.__name__: m.__version__ for m in (torch, torchvision)}}
    found.update(shapes={}, logits=[])
    for model, size in (("b0", 65), ("b5", 33)):
        network = getattr(torchvision.models, f"efficientnet_{model}")(weights=None, num_classes=10)
        shapes = [[n, list(v.shape)] for n, v in network.state_dict().items()]
        found["shapes"][model] = shapes
        state = {n: torch.from_numpy(v) for n, v in state_dict(shapes).items()}
        network.eval().double().load_state_dict(state, strict=True)
        x = (pictures(size).astype("float64") / 255 - MEAN) / STD
        with torch.no_grad():
            y = network(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        values = [[float(v) for v in row] for row in y]
        found["logits"].append({"model": model, "size": size, "values": values})
    text = json.dumps(found, separators=(",", ":")).replace('],["', '],\n["')
    Path(path).write_text(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "torchvision_names.json")
