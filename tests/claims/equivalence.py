"""Trains the same run on every layout, and writes how far their losses and parameters are apart.

    python tests/claims/equivalence.py --output docs/evidence/equivalence.md

For each model, the first table compares the loss of every step with that of a single device, the second the sha256 of
the parameters under exact reduction. `--only nano-moe` runs that model alone, and leaves the rest of the page as it is.
All runs are real: train.py with simulated CPU devices, and launch.py for several processes on loopback. Finished runs
in --work-dir are not run again, so it can be stopped and started. Exit status 1: a bound is broken.
"""

import argparse
import dataclasses
import os
import platform
import re
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from rich.progress import track

from data.corpus import load_corpus
from tests.scripts.runs import Layout, Training, mesh, pmap, reached, rows, single

STEPS, ROWS, LENGTH = 100, 16, 32
FLAGS = [
    *("--dataset", "text.txt", "--steps", str(STEPS)),
    *("--batch-size", str(ROWS), "--seq-len", str(LENGTH), "--learning-rate", "3e-4", "--warmup-steps", "20"),
    *("--log-interval", "1", "--resume", "--print-param-hash"),
]
CHARACTERS = 40_000
"""Of Tiny Shakespeare: 100 steps read less, and the held-out tenth is evaluated in moments."""
EIGHT_HEADS = ("--model.num-heads", "8", "--model.num-kv-heads", "8", "--model.head-dim", "16")
"""NANO has 4 heads, which 8 devices cannot share; with 8 of half the width it has as many parameters."""
BOUND, REORDERED_BOUND = 1e-5, 2e-5
CHOICE = 1e-5
"""Relative difference of the loss of balance by which a token is seen to have chosen another expert: one of 512 changes
it by some 1e-4, rounding by 1e-7."""
OTHER_SEED = ("--seed", "1")
"""With which a layout is trained again where a token chose another expert."""

MEAN = [
    *(pmap(devices) for devices in (1, 2, 4, 8)),
    *(mesh(f"{axis}={size}") for axis in ("data", "fsdp") for size in (2, 4, 8)),
    *(mesh("tensor=2"), mesh("tensor=4"), mesh("tensor=8", 1, *EIGHT_HEADS)),
    *(mesh(f"sequence={size}") for size in (2, 4, 8)),
    *(mesh("data=4,fsdp=2"), mesh("data=2,fsdp=4"), mesh("data=2,tensor=4"), mesh("fsdp=2,tensor=4")),
    *(mesh("data=2,sequence=4"), mesh("fsdp=4,sequence=2"), mesh("sequence=2,tensor=4")),
    *(mesh("data=2,fsdp=2,tensor=2"), mesh("data=2,sequence=2,tensor=2"), mesh("fsdp=2,sequence=2,tensor=2")),
    *(pmap(4, 2), mesh("fsdp=4", 2), mesh("fsdp=2,tensor=2", 2), mesh("data=2,fsdp=2,tensor=2", 2)),
    *(pmap(4, 4), mesh("data=2,fsdp=2", 4), mesh("data=2,fsdp=4", 4), mesh("tensor=4", 4), mesh("sequence=4", 4)),
]
ACCUMULATED = ("--accumulate", "2")
EXACT = [
    *(single(), single("--accumulate", "4"), pmap(2), pmap(4), pmap(8), pmap(8, 1, *ACCUMULATED)),
    *(mesh("data=2"), mesh("data=8"), mesh("fsdp=2"), mesh("fsdp=4"), mesh("fsdp=8")),
    *(mesh("data=4,fsdp=2"), mesh("data=2,fsdp=4"), mesh("data=2,fsdp=4", 1, *ACCUMULATED)),
    *(pmap(4, 2), mesh("fsdp=4", 2), mesh("data=2,fsdp=4", 4)),
]
JOURNEY = [(single(), 33), (pmap(8), 67), (mesh("data=2,fsdp=2", 2), STEPS)]
"""A run that is killed twice, and goes on each time on another layout."""

EXPERTS_MEAN = [
    *(mesh(f"{axis}={size}") for axis in ("data", "fsdp", "tensor", "sequence", "expert") for size in (2, 4)),
    *(mesh("data=2,expert=4"), mesh("fsdp=2,expert=4"), mesh("data=2,fsdp=2,expert=2"), mesh("expert=4,tensor=2")),
    *(mesh("expert=2,sequence=2,tensor=2"), mesh("fsdp=2,expert=2,tensor=2")),
    *(mesh("data=2,expert=2", 2), mesh("fsdp=2,expert=2", 4)),
]
EXPERTS_EXACT = [
    *(single(), pmap(4), mesh("expert=2"), mesh("expert=4"), mesh("expert=8"), mesh("data=2,expert=4")),
    *(mesh("fsdp=2,expert=4"), mesh("data=2,fsdp=2,expert=2", 1, *ACCUMULATED), mesh("data=2,expert=4", 4)),
]
EXPERTS_JOURNEY = [(mesh("expert=4"), 33), (single(), 67), (mesh("fsdp=2,expert=2", 2), STEPS)]


