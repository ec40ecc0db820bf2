"""Operations are counted by what a program executes; expectations are derived by hand or by brute force."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from parallelism.planning.hlo_flops import read_flops


def count(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read_flops(jax.jit(function).lower(*arguments).compile().as_text())


def test_a_product_takes_two_operations_a_pair():
    assert count(lambda a, b: a @ b, (30, 40), (40, 50)) == 2 * 30 * 40 * 50
    assert count(lambda a, b: jnp.einsum("bij,bkj->bik", a, b), (3, 20, 30), (3, 40, 30)) == 2 * 3 * 20 * 30 * 40
    assert count(jnp.sin, (30, 40)) == 0


def test_a_loop_counts_as_often_as_it_runs():
    def looped(a, b):
        return lax.scan(lambda x, _: (jnp.sin(x @ b), None), a, None, length=7)[0]

    def nested(a, b):
        return lax.scan(lambda x, _: (looped(x, b), None), a, None, length=3)[0]

    once = 2 * 30 * 40 * 40
    assert count(looped, (30, 40), (40, 40)) == 7 * once
    assert count(nested, (30, 40), (40, 40)) == 21 * once


def test_of_two_branches_the_heavier_counts():
    def either(a, b, which):
        return lax.cond(which[0] > 0, lambda: a @ b @ b, lambda: a @ b)

    assert count(either, (30, 40), (40, 40), (1,)) == 2 * 2 * 30 * 40 * 40


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [(0, 0), (2, 1)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("spread", [1, 3])
def test_a_convolution_counts_what_falls_on_elements(stride, padding, dilation, spread):
    size, taps, channels, features = 11, 3, 4, 5

    def convolve(x, kernel):
        return lax.conv_general_dilated(x, kernel, (stride,), (padding,), (spread,), (dilation,), ("NWC", "WIO", "NWC"))

    x, kernel = (2, size, channels), (taps, channels, features)
    results = jax.eval_shape(convolve, jnp.zeros(x), jnp.zeros(kernel)).shape[1]
    places = {i * spread for i in range(size)}
    pairs = sum(
        (i * stride + tap * dilation - padding[0]) in places
        for i, tap in itertools.product(range(results), range(taps))
    )
    assert count(convolve, x, kernel) == 2 * 2 * features * channels * pairs


def test_agrees_with_the_compilers_own_count_of_a_program_without_loops():
    def step(a, b):
        return jax.grad(lambda a: jnp.sum((a @ b @ b) ** 2))(a)

    compiled = jax.jit(step).lower(jnp.zeros((64, 128)), jnp.zeros((128, 128))).compile()
    assert read_flops(compiled.as_text()) == pytest.approx(compiled.cost_analysis()["flops"], rel=0.02)


GEMM = """HloModule jit_step, num_partitions=8

ENTRY %main (a: bf16[4,8,16], b: bf16[4,16,32]) -> f32[4,8,32] {
  %a = bf16[4,8,16]{2,1,0} parameter(0)
  %b = bf16[4,16,32]{2,1,0} parameter(1)
  %gemm = (f32[4,8,32]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"],\
"rhs_contracting_dimensions":["1"],"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  %attend = (bf16[4,8,32]{2,1,0}, u8[0]{0}) custom-call(%a, %b), custom_call_target="__cudnn$fmhaSoftmax"
  %experts = bf16[4,8,32]{2,1,0} custom-call(%a, %b), custom_call_target="__gpu$xla.gpu.triton", backend_config={\
name = "rows_by_weights", ir = "..."}
  ROOT %result = f32[4,8,32]{2,1,0} get-tuple-element(%gemm), index=0
}
"""


def test_matmuls_by_a_gpus_library_are_counted_and_kernels_are_left_to_the_model():
    assert read_flops(GEMM) == 2 * 4 * 8 * 32 * 16
    with pytest.raises(ValueError, match="custom-call gemm does not say which dims it sums over"):
        read_flops(GEMM.replace("lhs_contracting_dimensions", "dims"))
    with pytest.raises(ValueError, match="is not counted"):
        read_flops(GEMM.replace("lt$matmul", "lt$matmul$f8"))
