"""Programs in other notations than the compiler's of today: they are read alike, or refused, never passed over."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from parallelism.planning.hlo_collectives import read_collectives
from parallelism.planning.hlo_flops import read_flops

FLOPS = 7 * 2 * 8 * 16 * 16 + 2 * 8 * 16 * 16


@pytest.fixture(scope="module")
def text():
    """A loop of seven matmuls, one matmul beside it."""

    def function(x, w):
        x, _ = lax.scan(lambda x, _: (jnp.sin(x @ w), None), x, None, length=7)
        return lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x)

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((8, 16), (16, 16))]
    return jax.jit(function).lower(*shapes).compile().as_text()


def with_operand_shapes(text):
    """As other versions print it: fusion(f32[8,16]{1,0} %x, (s32[], f32[8]{0}) %y)."""
    return re.sub(r"(?<=[(,])( ?)%([\w.-]+)(?=[,)])", r"\1(s32[], f32[8,16]{1,0:T(8,128)}) %\2", text)


def without_signatures(text):
    return re.sub(r"^((?:ENTRY )?%[\w.-]+) \(.*\) -> .*\{$", r"\1 {", text, flags=re.MULTILINE)


def with_metadata_of_kernels(text):
    """As the TPU compiler prints attributes of a kernel, over three lines."""
    return text.replace(
        ", metadata={", ', frontend_attributes={kernel_metadata={\n"block":"{\\"q\\": 1}"\n}}, metadata={'
    )


@pytest.mark.parametrize(
    "change",
    [lambda text: text.replace("%", ""), with_operand_shapes, without_signatures, with_metadata_of_kernels],
    ids=["names without %", "operands with shapes", "headers without signatures", "metadata of kernels"],
)
def test_other_notations_are_read_alike(text, change):
    assert read_flops(text) == FLOPS
    assert change(text) != text
    assert read_flops(change(text)) == FLOPS
    assert read_collectives(change(text)) == []


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (" = ", " := ", "a line of the program is no instruction that is known: "),
        ("body=", "loop_body=", r"while .* must name one body, not none"),
        (r" dot\(", " ragged-dot(", "ragged-dot is not counted; known matmuls are dot and convolution"),
        ("lhs_contracting_dims=", "left_summed=", "does not say which dims it sums over"),
        (r"dot\(%[\w.-]+", "dot(%nothing", "operand nothing of dot .* is no instruction of "),
        (
            "branch_computations=",
            "cases=",
            "computation .* is called in no way that is known, and holds what is counted",
        ),
    ],
)
def test_what_is_not_known_is_refused(text, old, new, words):
    changed = re.sub(old, new, text)
    assert changed != text
    with pytest.raises(ValueError, match=words):
        read_flops(changed)


@pytest.mark.parametrize("target", ["__onednn$matmul", "__cublas$lt$matmul$f8", "__cudnn$convForward"])
def test_a_matmul_of_a_library_is_refused(target):
    line = f'  ROOT %c = f32[4] custom-call(%p), custom_call_target="{target}"'
    program = ["HloModule m", "ENTRY %e (p: f32[4]) -> f32[4] {", "  %p = f32[4] parameter(0)", line, "}"]
    with pytest.raises(ValueError, match=re.escape(f"{target} is not counted")):
        read_flops("\n".join(program))
    assert read_flops("\n".join(program).replace(target, "tpu_custom_call")) == 0
