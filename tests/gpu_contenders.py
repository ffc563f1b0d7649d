"""What bench_gpu.py measures: our networks and those that one would pick instead, each in a process of its own.

`contenders` lists them; `worker` is the program of such a process: it compiles, says so, then measures a round for each
line that comes in.
"""

import itertools
import json
import os
import sys
import time

SIZES = {"B0": (224, 160, 256), "B4": (380, 252, 64)}  # native, half, images a step
OTHER_SIZES = {"B1": (240, 512), "B2": (260, 256), "B3": (300, 256), "B5": (456, 64)}  # native
MODES = ("train", "infer")
ANSWER = "answer: "  # begins a worker's lines that are meant for its parent
SEED = 0  # of images and weights, in every process


def contenders():
    "(name, kind, settings, wave) of the part `speed`"
    rows = []
    for size, (native, half, batch) in SIZES.items():
        peer = dict(model=f"efficientnet_{size.lower()}", size=native, batch=batch)
        rows += [
            (f"timm {peer['model']}, compiled", "torch", {**peer, "mode": m}, 1) for m in MODES
        ]
        model = f"EfficientNet{size}"
        for side, many in ((native, batch), (half, 2 * batch)):
            one = dict(model=model, size=side, batch=many, env={"XLA_FLAGS": ""})
            rows += [(f"keras.applications {model}", "keras", {**one, "mode": m}, 1) for m in MODES]
        for arm in ("G16-LN_PN", "G16-GN", "G1-GN"):
            for part, side in (("Native", native), ("Half", half)):
                many = batch * (2 if part == "Half" else 1)  # half the pixels, twice the images
                published = part if arm != "G1-GN" else "Native"  # no half of it was published
                one = dict(model=f"{size}-{arm}-{published}", size=side, batch=many)
                wave = 1 if arm == "G16-LN_PN" else 2 if size == "B0" else 3
                rows += [(f"{size}-{arm}-{part}", "ours", {**one, "mode": m}, wave) for m in MODES]
        plain = dict(model=f"{size}-G16-LN_PN-Native", size=native, batch=batch)
        plain["env"] = {"EFFNET_KERNELS": "0"}
        name = f"{plain['model']}, plain operations"
        rows += [(name, "ours", {**plain, "mode": m}, 5) for m in MODES]
    for model, sizes, batch in (
        ("tf_efficientnetv2_s", (300, 384), 128),
        ("resnet50", (224, 224), 256),
    ):
        for mode, side in zip(MODES, sizes):
            settings = dict(model=model, size=side, batch=batch, mode=mode)
            rows.append((f"timm {model}, compiled", "torch", settings, 4))
    return rows


def batches():
    "The same of the part `batches`: B0 and B4 and their peers at several batch sizes, and the other sizes"
    rows = []
    for wave, (size, (native, half, batch)) in enumerate(SIZES.items(), 1):
        for many, mode in ((1, "train"), (2, "train"), (4, "train"), (1, "infer"), (4, "infer")):
            model, turn = f"EfficientNet{size}", wave if mode == "train" else 3
            at = dict(size=native, batch=many * batch, mode=mode)
            peer = dict(at, model=model, env={"XLA_FLAGS": ""})
            rows.append((f"keras.applications {model}", "keras", peer, turn))
            for part, side in (("Native", native), ("Half", half)):
                name, images = f"{size}-G16-LN_PN-{part}", many * batch * (1 + (part == "Half"))
                one = dict(at, model=name, size=side, batch=images)
                rows.append((name, "ours", one, turn))
            for how in ("default", "reduce-overhead"):
                name = f"efficientnet_{size.lower()}"
                settings = dict(at, model=name, compiler=how)
                rows.append((f"timm {name}, compiled: {how}", "torch", settings, 5))
    for size, (native, batch) in OTHER_SIZES.items():
        at = dict(size=native, batch=batch, mode="train")
        # XLA tries the same algorithms as ever, but does not compare their results: that takes minutes
        env = {"XLA_FLAGS": "--xla_gpu_autotune_level=3"}
        peer = dict(at, model=f"EfficientNet{size}", env=env)
        rows.append((f"keras.applications {peer['model']}", "keras", peer, 4))
        for arm in ("G16-LN_PN-Native", "G1-GN-Native"):
            rows.append((f"{size}-{arm}", "ours", dict(at, model=f"{size}-{arm}"), 4))
    return rows


