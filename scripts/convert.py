"""Run folders of Hugging Face folders, and back: `python scripts/convert.py --help`.

Invariant: a folder that exists is refused, and one that appears is whole.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs, installed or not

from scripts.common.command_line import dispatch, parse, tell
from scripts.converting.flags import ExportFlags, ImportFlags

HELP = """usage: convert.py COMMAND ...

Convert between run folders and Hugging Face folders of Llama, SmolLM, Mistral, Mixtral, Qwen 2, 3 and 3 MoE, Gemma 2
and 3 (text), OLMo 2, OLMoE, Phi 3 and 4 and gpt-oss models.

commands:
  import HF_FOLDER RUN   config.json, tokenizer.json and safetensors into a run folder, for
                         generate.py, evaluate.py and train.py --init-from RUN
  export RUN HF_FOLDER   a run, trained here or imported, into such a folder

convert.py COMMAND --help says more."""


def main() -> int:
    """Exit status: 0 done; 2 bad input."""
    return dispatch("convert.py", HELP, {"import": _import, "export": _export})


def _import(args: Sequence[str]) -> int:
    flags = parse(ImportFlags, description="Make a run folder of a Hugging Face folder.", args=args)
    # Late, since these load JAX: help answers at once.
    from parallax.interop.folders import import_adapters, import_model
    from scripts.common.jax_process import expect_no_gpu
    from scripts.common.placement import place_params

    expect_no_gpu()
    if flags.base:
        tell(import_adapters(Path(flags.source), flags.base, flags.run))
        return 0
    tell(import_model(Path(flags.source), flags.run, place_params(flags.mesh), flags.param_dtype))
    return 0


def _export(args: Sequence[str]) -> int:
    flags = parse(ExportFlags, description="Make a Hugging Face folder of a run.", args=args)
    if not flags.max_file_gb > 0:
        raise ValueError(f"--max-file-gb {flags.max_file_gb} must be positive; try 5")
    from parallax.interop.folders import export_adapters, export_model
    from scripts.common.jax_process import expect_no_gpu
    from scripts.common.placement import place_params

    expect_no_gpu()
    if flags.adapter:
        tell(export_adapters(flags.run, flags.target, step=flags.step))
        return 0
    size, place = int(flags.max_file_gb * 10**9), place_params(flags.mesh)
    options = {"step": flags.step, "dtype": flags.dtype, "context": flags.context}
    tell(export_model(flags.run, flags.target, **options, max_file_bytes=size, place=place))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
