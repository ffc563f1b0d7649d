"""The GPU's kernels, interpreted on the CPU, against plain operations in float64."""

import jax
import numpy as np
import pytest

from effnet_repro.kernels import conv, norm, norm_product, product_norm, tiles
from effnet_repro.kernels import ops as gpu_ops
from effnet_repro.norms import normalise
from effnet_repro.ops import get_ops
from effnet_repro.testing import relative_error

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="interprets kernels on the CPU"
)
TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2}


def compare(function, reference, arrays, kind, names):
    "Outputs and all gradients of `function` in `kind` against `reference` in float64"
    import jax.numpy as jnp

    def both(f):  # compiled as one: operation by operation, compiling takes three times as long
        def compute(v, g):
            y, back = jax.vjp(f, v)
            return {"output": y, **back(g)[0]}

        return jax.jit(compute)

    low = {k: jnp.asarray(v, kind if k in names else "float32") for k, v in arrays.items()}
    shape = jax.eval_shape(function, low).shape
    g = jnp.asarray(np.random.default_rng(9).normal(size=shape), kind)
    found = both(function)(low, g)
    assert found["output"].dtype == kind
    with jax.enable_x64(True):
        high = {k: jnp.asarray(np.asarray(v, "float64")) for k, v in low.items()}
        expected = both(reference)(high, jnp.asarray(np.asarray(g, "float64")))
        expected = {k: np.asarray(v) for k, v in expected.items()}
    for name in found:
        error = relative_error(np.asarray(found[name], "float64"), expected[name])
        assert error <= TOLERANCE[kind], f"{name}: {error:.1e}"


def squeeze(q, k1, b1, k2, b2):
    return jax.nn.sigmoid(jax.nn.swish(q @ k1 + b1) @ k2 + b2)


def plain_norm(v, groups, activated):
    y = normalise(
        get_ops("jax"),
        v["x"],
        v["gamma"],
        v.get("beta"),
        groups,
        None,
        "swish" if activated else None,
    )
    y = y - v["mean"] if "mean" in v else y
    factor = v.get("inv_std", 1.0)
    if "k1" in v:
        factor = squeeze(y.mean((1, 2)), *(v[k] for k in ("k1", "b1", "k2", "b2"))) * factor
        factor = factor[:, None, None]
    y = y * factor
    return y + v["shortcut"] if "shortcut" in v else y


def own_norm(v, groups, activated):
    gate = ((v["k1"], v["b1"]), (v["k2"], v["b2"])) if "k1" in v else None
    vectors = (v["gamma"], v.get("beta"), v.get("mean"), v.get("inv_std"))
    x = tiles.to_nchw16c(v["x"]) if gate is not None else v["x"]
    grouped = x.shape[-1] % 16 == 0 and gate is None and "shortcut" not in v
    how = norm.NormOptions(groups, activated, grouped)
    y = norm.fused_norm(x, *vectors, gate, (v.get("shortcut"), None), how)
    return tiles.to_nhwc(y) if grouped else y


def draw_norm(shape, parts, seed):
    rng, c = np.random.default_rng(seed), shape[-1]
    sizes = {"k1": (c, 5), "b1": (5,), "k2": (5, c), "b2": (c,), "shortcut": shape}
    arrays = {"x": rng.normal(1.5, 2.0, shape) + 3 * rng.normal(size=c)}
    for name in ("gamma", *parts):
        centre = 1.0 if name in ("gamma", "inv_std") else 0.0
        arrays[name] = centre + 0.3 * rng.normal(size=sizes.get(name, (c,)))
    return arrays


GATE = ("beta", "mean", "inv_std", "k1", "b1", "k2", "b2")
NORMS = [
    ((1, 9, 9, 40), 4, True, ("beta",), "bfloat16"),
    ((2, 5, 7, 48), 1, True, GATE, "float32"),
    ((1, 33, 33, 16), 1, False, ("shortcut",), "bfloat16"),
    ((2, 7, 8, 32), 2, True, ("beta", "mean", "inv_std"), "float32"),
]


