"""A MaxText config as a model, a batch and a layout: `plan.py --maxtext FILE.yml [key=value …]`.

Invariant: a field that changes what is computed is taken over or refused; one that has no counterpart is named.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from parallax.config import TransformerConfig
from parallax.layer_config import ExpertsConfig
from parallelism.mesh_shape import CROSSING
from parallelism.rules import ACROSS

Values = dict[str, Any]

DEFAULTS: Values = {
    "base_emb_dim": 2048, "base_num_query_heads": 16, "base_num_kv_heads": 16, "base_mlp_dim": 7168,
    "base_num_decoder_layers": 16, "head_dim": 128, "vocab_size": 32_000, "per_device_batch_size": 12.0,
    "max_target_length": 2048, "rope_max_timescale": 10_000, "normalization_layer_epsilon": 1e-5,
    "dtype": "bfloat16", "weight_dtype": "float32", "quantization": "", "remat_policy": "full", "dropout_rate": 0.0,
    "mlp_activations": ["silu", "linear"], "decoder_block": "llama2", "logits_via_embedding": False,
    "use_qk_norm": False, "attention_bias": False, "attention_type": "global", "sliding_window_size": 0,
    "gradient_accumulation_steps": 1, "global_parameter_scale": 1, "mtp_num_layers": 0,
    "num_experts": 1, "num_experts_per_tok": 1, "base_moe_mlp_dim": 0, "capacity_factor": -1.0,
    "load_balance_loss_weight": 0.0,
}  # fmt: skip
"""All fields that are read, beside parallelisms and other files, with what counts where neither the file nor those that
it names give one."""
SIZES = {
    "embed_dim": "base_emb_dim",
    "num_layers": "base_num_decoder_layers",
    "num_heads": "base_num_query_heads",
    "num_kv_heads": "base_num_kv_heads",
    "mlp_dim": "base_mlp_dim",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
}
BLOCKS = ("default", "llama2", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Values of decoder_block that are the block of this model: RMSNorm, rotary embeddings, SwiGLU, experts."""
AXES = {
    "data": "data", "fsdp": "fsdp", "fsdp_transpose": "fsdp", "sequence": "sequence", "context": "sequence",
    "tensor": "tensor", "tensor_transpose": "tensor", "tensor_sequence": "tensor", "expert": "expert",
}  # fmt: skip
"""Its parallelisms that are mesh axes here; any other must be 1."""
LEFT = {"ici_": {"fsdp": -1}, "dcn_": {"data": -1}}
"""What base.yml gives what is left to, of the devices of a slice and of the slices."""
REMAT: dict[str, Literal["none", "dots", "full"]] = {
    "full": "full",
    "none": "none",
    "minimal": "dots",
    "minimal_flash": "dots",
    "minimal_with_context": "dots",
}