def _case(model, batch, micro=None, size=None):
    from effnet_repro.config import for_one_device, get_case, load_cases, override

    case = get_case(next(name for name in load_cases() if name.startswith(f"{model}_")))
    case = for_one_device(case, micro or batch, batch)
    return override(case, image_size=size or case.image_size, mixup_alpha=0.0, cutmix_lambda=None)


def _images(batch, size):
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(SEED)
    images = jnp.asarray(rng.integers(0, 256, (batch, size, size, 3), dtype=np.uint8))
    return images, jnp.asarray(rng.integers(0, 1000, batch, dtype=np.int32))


def training_model(case, **classes):
    "The model that `effnet-train` trains, in bfloat16; `classes`: num_classes, where there are not 1000"
    from effnet_repro.efficientnet import build_model
    from effnet_repro.network import segments
    from effnet_repro.scaling import ModelSpec
    from effnet_repro.training import Program, TrainingModel

    spec = ModelSpec.from_case(case, **classes)
    network = build_model(spec, image_size=case.image_size, dtype="float32", seed=SEED)
    trained = tuple(s.name for s in segments(spec))
    return TrainingModel(network, Program(case, spec, trained, "bfloat16", SEED))


def _training_step(model, size, batch):
    "The step that `effnet-train` takes, compiled, with its state and a batch that stays on the GPU"
    import jax
    import jax.numpy as jnp

    from effnet_repro.training.steps import state_variables

    net = training_model(_case(model, batch, size=size))
    state = tuple([v.value for v in some] for some in state_variables(net))
    images, labels = _images(batch, size)
    numbers = dict(update=jnp.int32(0), learning_rate=jnp.float32(1e-4))
    data = (dict(images=images, labels=labels, **numbers),)
    return jax.jit(net.train_step, donate_argnums=0).lower(state, data).compile(), state, data


def ours(model, size, batch, mode, **_):
    "A function of n that runs n steps of one of our networks and waits for the last"
    import jax
    import jax.numpy as jnp
    import numpy as np

    if mode == "train":
        step, first, data = _training_step(model, size, batch)
        state, count = [first], [0]

        def updates(n):
            for _ in range(n):
                batch = dict(data[0], update=jnp.int32(count[0]))
                logs, state[0] = step(state[0], (batch,))
                count[0] += 1
            loss = float(logs["loss"])
            assert np.isfinite(loss), f"the loss after {count[0]} updates is {loss}"

        updates.notes = {"largest_micro_batch": _largest(step, size, batch)}
        return updates
    from dataclasses import replace

    from effnet_repro.kernels.ops import jax_ops
    from effnet_repro.network import fold_proxies, initial_weights, run
    from effnet_repro.scaling import ModelSpec

    ops, spec = jax_ops(), ModelSpec.from_case(_case(model, batch, size=size))
    weights, images = initial_weights(spec), _images(batch, size)[0]
    if spec.proxy_norm:
        spec, weights = replace(spec, folded=True), fold_proxies(weights)
    weights = {k: jnp.asarray(v) for k, v in weights.items()}
    forward = jax.jit(lambda w, x: run(ops, spec, w, ops.cast(x, "bfloat16")))
    forward = forward.lower(weights, images).compile()

    def steps(n):
        for _ in range(n):
            y = forward(weights, images)
        y.block_until_ready()

    return steps


def keras_peer(model, size, batch, mode, **_):
    "The same for a network of keras.applications on the JAX backend: mixed bfloat16, momentum"
    import keras

    keras.utils.set_random_seed(SEED)
    keras.mixed_precision.set_global_policy("mixed_bfloat16")
    net = getattr(keras.applications, model)(weights=None, input_shape=(size, size, 3))
    images, labels = _images(batch, size)
    if mode == "infer":
        import jax

        state = [v.value for v in net.trainable_variables]
        other = [v.value for v in net.non_trainable_variables]
        forward = jax.jit(lambda a, b, x: net.stateless_call(a, b, x, training=False)[0])
        forward = forward.lower(state, other, images).compile()

        def steps(n):
            for _ in range(n):
                y = forward(state, other, images)
            y.block_until_ready()

        return steps
    optimizer = keras.optimizers.SGD(1e-4, momentum=0.9)
    net.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(), jit_compile=True)
    net._symbolic_build(data_batch=(images, labels))
    state = [net._get_jax_state(*[True] * 4, purge_model_variables=True)]
    net.make_train_function()
    resident = itertools.repeat((images, labels))

    def updates(n):
        for _ in range(n):
            logs, state[0] = net.train_function(state[0], resident)
        float(logs["loss"])

    return updates


