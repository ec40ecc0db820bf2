"""Blocks that go there and come back, against a plain transposition of the whole."""

import numpy as np
import pytest

from parallax.interop.llama import Tensor

D, H, K, F = 5, 3, 4, 7
ENTRIES = {
    "vector": (Tensor(("scale",), "norm", (D,), ((0,),)), lambda x: x),
    "table": (Tensor(("table",), "embed", (F, D), ((0,), (1,))), lambda x: x),
    "matrix": (Tensor(("up",), "up", (D, F), ((1,), (0,))), lambda x: x.T),
    "into heads": (Tensor(("q",), "{}.q", (D, H, K), ((1, 2), (0,))), lambda x: x.reshape(D, H * K).T),
    "out of heads": (Tensor(("o",), "{}.o", (H, K, D), ((2,), (0, 1))), lambda x: x.reshape(H * K, D).T),
    "heads": (Tensor(("b",), "{}.b", (H, K), ((0, 1),)), lambda x: x.reshape(H * K)),
}
each = pytest.mark.parametrize("name", ENTRIES)


def example(entry):
    return np.arange(np.prod(entry.shape), dtype=np.float32).reshape(entry.shape)


@each
def test_send_lays_out_a_whole_parameter(name):
    entry, expected = ENTRIES[name]
    sent = entry.send(example(entry))
    np.testing.assert_array_equal(sent, expected(example(entry)))
    assert sent.shape == entry.shape_there
    assert sent.flags.c_contiguous


@each
def test_any_block_is_found_and_brought(name):
    entry, expected = ENTRIES[name]
    here, rng = example(entry), np.random.default_rng(0)
    for _ in range(50):
        starts = [int(rng.integers(size)) for size in entry.shape]
        bounds = tuple(
            slice(start, int(rng.integers(start + 1, size + 1)))
            for start, size in zip(starts, entry.shape, strict=True)
        )
        there = expected(here)[entry.find(bounds)]
        np.testing.assert_array_equal(entry.bring(there, bounds), here[bounds])


@each
@pytest.mark.parametrize("elements", [1, 8, 20, 1000])
def test_cut_covers_a_block_once_in_the_order_of_rows_there(name, elements):
    entry, _ = ENTRIES[name]
    here = example(entry)
    cuts = list(entry.cut(entry.whole, elements))
    sent = np.concatenate([entry.send(here[bounds]) for bounds in cuts])
    np.testing.assert_array_equal(sent, entry.send(here))
    a_row = np.prod(entry.shape) // entry.shape[entry.parts[0][0]]
    assert max(here[bounds].size for bounds in cuts) <= max(elements, a_row)
