"""The grouped matmul: each row by its own weights, at any load, with its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from parallax.cpu import BLOCKS, block_sizes
from parallax.layers import grouped
from parallax.layers.grouped import grouped_matmul, order_by_group

D, F = 5, 7
LOADS = {
    "even": (4, 4, 4, 4),
    "skewed": (1, 11, 0, 4),
    "all on one": (0, 0, 16, 0),
    "some rows in no group": (3, 0, 2, 4),
    "no row in a group": (0, 0, 0, 0),
}


compiled = jax.jit(grouped_matmul)


def example(sizes, n=16, dtype=np.float64):
    rng = np.random.default_rng(sum(sizes) + len(sizes))
    x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((n, D), (len(sizes), D, F)))
    return x, w, jnp.asarray(sizes, jnp.int32)


def expected(x, w, sizes):
    """Group by group, rows beyond them zero."""
    x, w, sizes = (np.asarray(each, np.float64) for each in (x, w, sizes))
    out, start = np.zeros((len(x), w.shape[2])), 0
    for weights, size in zip(w, sizes.astype(int), strict=True):
        out[start : start + size] = x[start : start + size] @ weights
        start += size
    return out


@pytest.mark.parametrize("sizes", LOADS.values(), ids=LOADS)
def test_value_and_gradients_at_any_load(x64, sizes):
    x, w, sizes = example(sizes)
    weights = (w, jax.device_put(np.cos(np.asarray(w)[..., :3])))
    found = compiled(x, weights, sizes)
    for each, stack in zip(found, weights, strict=True):
        np.testing.assert_allclose(each, expected(x, stack, sizes), rtol=1e-12, atol=1e-14)
    # With sizes as an argument all loads share their programs.
    check_grads(
        lambda x, *weights: compiled(x, weights, sizes), (x, *weights), order=1, modes=["rev"], atol=1e-7, rtol=1e-7
    )


@pytest.mark.parametrize(
    "sizes",
    [
        (300, 0, 37, 2663),
        (0, 3000, 0, 0),
        (1000, 0, 0, 2000),
        (1800, 500, 600, 100),
        (1, 63, 1, 900),
        (700, 800, 650, 600),
    ],
)
def test_groups_of_many_blocks(sizes):
    """Large blocks that reach into the next groups, or would reach beyond the rows; groups that begin at once."""
    x, w, sizes = example(sizes, 3000, np.float32)
    weights = (w, jax.device_put(np.cos(np.asarray(w)[..., :3])))
    assert block_sizes(3000, 4) == [*BLOCKS]
    values, of_x, of_weights = jax.device_get(squared(x, weights, sizes))
    back = 0
    for value, of_w, stack in zip(values, of_weights, weights, strict=True):
        np.testing.assert_allclose(value, expected(x, stack, sizes), atol=1e-5)
        back = back + expected(value, np.swapaxes(stack, 1, 2), sizes)
        for number, end in enumerate(np.cumsum(sizes)):
            rows = slice(end - sizes[number], end)
            # In float32, up to 3,000 addends.
            np.testing.assert_allclose(of_w[number], np.asarray(x)[rows].T @ value[rows], rtol=1e-5, atol=2e-3)
    np.testing.assert_allclose(of_x, back, atol=1e-4)


def test_no_rows():
    x, weights, sizes = example((0, 0), 0, np.float32)
    (value,), of_x, (of_w,) = squared(x, (weights,), sizes)
    assert (value.shape, of_x.shape) == ((0, F), (0, D))
    np.testing.assert_array_equal(of_w, np.zeros((2, D, F)))


@jax.jit
def squared(x, weights, sizes):
    """What the rows give, and the gradients of half of its square."""
    values, vjp = jax.vjp(lambda x, weights: grouped_matmul(x, weights, sizes), x, weights)
    return values, *vjp(values)


@pytest.mark.parametrize(
    ("sizes", "n"), [(LOADS["skewed"], 16), (LOADS["no row in a group"], 16), ((90, 0, 300, 7), 400)]
)
def test_the_kernel_of_a_tpu_adds_up_each_groups_rows(sizes, n):
    """Interpreted, with rows, D and F that fill no tile."""
    x, _, sizes = example(sizes, n, np.float32)
    g = jnp.cos(jnp.arange(n * F, dtype=jnp.float32)).reshape(n, F)
    found = grouped.rows_by_rows_in_megablox(x, g, sizes, interpret=True)
    ends = np.cumsum(sizes)
    groups = [slice(end - size, end) for end, size in zip(ends, np.asarray(sizes), strict=True)]
    wanted = [np.asarray(x, np.float64)[group].T @ np.asarray(g, np.float64)[group] for group in groups]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module", params=[("float32", 21, 37), ("bfloat16", 21, 37), ("bfloat16", 64, 48)])
def on_gpu(request):
    """The kernels of a GPU, interpreted with small tiles: the value, the gradient by rows of two stacks, by weights.

    D and F are whole tiles or not. All loads share their programs.
    """
    dtype, depth, width = request.param
    n, E = 200, 4
    rng = np.random.default_rng(0)
    shapes = {"x": (n, depth), "g": (n, width), "v": (E, depth, width), "w": (E, depth, width)}
    given = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}

    @jax.jit
    def run(sizes, x, g, v, w):
        return (
            grouped.rows_by_weights_in_triton((x,), (w,), sizes, interpret=True),
            grouped.rows_by_weights_in_triton((g, x @ w[0]), (v, w), sizes, transposed=True, interpret=True),
            grouped.rows_by_rows_in_triton(x, g, sizes, interpret=True),
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "TILE", 16)
        patch.setattr(grouped, "DEPTH", 64)
        yield given, lambda sizes, **other: run(jnp.asarray(sizes, jnp.int32), **given | other)


@pytest.mark.parametrize("sizes", [(90, 0, 103, 7), (0, 200, 0, 0), (3, 0, 2, 130), (48, 64, 16, 0), (0, 0, 0, 0)])
def test_the_kernels_of_a_gpu(on_gpu, sizes):
    given, run = on_gpu
    total = sum(sizes)
    # Rows of no group may be anything at all.
    x, g = (given[name].at[total:].set(jnp.nan) for name in ("x", "g"))
    value, of_x, of_w = run(sizes, x=x, g=g)
    assert {each.dtype for each in (value, of_x, of_w)} == {x.dtype}
    x, g, v, w = (np.asarray(given[name], np.float64) for name in "xgvw")
    other = np.asarray(given["x"] @ given["w"][0], np.float64)
    wanted = np.zeros_like(w)
    for number, end in enumerate(np.cumsum(sizes)):
        rows = slice(end - sizes[number], end)
        wanted[number] = x[rows].T @ g[rows]
    # Sums are float32's, of up to 200 addends; what is given is rounded once.
    close = {"rtol": 2**-8 if value.dtype == jnp.bfloat16 else 1e-5, "atol": 1e-4}
    np.testing.assert_allclose(np.asarray(value, np.float64), expected(x, w, sizes), **close)
    both = sum(expected(rows, np.swapaxes(each, 1, 2), sizes) for rows, each in ((g, v), (other, w)))
    np.testing.assert_allclose(np.asarray(of_x, np.float64), both, **close)
    np.testing.assert_allclose(np.asarray(of_w, np.float64), wanted, **close)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16", "float64"])
def test_a_gpu_has_kernels_of_two_dtypes(x64, dtype):
    x, w, sizes = example(LOADS["skewed"], dtype=dtype)

    def both(x, w):
        value, vjp = jax.vjp(lambda x, w: grouped_matmul(x, (w,), sizes)[0], x, w)
        return vjp(value)

    program = str(jax.make_jaxpr(both)(x, w))
    kernels = [program.count(f"name={name}\n") for name in ("rows_by_weights", "rows_by_rows")]
    assert kernels == ([2, 1] if dtype in ("bfloat16", "float32") else [0, 0])


@pytest.mark.parametrize("sizes", [(512, 0), (512, 512)], ids=["in blocks", "at once"])
def test_gradient_of_weights_is_summed_in_float32(sizes):
    """512 equal addends: in bfloat16 a sum of ones stops at 256."""
    x, w, sizes = jnp.ones((sum(sizes), 2), jnp.bfloat16), jnp.ones((2, 2, 3), jnp.bfloat16), jnp.array(sizes)

    @jax.jit
    def gradient(w):
        value, vjp = jax.vjp(lambda w: grouped_matmul(x, (w,), sizes)[0], w)
        assert value.dtype == jnp.bfloat16
        return vjp(jnp.ones_like(value))[0]

    of_w = np.asarray(gradient(w), np.float32)
    np.testing.assert_array_equal(of_w, np.broadcast_to(sizes[:, None, None], of_w.shape))


def test_blocks_fit_the_rows():
    assert [block_sizes(4096, groups) for groups in (2, 8, 256, 8192)] == [
        [*BLOCKS], [*BLOCKS], [*BLOCKS, 16], [*BLOCKS, 1]
    ]  # fmt: skip
    assert [block_sizes(n, 4) for n in (1, 3, 9, 100, 300)] == [[1], [1], [2], [64, 32], [256, 64]]
    assert block_sizes(3, 1) == [3]
    assert block_sizes(0, 4) == []


def test_order_by_group_is_a_stable_sort():
    """The number 5 is no group, and comes last."""
    group = jnp.asarray(np.random.default_rng(0).integers(6, size=97), jnp.int32)
    comes, goes, sizes = jax.jit(order_by_group, static_argnums=1)(group, 5)
    np.testing.assert_array_equal(comes, np.argsort(group, stable=True))
    np.testing.assert_array_equal(goes[comes], np.arange(97))
    np.testing.assert_array_equal(sizes, np.bincount(group, minlength=6)[:5])
    assert comes.dtype == goes.dtype == sizes.dtype == jnp.int32
