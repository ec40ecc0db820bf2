"""The flags of train.py, and what they come to together.

Invariant: a flag is either used or refused. `--config` chooses the defaults of the `--model.*` flags, and `--resume`
takes every default from the run it continues.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro
from etils import epath

from parallax.config import PRESETS, OptimizerConfig, TrainConfig, TransformerConfig, config_from_dict, config_to_dict
from parallax.run_folder import read_settings
from parallax.storage import open_folder
from parallax.training.preference import PreferenceConfig
from scripts.common import layer_words
from scripts.common.command_line import Switch, flag_value, parse

DESCRIPTION = "Train a Transformer on text: on one device, under pmap, or over a mesh; the loss curve is the same."

LAYOUT = ("mode", "strategy", "mesh", "rules")
"""A command's, not a run's: a resumed run has those that it is given, or the defaults."""
FREE = (
    *(*LAYOUT, "accumulate", "steps", "attention", "layer_loop", "remat", "keep", "max_bad_steps"),
    *("log_interval", "eval_interval", "checkpoint_interval", "check_interval", "sample_prompts", "wandb"),
    *("learning_rate", "warmup_steps", "schedule_steps", "final_rate", "dtype"),
)
"""What a resumed run may change: nothing of the curve up to `max_bad_steps`; what changes it is named, and recorded in
summary.json."""

if TYPE_CHECKING:
    Preset = str
else:
    Preset = tyro.extras.literal_type_from_choices(tuple(PRESETS))


@dataclasses.dataclass(frozen=True)
class Flags:
    mode: Literal["single", "distributed", "overfit"] | None = None
    """single: one device. distributed: every device. overfit: learn one sentence by heart, as a test."""
    strategy: Literal["single", "pmap", "mesh"] | None = None
    """Where the step runs; by default single, and pmap in mode distributed."""
    mesh: str = ""
    """Sizes of the axes data, fsdp, expert, sequence and tensor, such as data=2,tensor=4; "all" stands for what is
    left, and data=2@dcn for two slices, or hosts, with a slow network between. auto chooses a shape and says why."""
    rules: str = "default"
    """What a mesh axis splits: a rule set (default, replicated) or a JSON file of rules."""
    dataset: str = "tiny_shakespeare"
    """tiny_shakespeare, or a path to a text file, a folder of text files, jsonl, json, csv or parquet (prepared into
    the cache first), ArrayRecord files of tokens, a store that prepare.py made, or a mixture such as
    web.store:0.7,code.store:0.3 or a JSON file of stages."""
    data_dir: str | None = None
    """Folder to look for the data set in; by default PARALLAX_DATA_DIR."""
    tokenizer: str | None = None
    """char (the default), byte, or bpe[:VOCABULARY], trained on the data set."""
    packing: Literal["concat", "best-fit", "whole", "none"] | None = None
    """How documents of a store fill rows. concat, the default: one after the other, in windows across their ends.
    best-fit: whole where they fit, apart from each other, and cut to fill gaps. whole, the default for conversations:
    the same with padding in the gaps. none: a document a row. Both cut off what is longer than --seq-len."""
    held_out: str | None = None
    """Evaluate on what this store, or mixture, holds out, and on nothing of --dataset."""
    eval_tokens: int | None = None
    """Tokens of an evaluation, at the most; by default all that are held out, and of a store so many as take about 2%
    of the time between two evaluations."""
    sample_prompts: str | None = None
    """A file of prompts, one a line, that are continued at each evaluation, greedily: into samples.jsonl, TensorBoard
    and the page of serve.py. Of a run on conversations a line is what the user says."""
    wandb: str | None = None
    """A project of Weights & Biases that gets the metrics too (pip install wandb). WANDB_MODE=offline
    keeps them on this machine. Without this flag nothing is sent anywhere."""
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
    """HOST:PORT of process 0, for a run of several processes; by default JAX_COORDINATOR_ADDRESS, or what a TPU,
    SLURM, Open MPI or Kubernetes says."""
    num_processes: int | None = None
    """How many processes run together; by default JAX_NUM_PROCESSES, or found like --coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0; by default JAX_PROCESS_ID, or found like --coordinator."""
    local_device_ids: tuple[int, ...] | None = None
    """Which of the machine's GPUs are this process's; under SLURM and Open MPI by default one for each task."""
    step_timeout: float | None = None
    """Seconds after which a step that does not end ends the process; by default 20 times the median, and at least 300.
    0 waits for ever."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Short for --model.dtype."""
    remat: Literal["none", "dots", "full"] | None = None
    """Short for --model.remat."""
    train: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig()
    learning: Annotated[OptimizerConfig, tyro.conf.arg(name="")] = OptimizerConfig()
    dpo: PreferenceConfig = PreferenceConfig()
    model: Annotated[TransformerConfig, tyro.conf.FlagConversionOff] = PRESETS["tiny"]


