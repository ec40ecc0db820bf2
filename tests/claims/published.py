"""Steps that others published, laid out as plan.py lays out ours.

Invariant: a row is laid out by what its source says of it, or left out with the reason. The work that is computed for
a row depends on its sizes alone, never on its time.
"""

import csv
import dataclasses
import math
import re
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from parallax.config import TransformerConfig
from parallax.layer_config import ExpertsConfig, LayerSpec
from parallax.model.cost import StepCost
from parallax.model.flops import step_flops
from parallelism.planning.hardware import GENERATIONS
from parallelism.planning.network import collective_seconds, place, waits
from parallelism.planning.step_time import Work
from parallelism.rules import MESH_AXES
from tests.claims.published_machines import Machine, machine_of
from tests.claims.step_time_fit import Run

ROWS = Path(__file__).with_name("published_steps.csv")
COLUMNS = {
    "id",
    "chip",
    "chips",
    "slices",
    "sharding",
    "seqs_per_chip",
    "seq",
    "compute_dtype",
    "weight_dtype",
    "remat",
}
SHOWN_MEMORY = 0.96
"""Share of a device's memory that its compiler gives to a program: 30.75 of 32 GiB of v4, 15.75 of 16 of v5e."""
AXES = {"tp": "tensor", "ep": "expert", "cp": "sequence", "context": "sequence", "fsdp_transpose": "fsdp"}
"""What others call the axes of a mesh."""
WINDOWED = ("maxtext", "tpu-recipes")
"""Sources whose programs keep activations in shards along tensor between layers: XLA splits the matmul beside a gather
into windows, and sends one while it multiplies another."""
BLOCK = ("q", "k", "v", "context", "out_proj", "mlpwi", "mlpwo")
"""The large arrays of a block behind its input, by MaxText's names; context is what attention gives."""
INPUT = "decoder_layer_input"
KEPT = {
    "full": set(),
    "full AC": set(),
    "minimal": set(BLOCK) - {"context", "mlpwo"},
    "minimal_flash": set(BLOCK) - {"mlpwo"},
    "qkv_proj_offloaded": {"q", "k", "v"},
}
"""What a policy keeps for the backward pass, which never needs mlpwo by itself."""


@dataclasses.dataclass(frozen=True)
class Published:
    """A published step, and what it takes by the formulas of the planner."""

    name: str
    family: str
    """The model, of which one source published several runs."""
    generation: str
    work: Work
    seconds: float | None
    """Of a step; None of a run that was refused for lack of memory."""
    memory_bytes: float
    """Of a device, by estimate."""
    device_memory: float
    peak_seconds: float
    """Of the model's operations at the peak of all devices; over the time of a step it is the utilisation."""
    ran: bool
    """Whether it had the memory."""

    @property
    def fits(self) -> bool:
        """By estimate."""
        return self.memory_bytes <= self.device_memory

    @property
    def run(self) -> Run | None:
        return None if self.seconds is None else Run(self.generation, self.family, self.work, self.seconds)


