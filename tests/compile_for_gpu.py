"""Compile a training step for H100s on a computer that has none, and count the programs that it starts.

`python tests/compile_for_gpu.py B0-G16-LN_PN-Half_16IPU_2x8 --images 192 --gpus 2`, after `pip install "jax[cuda13]"`.
Nothing runs: this shows that the kernels compile for the GPU, and how a change moves the number of programs, the
exchanges between GPUs and the memory. With `--results results` it writes a row of gpu_programs.csv. Compiling takes
longer on a GPU, where XLA also tries out which products are fastest.
"""

import argparse
import collections
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from gpu_contenders import training_model

# What XLA asks a GPU about itself, answered for an H100 with 80 GB
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 10 }
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
"""
EXCHANGES = "exchanges between GPUs"
KINDS = {
    "triton": "our kernels",
    "cublas": "matrix products of the library",
    "cudnn": "convolutions",
}


def use_kernels():
    "Let networks use our kernels although there is no GPU"
    from effnet_repro import keras_layers
    from effnet_repro.kernels import tiles
    from effnet_repro.kernels.ops import GPUOps

    ops = GPUOps()
    keras_layers.jax_ops, tiles.interpreted = lambda: ops, lambda: False


def described(gpus):
    "A mesh of GPUs that are only described"
    import jax
    import numpy as np
    from jax.experimental import topologies

    how = dict(target_config=H100, topology=f"1x1x{gpus}")
    devices = topologies.get_topology_desc("h100", "cuda", **how).devices
    return jax.sharding.Mesh(np.array(devices), ("batch",))


def share_steps(mesh):
    "Let the GPUs of a mesh share a training step, as Keras' distribution would"
    import keras

    shared = SimpleNamespace(device_mesh=SimpleNamespace(backend_mesh=mesh), batch_dim_name="batch")
    keras.distribution.distribution = lambda: shared


def arguments(model, case, mesh):
    "Shapes of the step's state and batch, on the GPUs of a mesh"
    import jax

    from effnet_repro.training.steps import state_variables

    place = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    of = lambda shape, kind, *axes: jax.ShapeDtypeStruct(shape, kind, sharding=place(*axes))
    state = tuple([of(tuple(v.shape), v.dtype) for v in some] for some in state_variables(model))
    n, side = case.global_batch_size, case.image_size
    batch = dict(images=of((n, side, side, 3), "uint8", "batch"), labels=of((n,), "int32", "batch"))
    batch.update(update=of((), "int32"), learning_rate=of((), "float32"))
    if case.mixup_alpha:
        batch["mixup"] = of(case.mix_groups, "float32", "batch")
    return state, (batch,)


def programs(text):
    "Kind -> how many programs of it the compiled step starts; `text`: as XLA prints it"
    found = collections.Counter()
    for line in text[text.index("\nENTRY ") :].splitlines():
        found[EXCHANGES] += bool(re.search(r" all-reduce(-start)?\(", line))
        rest = line.partition(" = ")[2]
        if not re.search(r" (fusion|custom-call|copy)\(", rest):
            continue
        target = re.search(r'custom_call_target="([^"]+)"', rest)
        named = (name for part, name in KINDS.items() if target and part in target[1])
        found[next(named, target[1] if target else "XLA's own: element-wise, sums, copies")] += 1
    return found


def main(words=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("case", help="a published name")
    p.add_argument("--images", type=int, default=256, help="of a GPU's part of a training step")
    p.add_argument("--gpus", type=int, default=1, help="that share a training step")
    p.add_argument("--results", type=Path, help="folder of gpu_programs.csv; default: none")
    a = p.parse_args(words)
    os.environ.update(KERAS_BACKEND="jax", JAX_PLATFORMS="cpu")
    import jax

    from effnet_repro.config import for_one_device, get_case, override
    from effnet_repro.kernels.ops import add_xla_flags

    os.environ["XLA_FLAGS"] = (
        add_xla_flags(os.environ.get("XLA_FLAGS", "")) + " --xla_gpu_autotune_level=0"
    )
    case = for_one_device(get_case(a.case), a.images, a.images * a.gpus)
    case, mesh = override(case, cutmix_lambda=None), described(a.gpus)
    use_kernels()
    model = training_model(case)
    if a.gpus > 1:
        share_steps(mesh)
    clock = [time.perf_counter()]
    traced = jax.jit(model.train_step, donate_argnums=0).trace(*arguments(model, case, mesh))
    clock.append(time.perf_counter())
    lowered = traced.lower(lowering_platforms=("cuda",))
    clock.append(time.perf_counter())
    compiled = lowered.compile()
    clock.append(time.perf_counter())
    names = "traced", "lowered", "compiled"
    print(", ".join(f"{n} in {b - a:.1f} s" for n, a, b in zip(names, clock, clock[1:])))
    found = programs(compiled.as_text())
    for name, count in found.most_common():
        print(f"{count:6,}  {name}")
    total = found.total() - found[EXCHANGES]
    gib = compiled.memory_analysis().temp_size_in_bytes / 2**30
    print(f"{total:6,}  programs a step")
    print(f"{gib:6.2f}  GiB of activations and temporary values")
    if a.results:
        row = dict(case=a.case, images=a.images, gpus=a.gpus, programs=total, gib=round(gib, 3))
        write(a.results, {**row, "exchanges": found[EXCHANGES], "ours": found["our kernels"]})


def write(folder, row):
    "Write a row of gpu_programs.csv; rows of other revisions stay"
    from effnet_repro.results import NO_SEED, origin, write_rows

    command = ["python", "tests/compile_for_gpu.py", *sys.argv[1:]]
    about = origin("an H100 that was only described", command, NO_SEED, 1)
    write_rows(folder / "gpu_programs.csv", [row], ("case", "images", "gpus", "revision"), about)


if __name__ == "__main__":
    main()