def read_flags(args: list[str] | None = None) -> Flags:
    """The command line, settled: strategy named, short flags folded into the model config.

    Raises ValueError if a flag is unknown, breaks a rule, contradicts another, or differs from the run that is resumed.
    """
    args = [re.sub(r"^--lora\.", "--model.lora.", arg) for arg in (sys.argv[1:] if args is None else args)]
    saved = _saved_flags(args)
    default = saved or Flags(model=_first_model(args))
    if saved is None and flag_value(args, "--mode") == "overfit":
        default = dataclasses.replace(default, train=TrainConfig(batch_size=8))  # one sentence, a row a device
    flags = _settle(parse(Flags, default=default, description=DESCRIPTION, args=args, registry=layer_words.REGISTRY))
    if saved is not None:
        _refuse_changes(saved, flags)
    return flags


def flags_to_dict(flags: Flags) -> dict[str, Any]:
    """Everything that decides a run, as JSON-ready values: what config.json holds."""
    data = ("dataset", "tokenizer", "packing", "held_out", "eval_tokens", "sample_prompts", "wandb")
    plain = ("mode", "strategy", "mesh", "rules", *data, "config", "init_from")
    return {
        "run": {name: getattr(flags, name) for name in plain},
        "train": config_to_dict(flags.train),
        "optimizer": config_to_dict(flags.learning),
        "dpo": config_to_dict(flags.dpo),
        "model": config_to_dict(flags.model),
    }


def flags_from_dict(values: dict[str, Any]) -> Flags:
    """The flags that `flags_to_dict` wrote; a run that did not record its schedule has that of its steps."""
    train = TrainConfig(**values["train"])
    return Flags(
        **values["run"],
        train=train,
        learning=OptimizerConfig(**values["optimizer"]).settled(train.steps),
        dpo=PreferenceConfig(**values.get("dpo", {})),
        model=config_from_dict(values["model"]),
    )


class Change(NamedTuple):
    """A flag that a command would change of a run."""

    part: str
    """As in config.json."""
    flag: str
    before: Any
    after: Any


def changes(saved: Flags, flags: Flags) -> Iterator[Change]:
    """All differences between the flags of a run and those of a command."""
    before, after = flags_to_dict(saved), flags_to_dict(flags)
    for part, values in before.items():
        for name, value in values.items():
            if after[part][name] != value:
                yield Change(part, flag_of(part, name), value, after[part][name])


def flag_of(part: str, name: str) -> str:
    """The flag of a value in config.json, by the part of it that holds the value."""
    prefix = f"{part}." if part in ("model", "dpo") else ""
    return f"--{prefix}{name.replace('_', '-')}"


def may_change(flag: str) -> bool:
    """Whether a resumed run takes another value of this flag of its config."""
    return flag.removeprefix("--").removeprefix("model.").replace("-", "_") in FREE