def read_rows(path: Path = ROWS) -> list[dict[str, str]]:
    """Raises ValueError if there is no such table."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); choose another table") from None
    missing = ", ".join(sorted(COLUMNS - set(rows[0] if rows else ())))
    if missing:
        raise ValueError(f"{path} lacks the columns {missing}; it must have those of {ROWS}")
    return rows


def lay_out(row: Mapping[str, str]) -> Published:
    """Raises ValueError with the reason why a row is left out."""
    if not row["compute_dtype"].startswith("bf16") or "int8" in row["compute_dtype"]:
        raise ValueError(f"computes in {row['compute_dtype'] or 'no stated dtype'}, and plans are for bfloat16")
    config, machine = config_of(row), machine_of(row)
    sizes = _sizes(row["sharding"], machine.devices)
    if not row["seqs_per_chip"] or not row["seq"]:
        raise ValueError("the batch is not stated")
    chips = int(row["chips"])
    batch_size, seq_len = round(float(row["seqs_per_chip"]) * chips), int(row["seq"])
    cost = StepCost(config=config, batch_size=batch_size, seq_len=seq_len)
    flops = step_flops(config, batch_size, seq_len)
    return Published(
        name=row["id"],
        family=row["model"],
        generation=machine.generation,
        work=_work(row, cost, sizes, machine),
        seconds=_seconds(row, config, batch_size * seq_len / chips) if row.get("ran") != "no" else None,
        memory_bytes=_memory(row, cost, sizes, machine.devices),
        device_memory=SHOWN_MEMORY * machine.memory,
        peak_seconds=flops / machine.devices / machine.flops,
        ran=row.get("ran") != "no",
    )


def config_of(row: Mapping[str, str]) -> TransformerConfig:
    """The model, whose feed-forward has three matrices.

    One of two matrices, as GPT's, has the operations and the parameters of ours with two thirds of its width. Which it
    is, and whether the output table is the input table, the source's count of parameters says. `windows` are those of a
    pattern of layers, 0 for none. With `dense_every` n the first of n layers has no experts.
    """
    names = {"num_layers": "layers", "embed_dim": "emb", "mlp_dim": "mlp", "num_heads": "q_heads"}
    names |= {"num_kv_heads": "kv_heads", "head_dim": "head_dim", "vocab_size": "vocab"}
    try:
        sizes: dict[str, Any] = {ours: int(row[theirs]) for ours, theirs in names.items()}
    except ValueError:
        raise ValueError("the sizes of the model are not those of one stack of like layers, or not stated") from None
    windows = [int(window) for window in row.get("windows", "").split()]
    pattern = tuple(LayerSpec(sliding_window=window) for window in windows)
    if every := _count(row, "dense_every"):
        pattern = (LayerSpec(feed_forward="dense"), *(LayerSpec(feed_forward="experts") for _ in range(every - 1)))
    experts = ExpertsConfig(
        num_experts=_count(row, "experts"),
        experts_per_token=_count(row, "active") or 1,
        mlp_dim=_count(row, "expert_mlp"),
        shared_mlp_dim=_count(row, "shared_mlp"),
    )
    attention = "splash" if row["chip"] in GENERATIONS else "cudnn"
    config = TransformerConfig(
        **sizes, pattern=pattern, experts=experts, attention=attention, tie_embeddings=False, dtype="bfloat16"
    )
    like = [config, dataclasses.replace(config, mlp_dim=2 * config.mlp_dim // 3)]
    like += [dataclasses.replace(each, tie_embeddings=True) for each in like]
    stated = float(row["params_B"]) * 1e9
    found = min(like, key=lambda each: abs(math.log(each.num_params() / stated)))
    if abs(found.num_params() / stated - 1) > 0.05:
        raise ValueError(
            f"has {row['params_B']} billion parameters, and its sizes give {config.num_params() / 1e9:.2f}"
        )
    return found


def _count(row: Mapping[str, str], name: str) -> int:
    """0 where nothing is stated."""
    return int(row.get(name) or 0)


def _sizes(sharding: str, devices: int) -> dict[str, int]:
    """Devices along each mesh axis, those of all slices together, in the order of a mesh."""
    sizes: dict[str, int] = {}
    for axis, size in re.findall(r"([a-z_]+)\s*=\s*(\d+)", sharding):
        name = AXES.get(axis, axis)
        if name not in MESH_AXES:
            raise ValueError(f"is split along {axis}, which is no mesh axis here")
        sizes[name] = sizes.get(name, 1) * int(size)
    if math.prod(sizes.values()) != devices or not sizes:
        raise ValueError(f"the layout {sharding!r} does not say how {devices} devices are used")
    return {axis: sizes[axis] for axis in MESH_AXES if axis in sizes}


def _seconds(row: Mapping[str, str], config: TransformerConfig, tokens: float) -> float:
    """Of a step, from whichever of its time, tokens a second and operations a second the source gives.

    Args:
      tokens: of a chip, in a step.
    """
    if row.get("step_s", "").strip():
        return float(row["step_s"])
    if row.get("tok_s_per_chip", "").strip():
        return tokens / float(row["tok_s_per_chip"])
    if not row.get("tflops_per_chip", "").strip():
        raise ValueError("no time is stated")
    return tokens * stated_flops(row, config) / (float(row["tflops_per_chip"]) * 1e12)


def stated_flops(row: Mapping[str, str], config: TransformerConfig) -> float:
    """Operations a token by the source's own rule.

    6 for each weight of a matmul that it goes through, and attention in full, or half of it.
    """
    heads = config.num_heads * config.head_dim
    table = config.vocab_size * config.embed_dim
    tables = (1 if config.tie_embeddings else 2) * config.table_rows * config.embed_dim
    weights = config.num_params(active=True) - tables + table
    half = "causal half" in row["flop_convention"]
    return 6 * weights + (6 if half else 12) * config.num_layers * heads * int(row["seq"])


def _kept(remat: str) -> tuple[Set[str], Set[str]]:
    """What a policy keeps of each block on the device, and what in the memory of the host."""
    if remat in KEPT:
        host = KEPT[remat] if remat.endswith("offloaded") else set()
        return {INPUT} | KEPT[remat] - host, host
    if "selective" in remat or "SAC" in remat:  # of torchtitan: attention, and each second matmul
        return {INPUT, "q", "v", "context"}, set()
    device: set[str] = set()
    host: set[str] = set()
    for part in re.split(r"[:;]", remat):
        names = set(re.findall(r"\w+", part)) & {INPUT, *BLOCK}
        if "remat" not in part:
            (host if "host" in part else device).update(names)
    if not device | host:
        raise ValueError(f"what remat={remat!r} keeps is not known")
    return device | ({INPUT} - host), host


def _hidden(config: TransformerConfig, capacity: float = 1.0) -> tuple[float, float]:
    """Hidden width of the feed-forwards that a token goes through in a layer, dense and of experts, on average."""
    layers, experts = config.layers, config.experts
    routed = sum(layer.feed_forward == "experts" for layer in layers) / len(layers)
    dense = (1 - routed) * config.mlp_dim + routed * experts.shared_mlp_dim
    return dense, routed * capacity * experts.experts_per_token * config.expert_dim


def _widths(config: TransformerConfig, capacity: float) -> dict[str, float]:
    """Numbers of a token in each array of a block."""
    heads, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        INPUT: config.embed_dim,
        "q": heads,
        "k": keys,
        "v": keys,
        "context": heads,
        "out_proj": config.embed_dim,
        "mlpwi": 2 * sum(_hidden(config, capacity)),
        "mlpwo": config.embed_dim,
    }


def _capacity(remat: str) -> float:
    """By how much more tokens than there are experts are made for, where there is a limit; else 1."""
    found = re.search(r"capacity ([\d.]+)", remat)
    return float(found[1]) if found else 1.0


def _work(row: Mapping[str, str], cost: StepCost, sizes: Mapping[str, int], machine: Machine) -> Work:
    config, devices = cost.config, machine.devices
    tokens = cost.batch_size * cost.seq_len / devices
    device, host = _kept(row["remat"])
    capacity = _capacity(row["remat"])
    widths, (dense, routed) = _widths(config, capacity), _hidden(config, capacity)
    weights = {name: config.embed_dim * widths[name] for name in ("q", "k", "v")}
    weights |= {"out_proj": widths["context"] * config.embed_dim, "mlpwi": 2 * config.embed_dim * dense}
    again = sum(size for name, size in weights.items() if name not in device | host)
    # Those inside experts apart. A limited capacity adds room to them, and matmuls that put tokens there and back.
    inside = 6 * config.embed_dim * routed * (3 + 2 / 3 * ("mlpwi" not in device | host)) * config.num_layers
    counted = 18 * config.embed_dim * _hidden(config)[1] * config.num_layers
    if capacity > 1:
        slots = capacity * cost.seq_len * config.experts.experts_per_token
        inside += 3 * 4 * slots * config.embed_dim * config.num_layers
    flops = cost.product_flops(sizes) / devices + (2 * config.num_layers * again - counted) * tokens
    attended = cost if "context" in device | host else _with_remat(cost, "full")
    in_layer, beside = _collectives(row, _with_remat(cost, "full" if again else "none"), sizes, machine)
    offloaded = cost.item * tokens * config.num_layers * sum(widths[name] for name in host)
    # All arrays of a block are in shards along tensor, as if it cut the sequence.
    apart = {**sizes, "tensor": 1, "sequence": sizes.get("sequence", 1) * sizes.get("tensor", 1)}
    return Work(
        matmuls=flops / machine.flops,
        kernels=attended.kernel_flops() / devices / machine.flops,
        elementwise=_with_remat(cost, "full").elementwise_bytes(apart) / machine.memory_rate,
        update=2 * _state_bytes(row, cost, sizes) / machine.memory_rate,
        in_layer=in_layer,
        beside=beside,
        embed_dim=config.embed_dim,
        host=offloaded / machine.host_rate,
        experts=inside * tokens / machine.flops,
        num_experts=config.experts.num_experts,
    )


def _collectives(
    row: Mapping[str, str], cost: StepCost, sizes: Mapping[str, int], machine: Machine
) -> tuple[float, float]:
    """Seconds of those that a layer waits for, and of those beside it.

    Along expert tokens travel to their experts and back, forward, backward and where it is computed again, and the
    other parameters are gathered as along fsdp, experts only from the devices that hold the same.
    """
    config, paths = cost.config, place(sizes, machine.dims)
    windowed = row["source"].startswith(WINDOWED) or "async" in row["sharding"]
    parts = sizes.get("expert", 1)
    alike = {axis: size for axis, size in sizes.items() if axis != "expert"}
    alike["fsdp"] = alike.get("fsdp", 1) * parts
    weights = config.num_params()
    apart = weights - config.num_params(active=True) if parts > 1 else 0
    in_layer = beside = 0.0
    for each in waits(cost.sent(alike), {**paths, "fsdp": (*paths.get("fsdp", ()), *paths.get("expert", ()))}):
        if each.in_layer and not (windowed and "tensor" in each.axes):
            in_layer += each.seconds
        else:
            beside += each.seconds * (1 - apart / weights * (1 - 1 / parts))
    if parts > 1:
        tokens = cost.batch_size * cost.seq_len / machine.devices
        once = tokens * config.experts.experts_per_token * config.embed_dim * cost.item * (1 - 1 / parts)
        times = config.num_layers * (4 + 2 * (config.remat == "full"))
        in_layer += collective_seconds("all-to-all", times * once, paths["expert"], times)
    return in_layer, beside


def _with_remat(cost: StepCost, remat: str) -> StepCost:
    return dataclasses.replace(cost, config=dataclasses.replace(cost.config, remat=remat))


def _shards(sizes: Mapping[str, int]) -> int:
    """In how many parts parameters are."""
    return sizes.get("fsdp", 1) * sizes.get("tensor", 1) * sizes.get("expert", 1)


def _state_bytes(row: Mapping[str, str], cost: StepCost, sizes: Mapping[str, int]) -> float:
    """Of a device: parameters and two moments, in float32 or all of them in bfloat16."""
    item = 2 if row["weight_dtype"] == "bf16" else 4
    return 3 * item * cost.config.num_params() / _shards(sizes)


def _memory(row: Mapping[str, str], cost: StepCost, sizes: Mapping[str, int], devices: int) -> float:
    """What a device holds at the fullest moment of such a step.

    State, gradients, what is kept of all blocks, and the larger of one block at work and the logits in float32.
    A block at work has two norms in float32, its heads and hidden units with their gradients, and three of its largest
    matrices gathered or reduced at once.
    """
    config, item = cost.config, cost.item
    tokens = cost.batch_size * cost.seq_len / devices
    widths, (device, _) = _widths(config, _capacity(row["remat"])), _kept(row["remat"])
    kept = item * config.num_layers * sum(widths[name] for name in device)
    scores = 10 * config.num_heads * cost.seq_len if row.get("attention") == "dot_product" else 0
    heads = 2 * (widths["q"] + widths["k"] + widths["v"])
    at_work = 8 * config.embed_dim + item * (heads + 2 * widths["mlpwi"]) + scores
    hidden = max(config.mlp_dim, config.experts.num_experts * config.expert_dim / sizes.get("expert", 1))
    matrix = item * config.embed_dim * hidden / sizes.get("tensor", 1)
    gathered = 3 * matrix if sizes.get("fsdp", 1) > 1 else 0.0
    tiling = re.search(r"vocab tiling (\d+)", row["remat"])
    logits = 4 * config.vocab_size / (int(tiling[1]) if tiling else 1)
    state = _state_bytes(row, cost, sizes)
    return state * 4 / 3 + tokens * kept + max(tokens * at_work + gathered, tokens * logits)
