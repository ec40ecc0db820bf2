"""A mixture of experts: a router sends each token through a few of many feed-forwards.

Invariant: acts on each token alone, and drops none at any load. The router computes in float32. What it reports of a
batch are sums over rows, so microbatches and devices change nothing.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from parallax import mup
from parallax.axes import constrain, local, param, read
from parallax.config import ExpertsConfig, TransformerConfig
from parallax.layers.dispatch import on_devices_of_experts
from parallax.layers.feedforward import ACTIVATIONS, GatedFeedForward
from parallax.layers.grouped import grouped_matmul, order_by_group

Aux = dict[str, jax.Array]
"""Sums over the counted tokens of a batch, in float32: `balance_loss` and `router_z_loss` with their weights, as parts
of the objective; `router_entropy` in nats; `expert_load` [E], how many tokens chose each expert."""

SLOPE = 1.702
"""The slope of the sigmoid in gpt-oss's activation, which makes it nearly GELU."""


class Experts(nnx.Module):
    """y = Σ_e g_e expert_e(x) over the k experts of a token (Shazeer et al. 2017, arXiv:1701.06538, eq. 1)."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.experts, self.activation = config.experts, config.activation
        experts = config.experts
        D, E, F = config.embed_dim, experts.num_experts, config.expert_dim
        inward = jax.nn.initializers.normal(D**-0.5)
        outward, multiplier = jax.nn.initializers.normal(mup.branch_deviation(config, F)), mup.branch_multiplier(config)
        to_router = jax.nn.initializers.normal(D**-0.5 * mup.width_ratio(config) ** -0.5)
        matrix = functools.partial(param, decays=True, role="hidden")
        vector = functools.partial(param, jax.nn.initializers.zeros, inputs=(), decays=False, role="input")
        into, out = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.router = param(
            to_router, rngs.params(), (D, E), ("embed", None), inputs=("embed",), decays=True, role="output"
        )
        self.gate = matrix(inward, rngs.params(), (E, D, F), into, inputs=("embed",))
        self.up = matrix(inward, rngs.params(), (E, D, F), into, inputs=("embed",))
        self.down = matrix(outward, rngs.params(), (E, F, D), out, inputs=("mlp",), multiplier=multiplier)
        if experts.bias:
            self.router_bias = vector(rngs.params(), (E,), (None,))
            self.gate_bias = vector(rngs.params(), (E, F), ("experts", "mlp"))
            self.up_bias = vector(rngs.params(), (E, F), ("experts", "mlp"))
            # Whole on the devices that share experts, since it is added outside of what each computes for its own.
            self.down_bias = vector(rngs.params(), (E, D), (None, "embed"), multiplier=multiplier)
        if experts.balance_bias_rate:
            self.balance_bias = vector(rngs.params(), (E,), (None,), learned=False)
        if experts.shared_mlp_dim:
            self.shared = GatedFeedForward(config, mlp_dim=experts.shared_mlp_dim, rngs=rngs)

    def __call__(
        self, x_BTD: jax.Array, counted_BT: jax.Array | None = None, dropout_keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, Aux]:
        """[B, T, D] to [B, T, D], and what the router did with the tokens that `route` counts, by default all.

        The keys are for adapters of the shared feed-forward.
        """
        dtype = x_BTD.dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        # A TPU would else round both sides to bfloat16, and choose other experts than the scores say.
        exactly = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        logits_BTE = exactly("BTD,DE->BTE", x_BTD.astype(wide), read(self.router, wide))
        if self.experts.bias:
            logits_BTE = logits_BTE + read(self.router_bias, wide)[None, None]
        logits_BTE = constrain(logits_BTE, "batch", "length", None)
        balance = read(self.balance_bias, wide) if self.experts.balance_bias_rate else None
        ids_BTk, gates_BTk, aux = route(logits_BTE, self.experts, balance, counted_BT)

        y_BTD = self._mix(x_BTD, ids_BTk, gates_BTk)
        if self.experts.bias:
            # Outside of what devices share by hidden units, of which each would add it.
            chosen_BTE = jnp.sum(_one_hot(ids_BTk, self.experts, gates_BTk), axis=2)
            y_BTD = y_BTD + jnp.einsum("BTE,ED->BTD", chosen_BTE.astype(dtype), read(self.down_bias, dtype))
        if self.experts.shared_mlp_dim:
            y_BTD = y_BTD + self.shared(x_BTD, None, dropout_keys_B)[0]
        return y_BTD, aux

    def _mix(self, x_BTD: jax.Array, ids_BTk: jax.Array, gates_BTk: jax.Array) -> jax.Array:
        """Σ_e g_e expert_e(x) without the last bias; each device sorts the tokens that its experts get."""
        rows, into, out = ("batch", "length", None), ("experts", None, "act_mlp"), ("experts", "act_mlp", None)
        weights = [read(each, x_BTD.dtype) for each in (self.gate, self.up, self.down)]
        biases = [read(each, x_BTD.dtype) for each in (self.gate_bias, self.up_bias)] if self.experts.bias else []
        sizes = {"num_experts": self.experts.num_experts, "width": self.gate.shape[-1]}

        def on_device(*arrays: jax.Array) -> jax.Array:
            def compute(x_nD: jax.Array, ids_nk: jax.Array, gates_nk: jax.Array) -> jax.Array:
                how = {"clamp": self.experts.clamp, "activation": self.activation}
                return mixture(x_nD, ids_nk, gates_nk, *arrays[3:], **how)

            x_nD, ids_nk, gates_nk = (x.reshape(-1, x.shape[2]) for x in arrays[:3])
            y_nD = on_devices_of_experts(compute, x_nD, ids_nk, gates_nk, **sizes)
            return y_nD.reshape(*arrays[0].shape[:2], 1, -1)

        names = (rows, rows, rows, into, into, out, *[("experts", "act_mlp") for _ in biases])
        # JAX cannot see into the kernels of experts.
        run = local(on_device, names, (*rows[:2], "act_mlp", None), checked=False)
        # One partial sum from each device that shares the hidden units.
        return jnp.sum(run(x_BTD, ids_BTk, gates_BTk, *weights, *biases), axis=2)


def route(
    logits_BTE: jax.Array,
    experts: ExpertsConfig,
    balance_E: jax.Array | None = None,
    counted_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Aux]:
    """The router's choice: ids [B, T, k], weights [B, T, k] in the logits' dtype, and what it did.

    With scores s and the bias b of the balance, experts are those of the k largest s + b. Their weights are s, or
    s / Σ s over the chosen. With f_e = E/(kT) · (tokens of the row that chose e) and P_e the mean share of e in the
    scores of a token of the row (DeepSeek-V3, arXiv:2412.19437, eq. 17 to 20, T times for a row of T counted tokens):
      balance_loss = weight · Σ_rows T Σ_e f_e P_e        router_z_loss = weight · Σ_tokens log²Σ_e exp(logit_e)

    Args:
      counted_BT: which tokens count, bool, or how much each does, a float: with 1/T for each, a row counts as one.
        `expert_load` is of whole tokens either way.
    """
    E, k, dtype = experts.num_experts, experts.experts_per_token, logits_BTE.dtype
    scores_BTE = (jax.nn.softmax if experts.scores == "softmax" else jax.nn.sigmoid)(logits_BTE)
    ranked_BTE = scores_BTE if balance_E is None else scores_BTE + balance_E[None, None]
    rows = ("batch", "length", None)
    # Each device ranks its own tokens: else the compiler would gather the scores of all.
    ids_BTk = local(lambda ranked: jax.lax.top_k(ranked, k)[1], [rows], rows)(jax.lax.stop_gradient(ranked_BTE))
    hits_BTkE = _one_hot(ids_BTk, experts, jnp.ones(ids_BTk.shape, dtype))
    gates_BTk = jnp.sum(hits_BTkE * scores_BTE[:, :, None], axis=-1)
    if experts.renormalize and experts.scores == "softmax":
        gates_BTk = gates_BTk / jnp.sum(gates_BTk, axis=-1, keepdims=True)
    elif experts.renormalize:
        # The same by logarithms: below -100 all scores may be 0.
        chosen_BTk = jnp.sum(hits_BTkE * jax.nn.log_sigmoid(logits_BTE)[:, :, None], axis=-1)
        gates_BTk = jax.nn.softmax(chosen_BTk, axis=-1)

    counts_BT = jnp.ones(ids_BTk.shape[:2], dtype) if counted_BT is None else counted_BT.astype(dtype)
    shares_BTE = scores_BTE
    if experts.scores == "sigmoid":
        shares_BTE = jax.nn.softmax(jax.nn.log_sigmoid(logits_BTE), axis=-1)
    load_BE = jnp.einsum("BTkE,BT->BE", hits_BTkE, counts_BT)
    whole_BE = load_BE
    if counted_BT is not None and counted_BT.dtype != bool:
        whole_BE = jnp.einsum("BTkE,BT->BE", hits_BTkE, (counted_BT > 0).astype(dtype))
    share_BE = jnp.einsum("BTE,BT->BE", shares_BTE, counts_BT)
    length_B1 = jnp.maximum(jnp.sum(counts_BT, axis=1, keepdims=True), 1)
    log_Z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    entropy_BT = -jnp.sum(jax.scipy.special.xlogy(shares_BTE, shares_BTE), axis=-1)
    aux = {
        "balance_loss": experts.balance_loss * E / k * jnp.sum(load_BE * share_BE / length_B1),
        "router_z_loss": experts.router_z_loss * jnp.sum(counts_BT * log_Z_BT**2),
        "router_entropy": jax.lax.stop_gradient(jnp.sum(counts_BT * entropy_BT)),
        "expert_load": jnp.sum(whole_BE, axis=0),
    }
    return ids_BTk, experts.scaling * gates_BTk, aux


def _one_hot(ids_BTk: jax.Array, experts: ExpertsConfig, values_BTk: jax.Array) -> jax.Array:
    """[B, T, k, E]: the value where the id is that of the expert, else 0. Compared, not scattered: it fuses."""
    equal = ids_BTk[..., None] == jnp.arange(experts.num_experts)[None, None, None]
    return jnp.where(equal, values_BTk[..., None], 0)


def mixture(
    x_nD: jax.Array,
    ids_nk: jax.Array,
    gates_nk: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *biases_EF: jax.Array,
    clamp: float = 0.0,
    activation: str = "silu",
) -> jax.Array:
    """Σ_k gates · expert(x), [n, D], of one device's tokens, with all or a part of the hidden units.

    Tokens are copied once for each of their experts and sorted by them, so that each expert's are neighbours. The id E
    is no expert's, and adds nothing.
    """
    E, (n, k) = gate_EDF.shape[0], ids_nk.shape
    ids_m = ids_nk.reshape(-1)
    order_m, back_m, sizes_E = order_by_group(ids_m, E)
    x_mD = _spread(x_nD, order_m, back_m, k)
    gate_mF, up_mF = grouped_matmul(x_mD, (gate_EDF, up_EDF), sizes_E)
    if biases_EF:
        expert_m, wide = ids_m[order_m], gates_nk.dtype
        # In float32, as the gradient of a bias is summed: it is a sum over all tokens of its expert.
        gate_mF, up_mF = (
            (h.astype(wide) + bias.astype(wide)[expert_m]).astype(h.dtype)
            for h, bias in zip((gate_mF, up_mF), biases_EF, strict=True)
        )
    (y_mD,) = grouped_matmul(activate(gate_mF, up_mF, clamp, activation), (down_EFD,), sizes_E)
    y_nkD = _collect(y_mD, order_m, back_m).reshape(n, k, -1)
    return jnp.sum(gates_nk[..., None] * y_nkD.astype(gates_nk.dtype), axis=1).astype(x_nD.dtype)


def activate(gate: jax.Array, up: jax.Array, clamp: float, activation: str = "silu") -> jax.Array:
    """a(gate) up, or with a clamp gpt-oss's own: (up + 1) gate sigmoid(1.702 gate), both limited first (OpenAI 2025,
    arXiv:2508.10925, section 2.2)."""
    if not clamp:
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, clamp), jnp.clip(up, -clamp, clamp)
    return (up + 1) * gate * jax.nn.sigmoid(SLOPE * gate)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x_nD: jax.Array, order_m: jax.Array, back_m: jax.Array, k: int) -> jax.Array:
    """Each row k times, in this order, whose inverse is `back`; the gradient needs no scatter."""
    return x_nD[order_m // k]


def _spread_forward(x_nD: jax.Array, order_m: jax.Array, back_m: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    return x_nD[order_m // k], back_m


def _spread_backward(k: int, back_m: jax.Array, g_mD: jax.Array) -> tuple[jax.Array, None, None]:
    wide = jnp.promote_types(g_mD.dtype, jnp.float32)
    return jnp.sum(g_mD[back_m].reshape(-1, k, g_mD.shape[1]), axis=1, dtype=wide).astype(g_mD.dtype), None, None


_spread.defvjp(_spread_forward, _spread_backward)


@jax.custom_vjp
def _collect(y_mD: jax.Array, order_m: jax.Array, back_m: jax.Array) -> jax.Array:
    """Sorted rows, each back in its place."""
    return y_mD[back_m]


_collect.defvjp(
    lambda y_mD, order_m, back_m: (y_mD[back_m], order_m), lambda order_m, g_mD: (g_mD[order_m], None, None)
)