@pytest.mark.parametrize("shape, groups, activated, parts, kind", NORMS)
def test_norm_equals_plain_operations(shape, groups, activated, parts, kind, monkeypatch):
    for name in ("REDUCE", "SUMS"):  # several chunks, the last one not full
        monkeypatch.setattr(norm, name, (256, 2, 32))
    monkeypatch.setattr(norm, "_MOST_CHUNKS", 2)
    arrays = draw_norm(shape, parts, seed=shape[1])
    own = lambda v: own_norm(v, groups, activated)
    compare(own, lambda v: plain_norm(v, groups, activated), arrays, kind, ("x", "shortcut"))


def test_a_dropped_branch_leaves_the_shortcut():
    import jax.numpy as jnp

    rng = np.random.default_rng(1)
    x, shortcut = (jnp.asarray(rng.normal(size=(2, 4, 4, 16)), "float32") for _ in range(2))
    keep = jnp.asarray([0.0, 1.25])
    y = norm.fused_norm(x, residual=(shortcut, keep), how=norm.NormOptions(activated=False))
    np.testing.assert_array_equal(y[0], shortcut[0])
    branch = normalise(get_ops("jax"), x[1:])
    np.testing.assert_allclose(y[1:], shortcut[1:] + 1.25 * branch, rtol=1e-5, atol=1e-5)


CONVS = [
    ((2, 9, 7, 48), 5, 1, "bfloat16"),
    ((1, 9, 8, 16), 3, 2, "float32"),
    ((1, 12, 7, 16), 5, 2, "float32"),
]


@pytest.mark.parametrize("shape, size, strides, kind", CONVS)
def test_group_convolution_equals_plain_one(shape, size, strides, kind):
    rng, c = np.random.default_rng(2), shape[-1]
    arrays = {"x": rng.normal(size=shape), "kernel": rng.normal(size=(size, size, 16, c)) / 20}
    ours = lambda v: conv.grouped_conv(tiles.to_nchw16c(v["x"]), v["kernel"], strides)
    own = lambda v: tiles.to_nhwc(ours(v))
    plain = lambda v: get_ops("jax").conv(v["x"], v["kernel"], strides)
    compare(own, plain, arrays, kind, ("x", "kernel"))


@pytest.mark.parametrize("size, strides", [(3, 1), (3, 2), (5, 1), (5, 2)])
@pytest.mark.parametrize("side", [7, 28])
def test_convolutions_lower_for_a_gpu(side, size, strides, monkeypatch):
    "Triton takes fewer shapes than the interpreter, and says so without a GPU"
    monkeypatch.setattr(tiles, "interpreted", lambda: False)
    x = jax.ShapeDtypeStruct((2, 2, side, side, 16), "bfloat16")
    kernel = jax.ShapeDtypeStruct((size, size, 16, 32), "bfloat16")

    def gradients(x, kernel):
        found, back = jax.vjp(lambda *a: conv.grouped_conv_moments(*a, strides), x, kernel)
        return back(found)

    step = jax.jit(gradients).trace(x, kernel)
    assert step.lower(lowering_platforms=("cuda",)).as_text().count("conv_rows") >= 2


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_a_norm_after_a_convolution_uses_its_moments(mean):
    rng = np.random.default_rng(3)
    arrays = {"x": rng.normal(mean, 1, (2, 9, 7, 32)), "kernel": rng.normal(size=(3, 3, 16, 32))}
    arrays["kernel"] /= 144
    arrays.update(gamma=1 + 0.3 * rng.normal(size=32), beta=rng.normal(size=32))

    def own(v):
        found = conv.grouped_conv_moments(tiles.to_nchw16c(v["x"]), v["kernel"], 1)
        grouped = norm.NormOptions(grouped=True)
        return tiles.to_nhwc(norm.fused_norm(found, v["gamma"], v["beta"], how=grouped))

    convolved = lambda v: get_ops("jax").conv(v["x"], v["kernel"], 1)
    plain = lambda v: plain_norm({**v, "x": convolved(v)}, 1, True)
    compare(own, plain, arrays, "float32" if mean == 0 else "bfloat16", ("x", "kernel"))


def test_norm_groups_must_divide():
    with pytest.raises(ValueError, match="norm_groups=5, channels=24"):
        norm.fused_norm(np.zeros((1, 2, 2, 24), "float32"), how=norm.NormOptions(norm_groups=5))


