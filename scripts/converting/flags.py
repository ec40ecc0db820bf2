"""The flags of convert.py's commands."""

import dataclasses
from typing import Annotated, Literal

import tyro

from scripts.common.command_line import Switch


@dataclasses.dataclass(frozen=True)
class ImportFlags:
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="HF_FOLDER")]
    """The Hugging Face folder: config.json, tokenizer.json, and model.safetensors or several with their index."""
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run folder to make."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What the parameters are stored in; by default as in the tensors."""
    mesh: str = ""
    """Read the parameters onto a mesh such as fsdp=8, of the visible devices; by default onto the first."""
    base: str = ""
    """HF_FOLDER holds adapters that PEFT saved, beside the model of this run."""


@dataclasses.dataclass(frozen=True)
class ExportFlags:
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """The run folder, local or on gs://."""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="HF_FOLDER")]
    """The Hugging Face folder to make."""
    step: int | None = None
    """Which checkpoint; by default the best."""
    adapter: Switch = False
    """The adapters of the run alone, as PEFT saves them; by default they are merged into their base."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the tensors are rounded to."""
    context: Literal["crop", "extend"] = "crop"
    """The longest text that the folder names. crop: what the model was trained at; extend: its max_seq_len."""
    max_file_gb: float = 5.0
    """Several files with an index where one would be larger than so many 10^9 bytes."""
    mesh: str = ""
    """Read the parameters onto a mesh such as fsdp=8, of the visible devices; by default onto the first."""