def model_name(flags: Flags) -> str:
    """What the model is called where a run is described: its preset, or the run that it came from."""
    return flags.config if flags.init_from is None else epath.Path(flags.init_from).name


def preset_of(args: Sequence[str]) -> TransformerConfig:
    """The model that --model.* flags change, by --config, before the command line can be parsed as a whole."""
    return PRESETS.get(flag_value(args, "--config"), PRESETS["tiny"])


def _first_model(args: list[str]) -> TransformerConfig:
    """The model that --model.* flags change: that of --init-from, or a preset."""
    source = flag_value(args, "--init-from")
    if not source:
        return preset_of(args)
    for flag in ("--config", "--tokenizer"):
        if flag_value(args, flag):
            raise ValueError(
                f"{flag} {flag_value(args, flag)} does not go with --init-from, which brings its own; leave one out"
            )
    model = config_from_dict(read_settings(open_folder(source))["model"])
    if model.lora.rank:
        raise ValueError(
            f"--init-from {source} holds adapters alone; merge them with convert.py export, and import what that makes"
        )
    return model


def _saved_flags(args: list[str]) -> Flags | None:
    if "--resume" not in args:
        return None
    folder = flag_value(args, "--output-dir")
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
    except (TypeError, KeyError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not the config of a run ({error}); choose another --output-dir") from None
    layout = {name: getattr(Flags, name) for name in LAYOUT}
    layout |= {"mode": "overfit"} if saved.mode == "overfit" else {}
    return dataclasses.replace(saved, **layout)


def _settle(flags: Flags) -> Flags:
    if flags.mode == "single" and (flags.mesh or flags.strategy not in (None, "single")):
        raise ValueError(
            f"--mode single does not go with --strategy {flags.strategy or 'mesh'}; try --mode distributed"
        )
    if (flags.step_timeout or 0) < 0:
        raise ValueError(f"step_timeout={flags.step_timeout:g} must not be negative; try --step-timeout 300")
    if flags.mode == "distributed" and flags.strategy == "single":
        raise ValueError("--mode distributed does not go with --strategy single; try --strategy pmap")
    if flags.mode == "overfit" and flags.held_out is not None:
        raise ValueError(
            f"--held-out {flags.held_out} does not go with --mode overfit, which holds nothing out; leave one out"
        )
    if flags.eval_tokens is not None and flags.eval_tokens < 1:
        raise ValueError(f"--eval-tokens {flags.eval_tokens} must be at least 1; leave it out")
    default = "mesh" if flags.mesh else "pmap" if flags.mode == "distributed" else "single"
    model = flags.model
    short = {name: getattr(flags, name) for name in ("dtype", "remat") if getattr(flags, name) is not None}
    if short:
        model = dataclasses.replace(model, **short)
    check_length(flags.train.seq_len, model)
    if model.lora.rank and flags.init_from is None and not flags.lower_only:
        raise ValueError(
            f"--lora.rank {model.lora.rank} learns beside a model that is there, and --init-from names none; "
            "try --init-from RUN"
        )
    learning = flags.learning.settled(flags.train.steps)
    strategy = flags.strategy or default
    return dataclasses.replace(flags, strategy=strategy, model=model, learning=learning, dtype=None, remat=None)


def check_length(seq_len: int, model: TransformerConfig) -> None:
    """Raises ValueError if sequences are longer than the model is made for."""
    if seq_len > model.max_seq_len:
        raise ValueError(
            f"seq_len={seq_len} must not exceed max_seq_len={model.max_seq_len}; "
            f"try --seq-len {model.max_seq_len}, or --model.max-seq-len {seq_len}"
        )


def _refuse_changes(saved: Flags, flags: Flags) -> None:
    """Raises ValueError naming the first value of the run that the command line would change."""
    for _, flag, before, after in changes(saved, flags):
        if not may_change(flag):
            raise ValueError(
                f"{flag} {after} differs from {before}, with which the run was started; "
                f"leave it out, or start a run in another --output-dir"
            )