LOCAL_AND_GLOBAL = [
    *("--config", "nano", "--model.norms", "both", "--model.qk-norm", "True", "--model.activation", "gelu_tanh"),
    *("--model.pattern", "sliding_window=8,rope_theta=1e3", "same"),
]
LAYERS_MEAN = [
    *(pmap(4), mesh("fsdp=4"), mesh("tensor=4"), mesh("sequence=4"), mesh("fsdp=2,sequence=2,tensor=2")),
    mesh("data=2,fsdp=2", 2),
]
LAYERS_EXACT = [single(), pmap(4), mesh("data=2,fsdp=2", 2)]
LAYERS_JOURNEY = [(mesh("fsdp=4"), 50), (single(), STEPS)]


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained, by flags of train.py, and the layouts that it is trained on."""

    name: str
    flags: list[str]
    about: str
    mean: list[Layout]
    exact: list[Layout]
    journey: list[tuple[Layout, int]]
    """A run that is killed at these steps, and goes on on the next layout."""
    dtypes: tuple[str, ...] = ("float32",)
    has_experts: bool = False


MODELS = [
    Model(
        name="nano",
        flags=["--config", "nano"],
        about="`(8 heads)` is NANO with 8 heads of 16, since 8 devices cannot share 4 heads, compared with a single "
        "device of that shape.",
        mean=MEAN,
        exact=EXACT,
        journey=JOURNEY,
        dtypes=("float32", "bfloat16"),
    ),
    Model(
        name="nano-moe",
        flags=["--config", "nano-moe"],
        about="Along `expert` tokens travel to the devices that hold their experts, and back. Which experts a "
        "token goes to is a choice: where two scores are equal but for their rounding, layouts may choose differently, "
        "and go on from there as other runs. The step of the first such choice is in the last column; the bound is for "
        f"the steps before it, of which there must be {STEPS // 2}, since a wrong program would differ at once. Such a "
        "layout is trained again with another seed, where the bound is for all steps.",
        has_experts=True,
        mean=EXPERTS_MEAN,
        exact=EXPERTS_EXACT,
        journey=EXPERTS_JOURNEY,
    ),
    Model(
        name="nano-local-global",
        flags=LOCAL_AND_GLOBAL,
        about="NANO with layers as in Gemma 3: every other one sees the last 8 tokens, with a rotary base of its own; "
        "queries and keys are normalised, norms stand before and after, the activation is GELU.",
        mean=LAYERS_MEAN,
        exact=LAYERS_EXACT,
        journey=LAYERS_JOURNEY,
    ),
]


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Where runs of a model are made and kept."""

    folder: Path
    model: Model

    def run(self, layout: Layout, *flags: str) -> tuple[list[dict], str]:
        """The metrics of every step, and the sha256 of the parameters that was printed last."""
        name = " ".join([self.model.name, str(layout), *flags]).replace(" ", "_").replace("/", "_")
        done = self.folder / f"{name}.out"
        if not (done.exists() and "params sha256" in done.read_text()):
            last_line = self._begin(name, layout, *flags).finish()
        else:
            last_line = done.read_text().splitlines()[-1].removeprefix("[0] ")
        steps = [row for row in rows(self.folder / name) if "loss" in row]
        if len(steps) != STEPS:
            raise RuntimeError(f"{name} has {len(steps)} losses instead of {STEPS}")
        return steps, last_line.removeprefix("params sha256 ")

    def _begin(self, name: str, layout: Layout, *flags: str) -> Training:
        return Training(self.folder, name, layout, [*self.model.flags, *FLAGS, *flags])

    def travel(self, *flags: str) -> str:
        """The sha256 after the model's journey."""
        name, last_line = f"{self.model.name}_journey", ""
        for layout, stop in self.model.journey:
            training = self._begin(name, layout, *flags, "--checkpoint-interval", "10")
            if stop < STEPS:
                if training.wait_for(reached(self.folder / name, stop)):
                    training.kill()
            else:
                last_line = training.finish()
        return last_line.removeprefix("params sha256 ")


def compare_losses(workshop: Workshop) -> tuple[list[str], bool]:
    """The first table, and whether every row keeps its bound."""
    model = workshop.model
    references: dict[tuple[str, ...], list[dict]] = {}
    table, holds = [], True

    def reference(shape: tuple[str, ...], *flags: str) -> list[dict]:
        if shape + flags not in references:
            references[shape + flags] = workshop.run(single(*shape), *flags)[0]
        return references[shape + flags]

    def differences(layout: Layout, dtype: str, name: str = "loss", seed: tuple[str, ...] = ()) -> list[float]:
        shape = EIGHT_HEADS if EIGHT_HEADS[0] in layout.flags else ()
        flags = ("--dtype", dtype, *seed)
        found, _ = workshop.run(layout, *flags)
        return [abs(a[name] / b[name] - 1) for a, b in zip(found, reference(shape, *flags), strict=True)]

    for layout in track(model.mean, f"losses of {model.name}"):
        reordered = "tensor" in str(layout) or "sequence" in str(layout)
        bound, of_losses = REORDERED_BOUND if reordered else BOUND, differences(layout, "float32")
        same, notes = STEPS, "".join(f" {max(differences(layout, dtype)):.1e} |" for dtype in model.dtypes[1:])
        if model.has_experts:
            of_loads = differences(layout, "float32", "balance_loss")
            same = next((step for step, each in enumerate(of_loads) if each > CHOICE), STEPS)
            again = 0.0 if same == STEPS else max(differences(layout, "float32", seed=OTHER_SEED))
            before = f"{max(of_losses[:same], default=0.0):.1e}; seed {OTHER_SEED[1]} {again:.1e}"
            notes += " |" if same == STEPS else f" step {same + 1}; before it {before} |"
            holds = holds and again < bound
        holds = holds and same >= STEPS // 2 and max(of_losses[:same]) < bound
        table.append(f"| {_described(layout)} | {max(of_losses):.1e} | {bound:.0e} |{notes}")
    return table, holds


