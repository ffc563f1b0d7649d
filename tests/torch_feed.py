"""How fast PyTorch trains, or only reads, from a folder of JPEGs: what bench_use.py sets beside `effnet-train`.

cores: torchvision's ImageFolder and a DataLoader of 16 workers (Pillow decodes, RandomResizedCrop and flip follow).
gpu: the workers read bytes, `torchvision.io.decode_jpeg` decodes a batch on the GPU, which crops and flips, too.

    python tests/torch_feed.py {cores,gpu} FOLDER [--size 160] [--batch 768] [--network efficientnet_b0]

The network is timm's: channels last, bfloat16 autocast, torch.compile, SGD with momentum. Without one, batches are only
brought to the GPU. Prints a line of JSON.
"""

import argparse
import itertools
import json
import time
from statistics import median

import torch
import torchvision
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

SEED = 0


class Bytes(Dataset):
    "The files of an ImageFolder as they are"

    def __init__(self, folder):
        self.samples = folder.samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        path, label = self.samples[i]
        return torchvision.io.read_file(path), label


def joined(some):
    "Files as one tensor, which crosses processes faster than many"
    files, labels = zip(*some)
    return torch.cat(files), [len(one) for one in files], torch.tensor(labels)


def loaders(a):
    "A function that makes an epoch's batches of (images on the device (B, 3, S, S) uint8, labels)"
    crop = [v2.RandomResizedCrop(a.size, antialias=False), v2.RandomHorizontalFlip()]
    how = dict(batch_size=a.batch, shuffle=True, drop_last=True, num_workers=a.workers)
    how.update(persistent_workers=a.workers > 0, pin_memory=a.device == "cuda")
    if a.decoder == "cores":
        chain = v2.Compose([*crop, v2.PILToTensor()])
        loader = DataLoader(torchvision.datasets.ImageFolder(a.folder, chain), **how)

        def batches():
            for images, labels in loader:
                yield images.to(a.device, non_blocking=True), labels.to(a.device)

        return batches
    files = Bytes(torchvision.datasets.ImageFolder(a.folder))
    loader, change = DataLoader(files, collate_fn=joined, **how), v2.Compose(crop)

    def on_gpu():
        for data, sizes, labels in loader:
            mode = torchvision.io.ImageReadMode.RGB
            images = torchvision.io.decode_jpeg(list(data.split(sizes)), mode, device=a.device)
            yield torch.stack([change(image) for image in images]), labels.to(a.device)

    return on_gpu


def training(a):
    "A function that does a training step"
    import timm

    net = timm.create_model(a.network).to(a.device).to(memory_format=torch.channels_last).train()
    run = torch.compile(lambda x: net(x.float().sub(120).div(58))) if a.compile else net
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-5)

    def step(images, labels):
        images = images.to(memory_format=torch.channels_last)
        with torch.autocast(a.device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(
                run(images if a.compile else images.float()), labels
            )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def measure(a):
    "Images a second, some readings one after the other, each over `seconds`"
    wait = torch.cuda.synchronize if a.device == "cuda" else lambda: None
    step = training(a) if a.network else lambda images, labels: None
    begin = time.perf_counter()
    random = torch.randint(0, 256, (a.batch, 3, a.size, a.size), dtype=torch.uint8)
    step(random.to(a.device), torch.zeros(a.batch, dtype=torch.int64, device=a.device))
    wait()
    compiled = time.perf_counter() - begin
    make = loaders(a)
    stream = itertools.chain.from_iterable(make() for _ in itertools.count())
    found = []
    for _ in range(3 * a.warm):  # the workers' first batches, and the device's
        step(*next(stream))
    wait()
    for _ in range(3):
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < a.seconds:
            for _ in range(a.warm):
                step(*next(stream))
                count += a.batch
            wait()
        found.append(count / (time.perf_counter() - begin))
    speed = dict(images_per_s=median(found), lowest=min(found), highest=max(found))
    speed = {name: round(value, 1) for name, value in speed.items()}
    return {
        **speed,
        "rounds": len(found),
        "global_batch_size": a.batch,
        "compile_s": round(compiled, 1),
    }


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("decoder", choices=("cores", "gpu"))
    p.add_argument("folder")
    p.add_argument("--size", type=int, default=160)
    p.add_argument("--batch", type=int, default=768)
    p.add_argument("--workers", type=int, default=16)
    p.add_argument("--network", default="")
    p.add_argument("--seconds", type=float, default=4, help="of each of three readings")
    p.add_argument("--warm", type=int, default=4, help="steps between two waits for the device")
    p.add_argument("--device", default="cuda")
    p.add_argument("--eager", dest="compile", action="store_false", help="without torch.compile")
    a = p.parse_args(words)
    torch.manual_seed(SEED)
    print(json.dumps(measure(a)), flush=True)


if __name__ == "__main__":
    main()
