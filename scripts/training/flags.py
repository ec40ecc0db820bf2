"""The flags of train.py, and what they come to together.

Invariant: a flag is either used or refused. `--config` chooses the defaults of the `--model.*` flags, and `--resume`
takes every default from the run it continues.
"""

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from etils import epath

from parallax.config import PRESETS, OptimizerConfig, TrainConfig, TransformerConfig, config_from_dict, config_to_dict
from parallax.run_folder import read_settings
from parallax.storage import open_folder
from scripts.common.command_line import parse

DESCRIPTION = "Train a Transformer on text: on one device, under pmap, or over a mesh; the loss curve is the same."

LAYOUT = ("mode", "strategy", "mesh", "rules", "accumulate")
"""What a resumed run may change without changing what it computes, but that `accumulate` changes dropout's masks."""
FREE = (
    *(*LAYOUT, "steps", "attention", "layer_loop", "data_dir", "log_interval", "check_interval", "keep"),
    *("max_bad_steps", "profile", "print_param_hash", "lower_only"),
)

if TYPE_CHECKING:
    Preset = str
else:
    Preset = tyro.extras.literal_type_from_choices(tuple(PRESETS))
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclasses.dataclass(frozen=True)
class Flags:
    mode: Literal["single", "distributed", "overfit"] | None = None
    """single: one device. distributed: every device. overfit: learn one sentence by heart, as a test."""
    strategy: Literal["single", "pmap", "mesh"] | None = None
    """Where the step runs; by default single, and pmap in mode distributed."""
    mesh: str = ""
    """Sizes of the axes data, fsdp, sequence and tensor, such as data=2,tensor=4; "all" stands for what is left. auto
    chooses a shape and says why."""
    rules: str = "default"
    """What a mesh axis splits: a rule set (default, replicated) or a JSON file of rules."""
    dataset: str = "tiny_shakespeare"
    """tiny_shakespeare, or a path to a text file, a folder of text files, ArrayRecord files of tokens, a store that
    prepare.py made, or a mixture such as web.store:0.7,code.store:0.3 or a JSON file of stages."""
    data_dir: str | None = None
    """Folder to look for the data set in; by default PARALLAX_DATA_DIR."""
    tokenizer: str | None = None
    """char (the default), byte, or bpe[:VOCABULARY], trained on the data set."""
    eval_tokens: int | None = None
    """Tokens of an evaluation, at the most; by default all that are held out, and of a store so many as take about 2%
    of the time between two evaluations."""
    config: Preset = "tiny"
    """Preset of the model; --model.* flags change it."""
    init_from: str | None = None
    """Start from the parameters, the model and the tokenizer of this run, an imported one say, with a new optimizer."""
    output_dir: str | None = None
    """The run folder, local or on gs://; by default the next free runs/DATASET-CONFIG."""
    resume: Switch = False
    """Continue the run in --output-dir, or start it there."""
    profile: Switch = False
    """Write a trace of a few steps into the run folder."""
    lower_only: Switch = False
    """Compile the step, say what it takes, and stop."""
    print_param_hash: Switch = False
    """End with a line `params sha256 HEX`."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for a run of several processes; by default JAX_COORDINATOR_ADDRESS or TPU metadata."""
    num_processes: int | None = None
    """How many processes run together; by default JAX_NUM_PROCESSES or TPU metadata."""
    process_id: int | None = None
    """Which of them this is, from 0; by default JAX_PROCESS_ID or TPU metadata."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Short for --model.dtype."""
    remat: Literal["none", "dots", "full"] | None = None
    """Short for --model.remat."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    learning: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    model: Annotated[TransformerConfig, tyro.conf.FlagConversionOff] = PRESETS["tiny"]


def read_flags(args: list[str] | None = None) -> Flags:
    """The command line, settled: strategy named, short flags folded into the model config.

    Raises ValueError if a flag is unknown, breaks a rule, contradicts another, or differs from the run that is resumed.
    """
    args = list(sys.argv[1:] if args is None else args)
    saved = _saved_flags(args)
    default = saved or Flags(model=_first_model(args))
    if saved is None and flag_value(args, "--mode") == "overfit":
        default = dataclasses.replace(default, train=TrainConfig(batch_size=8))  # one sentence, a row a device
    flags = _settle(parse(Flags, default=default, description=DESCRIPTION, args=args))
    if saved is not None:
        _refuse_changes(saved, flags)
    return flags


def flags_to_dict(flags: Flags) -> dict[str, Any]:
    """Everything that decides a run, as JSON-ready values: what config.json holds."""
    plain = ("mode", "strategy", "mesh", "rules", "dataset", "tokenizer", "eval_tokens", "config", "init_from")
    return {
        "run": {name: getattr(flags, name) for name in plain},
        "train": config_to_dict(flags.train),
        "optimizer": config_to_dict(flags.learning),
        "model": config_to_dict(flags.model),
    }


def flags_from_dict(values: dict[str, Any]) -> Flags:
    """The flags that `flags_to_dict` wrote."""
    return Flags(
        **values["run"],
        train=TrainConfig(**values["train"]),
        learning=OptimizerConfig(**values["optimizer"]),
        model=config_from_dict(values["model"]),
    )


def model_name(flags: Flags) -> str:
    """What the model is called where a run is described: its preset, or the run that it came from."""
    return flags.config if flags.init_from is None else epath.Path(flags.init_from).name


def flag_value(args: list[str], flag: str) -> str:
    """The value of one flag, before the command line can be parsed as a whole."""
    for position, arg in enumerate(args):
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2]
        if arg == flag:
            return next(iter(args[position + 1 :]), "")
    return ""


def _first_model(args: list[str]) -> TransformerConfig:
    """The model that --model.* flags change: that of --init-from, or a preset."""
    source = flag_value(args, "--init-from") or flag_value(args, "--init_from")
    if not source:
        return PRESETS.get(flag_value(args, "--config"), PRESETS["tiny"])
    for flag in ("--config", "--tokenizer"):
        if flag_value(args, flag):
            raise ValueError(
                f"{flag} {flag_value(args, flag)} does not go with --init-from, which brings its own; leave one out"
            )
    return config_from_dict(read_settings(open_folder(source))["model"])


def _saved_flags(args: list[str]) -> Flags | None:
    if "--resume" not in args:
        return None
    folder = flag_value(args, "--output-dir") or flag_value(args, "--output_dir")
    if not folder:
        raise ValueError("--resume needs the run to continue; try --resume --output-dir runs/NAME")
    path = open_folder(folder) / "config.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
        if isinstance(values, dict) and "imported" in values:
            raise ValueError(
                f"{folder} was imported and has no training to resume; "
                f"try --init-from {folder} with another --output-dir"
            )
        saved = flags_from_dict(values)
    except (TypeError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not the config of a run ({error}); choose another --output-dir") from None
    # A layout is the command's, not the run's.
    layout = {"mode": None, "strategy": None, "mesh": "", "rules": "default"}
    return dataclasses.replace(saved, **(layout if saved.mode != "overfit" else layout | {"mode": "overfit"}))


def _settle(flags: Flags) -> Flags:
    if flags.mode == "single" and (flags.mesh or flags.strategy not in (None, "single")):
        raise ValueError(
            f"--mode single does not go with --strategy {flags.strategy or 'mesh'}; try --mode distributed"
        )
    if flags.mode == "distributed" and flags.strategy == "single":
        raise ValueError("--mode distributed does not go with --strategy single; try --strategy pmap")
    if flags.eval_tokens is not None and flags.eval_tokens < 1:
        raise ValueError(f"--eval-tokens {flags.eval_tokens} must be at least 1; leave it out")
    default = "mesh" if flags.mesh else "pmap" if flags.mode == "distributed" else "single"
    model = flags.model
    short = {name: getattr(flags, name) for name in ("dtype", "remat") if getattr(flags, name) is not None}
    if short:
        model = dataclasses.replace(model, **short)
    if flags.train.seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len={flags.train.seq_len} must not exceed max_seq_len={model.max_seq_len}; "
            f"try --seq-len {model.max_seq_len}"
        )
    return dataclasses.replace(flags, strategy=flags.strategy or default, model=model, dtype=None, remat=None)


def _refuse_changes(saved: Flags, flags: Flags) -> None:
    """Raises ValueError naming the first value of the run that the command line would change."""
    before, after = flags_to_dict(saved), flags_to_dict(flags)
    for part, values in before.items():
        for name, value in values.items():
            if name not in FREE and after[part][name] != value:
                prefix = "model." if part == "model" else ""
                flag = f"--{prefix}{name.replace('_', '-')}"
                raise ValueError(
                    f"{flag} {after[part][name]} differs from {value}, with which the run was started; "
                    f"leave it out, or start a run in another --output-dir"
                )