BLOCKS = [
    ("LN_PN", True, 16, "float32", 1e-5),
    ("GN", False, 16, "float32", 1e-5),
    ("LN_PN", False, 8, "bfloat16", 2e-2),
]


@pytest.mark.parametrize("norm, training, group_size, kind, tolerance", BLOCKS)
def test_a_block_is_the_same_through_the_kernels(norm, training, group_size, kind, tolerance):
    from effnet_repro.mbconv import mbconv
    from effnet_repro.network import block_params, initial_value
    from effnet_repro.ops import TrainContext
    from effnet_repro.scaling import Block, ModelSpec

    groups = 1 if norm == "LN_PN" else 4
    spec = ModelSpec(norm=norm, norm_groups=groups, group_size=group_size)
    block = Block("block2b", 3, 1, 16, 64, 16, 4, group_size, True, True, 0.5)
    rng = np.random.default_rng(0)
    table = [p for part in block_params(spec, block) for p in part]
    weights = {p.name: initial_value(p, rng) + 0.1 * rng.normal(size=p.shape) for p in table}
    weights = {n: w.astype("float32") for n, w in weights.items()}
    x = get_ops("jax").const(rng.normal(size=(3, 6, 6, 16)), kind)
    context = lambda: TrainContext(get_ops("jax"), 3) if training else None
    compiled = lambda ops: jax.jit(lambda w, x: mbconv(ops, spec, block, w, x, context()))
    plain, own = (compiled(ops)(weights, x) for ops in (get_ops("jax"), gpu_ops.GPUOps()))
    assert relative_error(own, plain) < tolerance


PRODUCTS = [((1, 9, 33, 24), 96, 3, "bfloat16")]  # the page itself compares in float32


@pytest.mark.parametrize("shape, channels, groups, kind", PRODUCTS)
def test_norm_of_a_product_equals_plain_operations(shape, channels, groups, kind):
    arrays = draw_norm((*shape[:3], channels), ("beta", "mean", "inv_std"), seed=3)
    rng, names = np.random.default_rng(4), ("gamma", "beta", "mean", "inv_std")
    arrays["x"], arrays["w"] = rng.normal(size=shape), rng.normal(size=(shape[-1], channels)) / 4
    vectors = lambda v: [v[k] for k in names]
    how = dict(norm_groups=groups, grouped=True)
    product = lambda v: product_norm.fused_matmul_norm(v["x"], v["w"], *vectors(v), **how)
    plain = lambda v: plain_norm({**v, "x": v["x"] @ v["w"]}, groups, True)
    compare(lambda v: tiles.to_nhwc(product(v)), plain, arrays, kind, ("x", "w"))


def test_no_gradient_of_the_images_is_the_same_gradient_of_the_matrix():
    rng = np.random.default_rng(5)
    x, w, g = (rng.normal(size=s).astype("float32") for s in ((1, 3, 3, 5), (5, 16), (1, 3, 3, 16)))
    loss = lambda x, w: (product_norm.fused_matmul_norm(x, w) * g).sum()
    alone, both = (jax.jit(jax.grad(loss, n))(x, w) for n in (1, (0, 1)))
    assert relative_error(alone, both[1]) < 1e-6


PROJECTIONS = [((1, 6, 11, 48), 12, 2, "bfloat16")]  # the page itself compares in float32


@pytest.mark.parametrize("shape, thin, groups, kind", PROJECTIONS)
def test_product_of_a_norm_equals_plain_operations(shape, thin, groups, kind):
    arrays = draw_norm(shape, GATE, seed=6)
    arrays["w"] = np.random.default_rng(7).normal(size=(shape[-1], thin)) / 4
    names = ("gamma", "beta", "mean", "inv_std")

    def product(v):
        x, gate = tiles.to_nchw16c(v["x"]), ((v["k1"], v["b1"]), (v["k2"], v["b2"]))
        return norm_product.fused_norm_matmul(x, v["w"], tuple(v[k] for k in names), gate, groups)

    plain = lambda v: plain_norm(v, groups, True) @ v["w"]
    compare(product, plain, arrays, kind, ("x", "w"))