def torch_peer(model, size, batch, mode, compiler="default", **_):
    "The same for a network of timm: channels last, bfloat16 autocast, torch.compile, momentum"
    import timm
    import torch

    torch.manual_seed(SEED)
    net = timm.create_model(model).cuda().to(memory_format=torch.channels_last)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device="cuda").to(
        memory_format=torch.channels_last
    )
    labels = torch.randint(0, 1000, (batch,), device="cuda")
    net.train(mode == "train")
    run = torch.compile(lambda x: net(x.float().sub(120).div(58)), mode=compiler)
    if mode == "infer":

        def steps(n):
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
                for _ in range(n):
                    run(images)
            torch.cuda.synchronize()

        return steps
    optimizer = torch.optim.SGD(
        net.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-5, fused=True
    )

    def steps(n):
        for _ in range(n):
            with torch.autocast("cuda", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(run(images), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        torch.cuda.synchronize()

    return steps


def runtime(model, size, batch, micro, losses, **_):
    "The same through the training runtime, on all GPUs that the process sees"
    import numpy as np

    from effnet_repro.config import override
    from effnet_repro.data import open_data
    from effnet_repro.training import updates, use_devices
    from effnet_repro.training.steps import compiled_steps

    case, data = _case(model, batch, micro, size), open_data(verbose=False)
    case = override(case, base_learning_rate_exponent=-16)  # no chaos: two curves can be compared
    scope = use_devices(case)
    scope.__enter__()  # for the life of this process
    net = training_model(case, num_classes=data.num_classes)
    stream = updates(case, data, 0)
    first = next(stream)

    def run(batches, n):  # as a run does: read the step before
        do, seen = compiled_steps(net, batches), []
        for _ in range(n):
            seen.append(do.do())
            float(seen[max(0, len(seen) - 2)]["loss"])
        do.sync()
        return seen

    curve = [float(logs["loss"]) for logs in run(stream, losses)]

    def steps(n):
        assert np.isfinite(float(run(itertools.repeat(first), n)[-1]["loss"]))

    steps.notes = {"losses": curve}
    return steps


def _largest(step, size, batch):
    "The largest micro-batch that a compiled update leaves room for, in steps of 16"
    import jax

    one, limit = step.memory_analysis(), jax.local_devices()[0].memory_stats()["bytes_limit"]
    images = batch * size * size * 3
    an_image = (one.temp_size_in_bytes + images) / batch
    return int((limit - one.argument_size_in_bytes + images) / an_image) // 16 * 16


def _peak_gib():
    if "torch" in sys.modules:
        return sys.modules["torch"].cuda.max_memory_allocated() / 2**30
    import jax

    return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / 2**30


def say(value):
    "Answer the process that started this one"
    print(ANSWER + json.dumps(value), flush=True)


def _settle(kind):
    "Alone on the GPU: PyTorch looks for the fastest convolutions only now"
    if kind == "torch":
        import torch

        torch.backends.cudnn.benchmark = True


def _rest():
    "Leave the memory to the others"
    if "torch" in sys.modules:
        sys.modules["torch"].cuda.empty_cache()


def worker(kind, settings):
    "Compile, say so, then run a round for every line that comes in; the first one is not timed"
    os.environ.setdefault("KERAS_BACKEND", "jax")
    begin = time.perf_counter()
    make = {"ours": ours, "torch": torch_peer, "keras": keras_peer, "runtime": runtime}[kind]
    steps = make(**settings)
    if kind != "ours":  # these compile when they first run
        steps(2)
        _rest()
    cached = "JAX_COMPILATION_CACHE_DIR" in os.environ  # then it says nothing about compiling
    about = {"compile_s": "" if cached else round(time.perf_counter() - begin, 1)}
    say({**about, **getattr(steps, "notes", {})})
    n = 0
    for _ in sys.stdin:
        if not n:
            _settle(kind)
            steps(3)
            begin = time.perf_counter()
            steps(5)
            seconds = 3 if kind == "runtime" else 0.4  # Keras' `fit` begins and ends slowly
            n = max(5, int(seconds / ((time.perf_counter() - begin) / 5)))
            say({"steps": n, "peak_gib": _peak_gib()})
        else:
            begin = time.perf_counter()
            steps(n)
            say((time.perf_counter() - begin) / n)
        _rest()
    return None