@dataclasses.dataclass(frozen=True)
class MaxText:
    """What a config asks for, in the words of this project."""

    model: TransformerConfig
    per_device: float
    """Sequences of a device."""
    seq_len: int
    dtype: Literal["bfloat16", "float32"]
    remat: Literal["none", "dots", "full"]
    accumulate: int
    parallelisms: Mapping[str, int]
    """Mesh axes to devices of a slice; -1 stands for those that are left."""
    across: Mapping[str, int]
    """Mesh axes to slices, likewise; on one slice they are devices of it."""
    notes: Sequence[str]
    """What has no counterpart, for a person to read."""

    def layout(self, devices: int, slices: int = 1) -> dict[str, int]:
        """Its own layout on so many devices in all; raises ValueError if it is for another number of them."""
        across = _filled(self.across, slices)
        sizes = _filled(self.parallelisms, devices // math.prod(across.values()))
        for axis, size in across.items():
            if size == 1:
                continue
            if slices == 1:
                sizes[axis] = sizes.get(axis, 1) * size
            elif axis in CROSSING:
                sizes[axis + ACROSS] = size
            else:
                raise ValueError(f"{axis} crosses slices in the MaxText config; only {', '.join(CROSSING)} can here")
        if slices > 1 and math.prod(across.values()) != slices:
            raise ValueError(
                f"the dcn parallelisms {_shown(self.across)} of the MaxText config are for "
                f"{math.prod(across.values())} slices and the topology has {slices}; try dcn_data_parallelism=-1"
            )
        if math.prod(sizes.values()) != devices:
            raise ValueError(
                f"the parallelisms {_shown(self.parallelisms)} of the MaxText config are for "
                f"{math.prod(sizes.values())} devices and the topology has {devices}; set one of them to -1"
            )
        return sizes


def read_maxtext(path: str, overrides: Sequence[str] = ()) -> MaxText:
    """The config of a file, of those that it names beside it, and of key=value words.

    As in MaxText words count most, then the file of model_name, then the file, then its base_config.

    Raises ValueError if a file is missing or no mapping, a word is no key=value, a size is none, or the model computes
    what this one cannot.
    """
    values, usual = _merged(Path(path), overrides)
    return MaxText(
        model=_model(values),
        per_device=_number(values, "per_device_batch_size"),
        seq_len=_whole(values, "max_target_length"),
        dtype=_dtype(values),
        remat=REMAT.get(str(values["remat_policy"]), "full"),
        accumulate=_whole(values, "gradient_accumulation_steps"),
        parallelisms=_parallelisms(values, "ici_"),
        across=_parallelisms(values, "dcn_"),
        notes=_notes(values, usual),
    )


def _merged(path: Path, overrides: Sequence[str]) -> tuple[Values, Values]:
    """All fields, and those as they are in base.yml if it is here."""
    own, words = _load(path), dict(map(_word, overrides))
    named = (own | words).get("base_config")
    base = path.parent / str(named) if named else path.with_name("base.yml")
    usual = _load(base) if base.is_file() and (named or base.name == path.name) else {}
    values = usual | own | words
    name = values.get("model_name") or "default"
    if name != "default":
        places = [folder / f"{name}.yml" for folder in (path.parent / "models", path.parent)]
        found = next((place for place in places if place.is_file() and place.resolve() != path.resolve()), None)
        if found is None:
            raise ValueError(
                f"model_name={name} names a file that is not beside {path}; put {name}.yml there, or give "
                f"model_name=default, and the sizes are those of {path.name}"
            )
        values |= _load(found) | words
    return DEFAULTS | values, usual


def _word(word: str) -> tuple[str, Any]:
    key, found, text = word.partition("=")
    if not found or not key.isidentifier():
        raise ValueError(f"{word!r} behind --maxtext must be a key=value; try max_target_length=2048")
    try:
        return key, yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{word!r} behind --maxtext is no YAML ({' '.join(str(error).split())}); mend it") from None


def _load(path: Path) -> Values:
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--maxtext {path} cannot be read ({error}); choose a .yml file") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"--maxtext {path} is no YAML ({' '.join(str(error).split())}); mend it") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"--maxtext {path} must hold fields such as base_emb_dim: 4096; choose another file")
    return values


def _model(values: Values) -> TransformerConfig:
    _refuse(values)
    sizes: dict[str, Any] = {ours: _whole(values, theirs) for ours, theirs in SIZES.items()}
    return TransformerConfig(
        **sizes,
        max_seq_len=max(8192, _whole(values, "max_target_length")),
        rope_theta=_number(values, "rope_max_timescale"),
        norm_eps=_number(values, "normalization_layer_epsilon"),
        dropout_rate=_number(values, "dropout_rate"),
        tie_embeddings=bool(values["logits_via_embedding"]),
        qk_norm=bool(values["use_qk_norm"]),
        attention_bias=bool(values["attention_bias"]),
        sliding_window=_whole(values, "sliding_window_size") if values["attention_type"] == "local_sliding" else 0,
        experts=_experts(values),
    )


def _experts(values: Values) -> ExpertsConfig:
    """1 of them is a dense feed-forward there."""
    if values["num_experts"] == 1:
        return ExpertsConfig()
    return ExpertsConfig(
        num_experts=_whole(values, "num_experts"),
        experts_per_token=_whole(values, "num_experts_per_tok"),
        mlp_dim=max(0, _whole(values, "base_moe_mlp_dim")),
        balance_loss=_number(values, "load_balance_loss_weight"),
    )


def _refuse(values: Values) -> None:
    """What this model does not compute."""
    if values["decoder_block"] not in BLOCKS:
        raise ValueError(
            f"decoder_block={values['decoder_block']} has no counterpart here; those of {', '.join(BLOCKS)} have"
        )
    if values["mlp_activations"] != ["silu", "linear"]:
        raise ValueError(f"mlp_activations={values['mlp_activations']} has no counterpart; try ['silu','linear']")
    if values["quantization"]:
        raise ValueError(f"quantization={values['quantization']} has no counterpart; try quantization=''")
    if values["attention_type"] not in ("global", "local_sliding"):
        raise ValueError(f"attention_type={values['attention_type']} has no counterpart; try global or local_sliding")
    if values["mtp_num_layers"] != 0:
        raise ValueError(f"mtp_num_layers={values['mtp_num_layers']} has no counterpart; try mtp_num_layers=0")
    if values["global_parameter_scale"] != 1:
        scale = values["global_parameter_scale"]
        raise ValueError(f"global_parameter_scale={scale} is not read; give the base_ sizes as they come out")


def _parallelisms(values: Values, kind: Literal["ici_", "dcn_"]) -> dict[str, int]:
    """Those within slices or those across them."""
    sizes: dict[str, int] = {}
    keys = [key for key in values if key.startswith(kind) and key.endswith("_parallelism")]
    for key in keys:
        name, size = key.removeprefix(kind).removesuffix("_parallelism"), _whole(values, key)
        if size < 1 and size != -1:
            raise ValueError(f"{key}={size} in the MaxText config must be at least 1, or -1 for what is left; try -1")
        if name not in AXES:
            if size != 1:
                raise ValueError(f"{key}={size} has no counterpart here; try {key}=1")
            continue
        axis = AXES[name]
        before = sizes.get(axis, 1)
        sizes[axis] = -1 if -1 in (before, size) else before * size
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"the {kind}parallelisms {_shown(sizes)} of the MaxText config take all twice; leave one -1")
    return sizes if keys else dict(LEFT[kind])


