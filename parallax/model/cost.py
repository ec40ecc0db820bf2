"""What a config costs, as plain numbers.

Invariant: counts the arithmetic of the model, not of an implementation: recomputation is not counted.
"""

from parallax.config import TransformerConfig


def forward_flops(config: TransformerConfig, seq_len: int) -> float:
    """Floating-point operations a token of one forward pass at this sequence length, in context of its own length.

    Two operations a weight of each matrix (the output table included, the input look-up not), and for each head
    2·2·K a visible key. Causal attention sees half of the keys on average (Kaplan et al. 2020, arXiv:2001.08361,
    table 1, counts all of them).
    """
    D, K, F = config.embed_dim, config.head_dim, config.mlp_dim
    matrices = 2 * D * K * (config.num_heads + config.num_kv_heads) + 3 * D * F
    keys = (seq_len + 1) / 2
    window = config.sliding_window
    if 0 < window < seq_len:  # the first `window` queries see 1 … window keys, the others see window
        keys = window - window * (window - 1) / (2 * seq_len)
    attention = 4 * config.num_heads * K * keys
    return config.num_layers * (2 * matrices + attention) + 2 * D * config.table_rows


def step_flops(config: TransformerConfig, batch_size: int, seq_len: int) -> float:
    """Floating-point operations of one training step: the backward pass costs twice the forward pass."""
    return 3 * forward_flops(config, seq_len) * batch_size * seq_len


def state_bytes(config: TransformerConfig) -> int:
    """Bytes of float32 parameters and AdamW moments."""
    return 3 * 4 * config.num_params()
