"""The seam between model and placement: transparent while nothing is bound, strict about names always."""

import threading

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from parallax import axes

X = jnp.arange(6.0).reshape(2, 3)
UNKNOWN = "logical axis 'tensor' is unknown; known are .*act_embed.*vocab"


class Recorder(axes.Placement):
    """A placement that notes what it is asked, and marks what passes through it."""

    def __init__(self):
        self.calls = []

    def constrain(self, x, names):
        self.calls.append(("constrain", x.shape, names))
        return x + 100

    def local(self, fn, in_names, out_names, *, checked):
        assert checked
        self.calls.append(("local", in_names, out_names))
        return lambda *args: fn(*args) + 1000


def test_constrain_returns_the_very_array_when_nothing_is_bound():
    assert axes.constrain(X, "batch", None) is X


def test_constrain_adds_nothing_to_a_traced_function():
    jaxpr = jax.make_jaxpr(lambda x: axes.constrain(x, "batch", "act_embed"))(X)
    assert not jaxpr.eqns


@pytest.mark.parametrize("placement", [None, Recorder()], ids=["unbound", "bound"])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("tensor", None), UNKNOWN),
        (("batch", "tensor"), UNKNOWN),
        (("batch",), r"\('batch',\) must be one a dim of shape \(2, 3\); give 2 names"),
        (("batch", None, None), r"must be one a dim of shape \(2, 3\); give 2 names"),
    ],
)
def test_constrain_refuses_wrong_names(placement, names, message):
    with axes.bound(placement), pytest.raises(ValueError, match=message):
        axes.constrain(X, *names)
    assert placement is None or not placement.calls


def test_bound_placement_receives_array_and_names():
    recorder = Recorder()
    with axes.bound(recorder):
        y = axes.constrain(X, "batch", "act_mlp")
    assert recorder.calls == [("constrain", (2, 3), ("batch", "act_mlp"))]
    assert jnp.array_equal(y, X + 100)


def test_binding_is_seen_while_a_function_is_traced():
    recorder = Recorder()
    with axes.bound(recorder):
        y = jax.jit(lambda x: axes.constrain(x, "batch", None))(X)
    assert jnp.array_equal(y, X + 100)


def test_bindings_nest_and_none_unbinds():
    outer, inner = Recorder(), Recorder()
    with axes.bound(outer):
        with axes.bound(None):
            assert axes.constrain(X, "batch", None) is X
            with axes.bound(inner):
                axes.constrain(X, "batch", None)
            assert axes.constrain(X, "batch", None) is X
        axes.constrain(X, None, "vocab")
    assert axes.constrain(X, "batch", None) is X
    assert [names for _, _, names in outer.calls] == [(None, "vocab")]
    assert [names for _, _, names in inner.calls] == [("batch", None)]


def test_an_error_unbinds():
    with pytest.raises(ValueError, match="unknown"), axes.bound(Recorder()):
        axes.constrain(X, "nonsense", None)
    assert axes.constrain(X, "batch", None) is X


def test_a_binding_stays_in_its_thread():
    seen = []
    with axes.bound(Recorder()):
        thread = threading.Thread(target=lambda: seen.append(axes.constrain(X, "batch", None)))
        thread.start()
        thread.join()
    assert seen[0] is X


def test_local_is_the_function_itself_when_nothing_is_bound():
    def double(x):
        return 2 * x

    names = [("batch", None)]
    assert axes.local(double, names, ("batch", None)) is double
    with axes.bound(None):
        assert axes.local(double, names, ("batch", None)) is double


def test_local_goes_through_a_bound_placement():
    recorder = Recorder()
    with axes.bound(recorder):
        y = axes.local(lambda x: 2 * x, [("batch", None)], ("batch", None))(X)
    assert recorder.calls == [("local", [("batch", None)], ("batch", None))]
    assert jnp.array_equal(y, 2 * X + 1000)


@pytest.mark.parametrize("placement", [None, Recorder()], ids=["unbound", "bound"])
def test_local_passes_none_and_keys_through(placement):
    key, seen = jax.random.key(0), []

    def noted(x, nothing, key):
        seen.append((nothing, key))
        return x

    names = [("batch", None), ("batch", "length"), ()]
    with axes.bound(placement):
        axes.local(noted, names, ("batch", None))(X, None, key)
    assert seen == [(None, key)]


@pytest.mark.parametrize(("in_names", "out_names"), [([("tensor",)], ()), ([("batch",)], ("tensor",))])
def test_local_refuses_unknown_names(in_names, out_names):
    with pytest.raises(ValueError, match=UNKNOWN):
        axes.local(lambda x: x, in_names, out_names)


LABELS = {"inputs": ["embed"], "decays": True, "role": "hidden"}


def test_param_is_float32_and_carries_its_labels():
    key = jax.random.key(3)
    made = axes.param(jax.random.normal, key, (4, 2), ["embed", None], **LABELS)
    assert made[...].dtype == jnp.float32
    assert axes.names_of(made) == ("embed", None)
    known = axes.describe(made)
    assert known == axes.Parameter((4, 2), ("embed", None), ("embed",), decays=True, role="hidden")
    assert (known.size, known.input_dims, known.output_dims) == (8, (0,), (1,))
    assert jnp.array_equal(made[...], jax.random.normal(key, (4, 2)))


def test_dims_that_parameters_are_stacked_along_are_no_dims_of_a_matmul():
    @nnx.vmap(transform_metadata={nnx.PARTITION_NAME: "layers"})
    def stack(key):
        return axes.param(jax.random.normal, key, (4, 2), ("embed", "mlp"), **LABELS)

    known = axes.describe(stack(jax.random.split(jax.random.key(0), 3)))
    assert (known.shape, known.names) == ((3, 4, 2), ("layers", "embed", "mlp"))
    assert (known.input_dims, known.output_dims) == ((1,), (2,))


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("embed", "tensor"), {}, UNKNOWN),
        (("embed",), {}, r"must be one a dim of shape \(4, 2\); give 2 names"),
        (("mlp", "heads"), {}, r"inputs=\('embed',\) must be dims of one matrix; choose from mlp, heads"),
        (("layers", "embed"), {"inputs": ("layers",)}, "choose from embed"),
        (("embed", "mlp"), {"role": "wide"}, "role='wide' is not one of input, hidden, output"),
    ],
)
def test_param_refuses_wrong_labels(names, changes, message):
    with pytest.raises(ValueError, match=message):
        axes.param(jax.random.normal, jax.random.key(0), (4, 2), names, **LABELS | changes)


@pytest.mark.parametrize("label", LABELS)
def test_a_parameter_without_a_label_raises(label):
    """Where it is made, and where it was made in another way."""
    labels = {name: LABELS[name] for name in LABELS if name != label}
    with pytest.raises(TypeError, match=label):
        axes.param(jax.random.normal, jax.random.key(0), (4, 2), ("embed", "mlp"), **labels)
    with pytest.raises(ValueError, match=rf"shape \(4, 2\) lacks {label}; make it with axes.param"):
        axes.describe(nnx.Param(jnp.zeros((4, 2)), out_sharding=("embed", "mlp"), eager_sharding=False, **labels))


def test_parameters_and_activations_share_no_name():
    """Or a rule for weights would silently move activations too."""
    assert not axes.PARAM_AXES & axes.ACTIVATION_AXES
