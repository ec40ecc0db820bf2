"""What arrays take in tiles: as a TPU's compiler laid them out, and what holds for all."""

import itertools
import math

import pytest

from parallelism.planning.tiles import tiled_size

SHAPES = [shape for rank in range(4) for shape in itertools.product((1, 2, 3, 8, 12, 16, 100, 128, 344), repeat=rank)]


@pytest.mark.parametrize(
    ("shape", "laid"),
    [
        ((4, 16, 4, 32), (4, 16, 4, 128)),  # f32[4,16,4,32]{3,2,1,0:T(4,128)}
        ((4, 128, 4, 32), (4, 128, 4, 32)),  # f32[4,128,4,32]{1,3,2,0:T(8,128)}
        ((4, 64, 96), (4, 64, 128)),
        ((4, 96, 16), (4, 128, 16)),  # bf16[4,96,16]{1,2,0:T(8,128)(2,1)}
        ((6, 64, 8, 64), (6, 64, 8, 128)),
        ((4, 128), (4, 128)),  # f32[4,128]{1,0:T(4,128)}
        ((72, 128), (72, 128)),
        ((9, 3), (128, 4)),
        ((100,), (128,)),
        ((), (128,)),
    ],
)
def test_an_array_lies_as_wastes_least(shape, laid):
    assert tiled_size(shape) == math.prod(laid)


def test_whole_tiles_hold_what_they_hold():
    for shape in SHAPES:
        size = tiled_size(shape)
        assert size % 128 == 0
        assert math.prod(shape) <= size <= 2 * 128 * math.prod(shape)
        if 128 in shape and any(dim % 8 == 0 for dim in shape[: shape.index(128)]):
            assert size == math.prod(shape)


def test_the_order_of_dims_does_not_matter():
    for shape in SHAPES:
        assert len({tiled_size(each) for each in itertools.permutations(shape)}) == 1


def test_more_of_a_dim_takes_no_less():
    for shape in SHAPES:
        for dim in range(len(shape)):
            assert tiled_size((*shape[:dim], shape[dim] + 1, *shape[dim + 1 :])) >= tiled_size(shape)
