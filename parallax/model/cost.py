"""What a step costs, as plain numbers: operations, bytes held, bytes sent.

Invariant: nothing is computed or allocated. It counts what this implementation executes and holds; `flops` counts the
arithmetic of the model.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax

from parallax.config import TransformerConfig
from parallax.layers.attend_blocks import LARGEST, blocks
from parallax.layers.attention import CHUNK, KERNELS
from parallax.layers.dispatch import LARGEST as ROUND
from parallax.layers.dispatch import ROUNDS, even_share
from parallax.model.flops import (
    attention_flops,
    block_weights,
    head_flops,
    hidden_units,
    learned_share,
    over_layers,
    step_flops,
    table_sizes,
    used_weights,
)
from parallax.model.transformer import parameters


def _rows(sizes: Mapping[str, int]) -> int:
    """How many devices have rows of their own."""
    return math.prod(sizes.get(axis, 1) for axis in ("data", "fsdp", "expert"))


@dataclasses.dataclass(frozen=True)
class Sent:
    """Bytes that a device sends in a step, by one kind of collective along one mesh axis."""

    kind: str
    axis: str
    wire_bytes: float
    count: int


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One training step of a config, as this implementation runs it on a device of a mesh.

    The byte counts of activations were fitted to what libtpu reports: a term says which arrays it stands for, its
    factor how many of them are there at once. `sizes` maps mesh axes (data, fsdp, expert, sequence, tensor) to devices;
    axes that are missing have one. What of an axis crosses slices is an axis of its own, data.dcn or fsdp.dcn.
    """

    config: TransformerConfig
    batch_size: int
    seq_len: int
    microbatches: int = 1
    tiled: bool = True
    """Whether arrays fill whole tiles, as in a TPU's memory. On GPUs they do not, and XLA has more of them at once."""

    @property
    def item(self) -> int:
        """Bytes of a number in the compute dtype."""
        return 2 if self.config.dtype == "bfloat16" else 4

    @property
    def _casts(self) -> bool:
        """Whether what parameters are held in is wider than the compute dtype."""
        return self.item < 4 and self.config.lora.base_dtype == "float32"

    @property
    def _gradient(self) -> int:
        """1 if matrices and tables have a gradient, 0 where they are frozen beside adapters."""
        return int(not self.config.lora.rank)

    @property
    def embed_dim(self) -> int:
        return self.config.embed_dim

    @property
    def num_experts(self) -> int:
        return self.config.experts.num_experts

    def model_flops(self) -> float:
        """Operations of the model in a step over all devices, as utilisation wants them: nothing recomputed."""
        return step_flops(self.config, self.batch_size, self.seq_len)

    def product_flops(self, sizes: Mapping[str, int]) -> float:
        """Operations of all matmuls outside kernels in one step, over all devices, recomputation included."""
        config, sizes = self.config, whole_axes(sizes)
        kernel = config.attention in KERNELS
        # Masked scores are computed all the same, but for those of blocks that are skipped.
        attention = 0.0 if kernel else attention_flops(config, self._computed_keys())
        block = 2 * used_weights(config) + attention
        # A block's last matmul is not needed again, but the experts' is, for the gradient of their weights.
        dense = sum(layer.feed_forward == "dense" for layer in config.layers) / config.num_layers
        whole = block - dense * 2 * config.embed_dim * config.mlp_dim
        again = {"none": 0.0, "dots": attention, "full": whole}[config.remat]
        if self._in_chunks(sizes.get("sequence", 1)):
            again += 1.5 * attention  # a chunk's scores twice more, its weighted values once
        elif config.attention == "blocks" and config.remat == "none":
            again += 0.5 * attention  # a block's scores once; recomputation has them anyway
        a_token = 3 * (config.num_layers * block + head_flops(config)) + config.num_layers * again
        if config.lora.rank:
            a_token -= 2 * config.num_layers * used_weights(config, frozen=True) + head_flops(config)
        return a_token * self.batch_size * self.seq_len

    def _computed_keys(self) -> float:
        """Keys of which a query's scores are computed, on average."""
        if self.config.attention != "blocks":
            return self.seq_len

        def computed(window: int) -> float:
            pairs = blocks(self.seq_len, window)
            return sum((q.stop - q.start) * (k.stop - k.start) for q, k in pairs) / self.seq_len

        return over_layers(self.config, computed)

    def kernel_flops(self) -> float:
        """Operations inside the attention kernel, by whole blocks of scores that are not all masked.

        Forward two matmuls, again where it is recomputed; backward five by cuDNN, which computes scores once (Dao 2023,
        arXiv:2307.08691), and by splash three for the queries and four for keys and values.
        """
        config = self.config
        if config.attention not in KERNELS:
            return 0.0
        largest, backward = {"splash": (512, 3.5), "cudnn": (128, 2.5)}[config.attention]
        block = min(self.seq_len, largest)
        whole = (self.seq_len + block) / 2
        keys = over_layers(config, lambda window: min(whole, window + block) if window else whole)
        runs = 1 + backward + (config.remat != "none")
        return runs * config.num_layers * attention_flops(config, keys) * self.batch_size * self.seq_len

    def expert_flops(self) -> float:
        """The part of `product_flops` that is inside experts, each of which has a part of the tokens."""
        config = self.config
        if not config.experts.num_experts:
            return 0.0
        leaves = jax.tree.leaves(parameters(config))
        weights = sum(each.size for each in leaves if "experts" in each.names and each.role == "hidden")
        used = weights * config.experts.experts_per_token / config.experts.num_experts
        return 2 * used * (2 + self._gradient + (config.remat == "full")) * self.batch_size * self.seq_len

    def elementwise_bytes(self, sizes: Mapping[str, int]) -> float:
        """What a device reads and writes in a step between its matmuls, in memory, where nothing else hides it.

        In each block two norms and two residual sums over D, a rotation of queries and keys, and the product of the
        hidden units with their gate, each fused into one pass; backward twice as much. Of the logits four passes in
        float32. Hidden units are those that a token has, of each of its experts.
        """
        config, e, tensor = self.config, self.item, whole_axes(sizes).get("tensor", 1)
        rows = math.prod(size for axis, size in sizes.items() if axis != "tensor")
        heads = (config.num_heads + config.num_kv_heads) * config.head_dim / tensor
        a_block = 10 * config.embed_dim + 2 * heads + 3 * hidden_units(config) / tensor
        passes = 3 + (config.remat != "none")
        numbers = e * passes * config.num_layers * a_block + 4 * 4 * config.table_rows / tensor
        return numbers * self.batch_size * self.seq_len / rows

    def temporary_bytes(self, sizes: Mapping[str, int], parameter_bytes: float, on_chip: float = 0.0) -> float:
        """What a device's main memory holds beside state and batch at the fullest moment of a step.

        Args:
          parameter_bytes: of a device's parameters in the layout of its memory; gradients take as much where learned.
          on_chip: bytes of its memory on the chip, which take as much of what is no gradient.
        """
        config, e, sizes = self.config, self.item, whole_axes(sizes)
        tensor, fsdp = sizes.get("tensor", 1), sizes.get("fsdp", 1)
        rows = _rows(sizes)
        tokens = self.batch_size * self.seq_len / (rows * sizes.get("sequence", 1) * self.microbatches)
        saved, working = self._block_bytes(tensor, sizes.get("sequence", 1))
        gradients = parameter_bytes * learned_share(config) * (1 + (self.microbatches > 1))
        if fsdp == 1:
            # XLA for GPUs casts a block's weights as it needs them, and adds gradients up in place.
            whole = parameter_bytes * self.tiled
            weights, gathered, sums = whole * self._casts / 2, 0.0, whole * learned_share(config) * (rows > 1)
        else:
            # Two blocks, the next is gathered while one is computed, and the gradients of one.
            gathered = (2 + self._gradient) * e * self._whole_block(sizes)
            weights, sums = self._cast_bytes(sizes), 0.0
        table, logits = self._head_bytes(tokens, sizes)
        # The logits are gone before the blocks are computed again; the gradient of the table is not.
        of_table = self._gradient * table
        fullest = max(
            tokens * working + self._expert_bytes(tokens, sizes) + gathered + of_table, table + of_table + logits
        )
        of_blocks = tokens * config.num_layers * saved + self._kept_by_experts(tokens, sizes) + weights + fullest
        # When the blocks are done the sum of gradients over rows comes beside its parts.
        loose = 0.0 if self.tiled else self._loose_bytes(tokens, sizes, parameter_bytes)
        return gradients + max(0.0, max(of_blocks, sums) - on_chip) + loose

    def _loose_bytes(self, tokens: float, sizes: Mapping[str, int], parameter_bytes: float) -> float:
        """What XLA's compiler for GPUs holds besides, which orders a step less by memory: within a tenth for 20 steps.

        The largest gradient once more, where the optimizer takes it. Where shards are gathered also two norms and two
        hidden units of the block beside which the next one is, and of a tied table the whole gradient in float32.
        """
        config, tensor = self.config, sizes.get("tensor", 1)
        leaves = jax.tree.leaves(parameters(config))
        largest = max(each.size for each in leaves if each.learned)
        loose = parameter_bytes * largest / sum(each.size for each in leaves)
        if sizes.get("fsdp", 1) > 1:
            loose += tokens * (8 * config.embed_dim + 2 * self.item * hidden_units(config, routed=0) / tensor)
            loose += self._gradient * config.tie_embeddings * 4 * config.table_rows * config.embed_dim / tensor
        return loose

    def evaluation_bytes(self, sizes: Mapping[str, int], parameter_bytes: float) -> float:
        """What a device's memory holds beside the state while a whole batch is evaluated, at most.

        There are no microbatches, gradients or arrays kept for them: one block at a time, then a chunk of the logits.
        `parameter_bytes` as in a step.
        """
        config, e, sizes = self.config, self.item, whole_axes(sizes)
        tensor, fsdp, sequence = (sizes.get(axis, 1) for axis in ("tensor", "fsdp", "sequence"))
        tokens = self.batch_size * self.seq_len / (_rows(sizes) * sequence)
        bare = dataclasses.replace(self, config=dataclasses.replace(config, remat="full"))
        _, working = bare._block_bytes(tensor, sequence)
        weights = parameter_bytes * self._casts / 2 if fsdp == 1 else 2 * e * self._whole_block(sizes)
        table, logits = self._head_bytes(tokens, sizes)
        working = tokens * working + self._expert_bytes(tokens, sizes)
        return weights + table + tokens * e * config.embed_dim + max(working, logits)

    def _whole_block(self, sizes: Mapping[str, int]) -> float:
        """Weights of a block that a device has while it computes it: all but those of other devices' experts."""
        experts = block_weights(self.config, of_experts=True)
        return (block_weights(self.config) - experts + experts / sizes.get("expert", 1)) / sizes.get("tensor", 1)

    def _expert_bytes(self, tokens: float, sizes: Mapping[str, int]) -> float:
        """At work in one round of the tokens of a group: rows as many as may arrive, and what experts make of them.

        Four arrays of each width, gradients among them, by ten steps of three models for TPUs and GPUs.
        """
        rows, rounds, width = self._expert_rows(tokens, sizes)
        return 4 * self.item * rows / rounds * (self.config.embed_dim + width)

    def _kept_by_experts(self, tokens: float, sizes: Mapping[str, int]) -> float:
        """For the backward pass where nothing is computed again: eight arrays of D and six of hidden units, by three
        steps of nano-moe. Of several rounds each is computed again."""
        rows, rounds, width = self._expert_rows(tokens, sizes)
        if self.config.remat != "none" or rounds > 1:
            return 0.0
        layers = sum(layer.feed_forward == "experts" for layer in self.config.layers)
        return layers * self.item * rows * (8 * self.config.embed_dim + 6 * width)

    def _expert_rows(self, tokens: float, sizes: Mapping[str, int]) -> tuple[float, float, float]:
        """Rows that may arrive at a device's experts, in how many rounds, and the hidden units that it has of one."""
        experts, devices = self.config.experts, sizes.get("expert", 1)
        if not experts.num_experts:
            return 0.0, 1.0, 0.0
        width = self.config.expert_dim / sizes.get("tensor", 1)
        rows = tokens * devices * min(experts.experts_per_token, experts.num_experts // devices)
        return rows, min(max(ROUNDS), max(1, rows * max(width, self.config.embed_dim) / ROUND)), width

    def even_share(self, sizes: Mapping[str, int]) -> float:
        """How full the buffers are in which tokens travel to experts, where all experts are used alike."""
        experts, devices = self.config.experts, sizes.get("expert", 1)
        return even_share(experts.num_experts, experts.experts_per_token, devices) if devices > 1 else 1.0

    def _cast_bytes(self, sizes: Mapping[str, int]) -> float:
        """A device's shard of all blocks in the compute dtype, its heads in tiles of 4 × 128, as often as it is held.

        Made once for all microbatches where the compiler gathers by itself, beside tensor or sequence; and kept for the
        backward pass where nothing is computed again.
        """
        config, tensor, fsdp = self.config, sizes.get("tensor", 1), sizes.get("fsdp", 1)
        copies = (self.microbatches > 1 and tensor * sizes.get("sequence", 1) > 1) + (config.remat == "none")
        if not self._casts:
            return 0.0
        rows, lanes = (4, 128) if self.tiled else (1, 1)
        tiled_heads = sum(max(rows, count / tensor) for count in (config.num_heads, config.num_kv_heads))
        own = config.experts.num_experts / sizes.get("expert", 1)
        a_row = 2 * tiled_heads * max(lanes, config.head_dim) + 3 * hidden_units(config, routed=own) / tensor
        return copies * self.item * config.num_layers * config.embed_dim / fsdp * a_row

    def _block_bytes(self, tensor: int, sequence: int) -> tuple[float, float]:
        """A token's bytes that one block keeps for the backward pass, and of what one block at a time recomputes."""
        config, e = self.config, self.item
        D, F = config.embed_dim, hidden_units(config, routed=0) / tensor
        heads = config.num_heads * config.head_dim / tensor
        keys = config.num_kv_heads * config.head_dim / tensor
        kernel = config.attention in KERNELS
        # Heads fill whole tiles of 128: at work along the tokens of a row, in the kernel's layout along themselves.
        # Kept arrays have the layout that wastes less.
        length = config.head_dim if kernel else self.seq_len / sequence
        lanes = 128 if self.tiled else 1
        at_work, kept_heads = (max(1, lanes / size) for size in (length, max(length, config.head_dim)))
        # Before and after the rotation, and what attention gives.
        projections = e * (3 * heads + 3 * keys)
        gathered = 2 * e * keys * (sequence if sequence > 1 else 0)
        scores = 0.0 if kernel else config.num_heads * self._keys_at_once(sequence) / tensor
        if config.remat == "none":
            # In float32, and in the compute dtype where that is another.
            norms = (4 if config.norms == "both" else 2) * D * (8 + (e if e < 4 else 0))
            kept = 0.0 if config.attention == "blocks" or self._in_chunks(sequence) else scores * (4 + e)
            return norms + e * D + kept_heads * projections + 6 * e * F + gathered + kept, 0.0
        gathered *= max(1, lanes / config.head_dim)  # it comes along heads
        if config.remat == "dots":
            # A norm in float32, and scores with their gradients, or hidden units with theirs beside the kernel.
            working = 4 * D + (6 * e * F if kernel else 3 * e * scores) + gathered
            return e * ((3 if self.tiled else 2) * D + kept_heads * (heads + 2 * keys) + 2 * F), working
        # Two norms in float32, all heads, two of the hidden units, scores and their gradients.
        return e * D, 8 * D + at_work * projections + 2 * e * (F + scores) + gathered / 4

    def _keys_at_once(self, sequence: int) -> float:
        """Keys of which scores are there at once, for each token of a device."""
        if self._in_chunks(sequence):
            return CHUNK * CHUNK * sequence / self.seq_len
        if self.config.attention == "blocks":
            return min(LARGEST, next(iter(blocks(self.seq_len, self.config.sliding_window)))[0].stop)
        return self.seq_len

    def _in_chunks(self, sequence: int) -> bool:
        """Whether a device has so many queries that their scores are taken in chunks."""
        return self.config.attention == "xla" and self.seq_len / sequence > 2 * CHUNK

    def _head_bytes(self, tokens: float, sizes: Mapping[str, int]) -> tuple[float, float]:
        """A whole table where it is gathered, and a chunk of float32 logits."""
        config, e = self.config, self.item
        rows = config.table_rows / sizes.get("tensor", 1)
        table = rows * config.embed_dim * e if sizes.get("fsdp", 1) > 1 else 0
        chunks = min(8, max(1, self.seq_len * config.vocab_size / 2**22))
        return table, tokens / chunks * rows * 4

    def sent(self, sizes: Mapping[str, int]) -> list[Sent]:
        """What a device sends in a step, by the algorithms that send the least, to and from shards of the rules."""
        config, e = self.config, self.item
        data, fsdp, sequence, tensor = (sizes.get(axis, 1) for axis in ("data", "fsdp", "sequence", "tensor"))
        slices, fsdp_slices = sizes.get("data.dcn", 1), sizes.get("fsdp.dcn", 1)
        expert, blocks = sizes.get("expert", 1), config.num_layers * self._whole_block(sizes)
        tables = sum(table_sizes(config)) / tensor
        shared = config.num_layers * (block_weights(config) - block_weights(config, of_experts=True)) / tensor + tables
        tokens = self.batch_size * self.seq_len / (_rows(sizes) * sequence * slices * fsdp_slices)
        vectors = tokens * config.embed_dim * e
        keys = 2 * tokens * sequence * config.num_kv_heads * config.head_dim * e / tensor
        again, layers, parts = config.remat == "full", config.num_layers, self.microbatches
        # There and back, gradients back and there, and there again where it is recomputed.
        travels = layers * (4 + again) if config.experts.num_experts else 0
        matrices = 7 * layers  # of each block its own, gathered and reduced by themselves
        learned = learned_share(config)
        gathered, scattered = parts * e * (2 * blocks + tables), parts * e * (blocks + tables) * learned
        gradients = 2 * 4 * (blocks + tables) * learned / fsdp_slices
        found = {
            ("all-reduce", "data"): (data, gradients / fsdp, matrices),
            ("all-gather", "fsdp"): (fsdp, gathered, 2 * parts * matrices),
            ("reduce-scatter", "fsdp"): (fsdp, scattered, parts * matrices),
            ("all-reduce", "expert"): (expert, 2 * 4 * shared * learned / fsdp / fsdp_slices, matrices),
            ("ragged-all-to-all", "expert"): (expert, travels * expert * vectors, parts * travels),
            ("all-reduce", "tensor"): (tensor, 2 * vectors * (layers * (4 + again) + 2), parts * layers * (4 + again)),
            ("all-gather", "sequence"): (sequence, layers * keys * (1 + again), 2 * parts * layers * (1 + again)),
            ("all-reduce", "sequence"): (sequence, layers * 2 * keys + 2 * 4 * (blocks + tables) * learned, matrices),
            # Between slices a device sends its shard alone.
            ("all-reduce", "data.dcn"): (slices, gradients / (data * fsdp * sequence), matrices),
            ("all-gather", "fsdp.dcn"): (fsdp_slices, gathered / fsdp, 2 * parts * matrices),
            ("reduce-scatter", "fsdp.dcn"): (fsdp_slices, scattered / fsdp, parts * matrices),
        }
        return [
            Sent(kind, axis, amount * (size - 1) / size, count)
            for (kind, axis), (size, amount, count) in found.items()
            if size > 1
        ]


def whole_axes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes of mesh axes, with their parts across slices."""
    found: dict[str, int] = {}
    for axis, size in sizes.items():
        name = axis.removesuffix(".dcn")
        found[name] = found.get(name, 1) * size
    return found