def compare_parameters(workshop: Workshop) -> tuple[list[str], bool]:
    """The second table, and whether there is one sha256."""
    model = workshop.model
    hashes = {
        _described(layout): workshop.run(layout, "--reduction", "exact")[1]
        for layout in track(model.exact, f"parameters of {model.name}")
    }
    stations = ", killed; ".join(_described(layout) for layout, _ in model.journey)
    hashes[stations] = workshop.travel("--reduction", "exact")
    return [f"| {name} | `{digest}` |" for name, digest in hashes.items()], len(set(hashes.values())) == 1


def _described(layout: Layout) -> str:
    name = str(layout).replace(" ".join(word.removeprefix("--") for word in EIGHT_HEADS), "(8 heads)")
    return name.replace(" × ", " processes × ").replace(",", ", ").replace("  ", " ")


def head() -> str:
    """What docs/evidence/equivalence.md begins with."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    return f"""# One run, every layout

`python tests/claims/equivalence.py --output docs/evidence/equivalence.md` trained everything below and wrote this
page: models on the first {CHARACTERS:,} characters of Tiny Shakespeare, {STEPS} steps of {ROWS} × {LENGTH} tokens,
AdamW, learning rate 3e-4, warm-up 20. Devices are simulated on a CPU ({machine}); several processes are real ones that
communicate over loopback. Python {platform.python_version()}, {versions}. None of this has been run on a TPU.

Losses: the largest relative difference over {STEPS} steps between the loss on a layout and on a single device, in the
same dtype. Devices add up gradients in different orders, which float32 rounds differently: about 1e-7 a sum, grown by
{STEPS} steps of training. Where tensor or sequence axes are used, sums within a layer change their order too, so the
bound is twice as wide. bfloat16 rounds 65,536 times coarser and has no bound here.

Parameters: the sha256 of all after {STEPS} steps with `--reduction exact`. It cuts a batch into shards that do not
depend on the layout and adds their gradients in one order, so that every layout has the same bits; `--accumulate`
changes nothing. It costs memory for {ROWS} gradients on every device, and their transfer, and each device computes with
all parameters, experts included. On CPUs it also fixes the number of threads and does without fused multiply-add, which
rounds by the shape that a device holds. The hash is that of this jax version and this kind of processor: others round
differently, each in one way of its own.
"""


def part(model: Model, losses: list[str], parameters: list[str]) -> str:
    """What docs/evidence/equivalence.md says of a model."""
    dtypes = [model.dtypes[0], "bound", *model.dtypes[1:], *(["other choices from"] if model.has_experts else [])]
    return f"""## {model.name}

{model.about}

| layout | {" | ".join(dtypes)} |
| --- {"| --- " * len(dtypes)}|
{chr(10).join(losses)}

| layout | sha256 |
| --- | --- |
{chr(10).join(parameters)}
"""


def written(page: str) -> dict[str, str]:
    """The parts of a page by model."""
    return {text.split("\n", 1)[0]: f"## {text.strip()}\n" for text in re.split(r"^## ", page, flags=re.MULTILINE)[1:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, help="the page to write; by default it is printed")
    parser.add_argument("--work-dir", type=Path, help="where runs are kept; by default a folder that is removed")
    parser.add_argument("--only", choices=[model.name for model in MODELS], help="the one model to train")
    args = parser.parse_args()
    parts: dict[str, str] = written(args.output.read_text()) if args.output and args.output.exists() else {}
    close = equal = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.work_dir or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        text = load_corpus("tiny_shakespeare").documents[0]
        (folder / "text.txt").write_text(text[:CHARACTERS])
        for model in MODELS:
            if args.only in (None, model.name):
                workshop = Workshop(folder.absolute(), model)
                losses, within = compare_losses(workshop)
                parameters, same = compare_parameters(workshop)
                close, equal = close and within, equal and same
                parts[model.name] = part(model, losses, parameters)
    page = "\n".join([head(), *(parts[model.name] for model in MODELS if model.name in parts)])
    if args.output:
        args.output.write_text(page)
    else:
        print(page)
    if not close or not equal:
        print("error: " + ("parameters differ" if close else "a loss is beyond its bound"), file=sys.stderr)
    return 0 if close and equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