def _filled(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """With what is left of so many devices or slices in place of -1."""
    left = count // math.prod(size for size in sizes.values() if size > 0)
    return {axis: max(1, left) if size < 0 else size for axis, size in sizes.items()}


def _notes(values: Values, usual: Values) -> list[str]:
    notes = []
    policy = str(values["remat_policy"])
    if policy not in REMAT:
        notes.append(f"remat_policy={policy} has no counterpart; full comes next to it")
    if str(values["weight_dtype"]) != "float32":
        notes.append(f"weight_dtype={values['weight_dtype']} has no counterpart; parameters are float32 here")
    if _number(values, "capacity_factor") > 0:
        notes.append(f"capacity_factor={values['capacity_factor']} has no counterpart; no token is dropped here")
    read = {*DEFAULTS, "base_config", "model_name"}
    changed = [key for key in values if key not in usual or values[key] != usual[key]]
    others = [key for key in changed if key not in read and not key.endswith("_parallelism")]
    if others:
        more = f" and {len(others) - 12} more" if len(others) > 12 else ""
        notes.append(f"fields that change no plan, or have no counterpart: {', '.join(others[:12])}{more}")
    return notes


def _dtype(values: Values) -> Literal["bfloat16", "float32"]:
    name = values["dtype"]
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={name} in the MaxText config has no counterpart here; try bfloat16")
    return name


def _whole(values: Values, name: str) -> int:
    value = values[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} in the MaxText config must be a whole number; mend it")
    return value


def _number(values: Values, name: str) -> float:
    value = values[name]
    if isinstance(value, str):  # YAML reads 1e-5 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name}={value!r} in the MaxText config must be a number; mend it")
    return float(value)


def _shown(sizes: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in sizes.items())
