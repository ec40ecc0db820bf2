"""The flags of evaluate.py."""

import dataclasses
from typing import Literal

from scripts.common.command_line import Switch

ONLY_DATASET = "data_dir", "held_out", "stride"
ONLY_TASKS = "task_dir", "num_fewshot", "limit", "apply_chat_template"
DESCRIPTION = (
    "Perplexity and bits per byte of a text under a trained or imported model, or its scores in benchmarks of lm_eval. "
    "Over each document of a text a window slides; a token is scored in one window alone. The first token has nothing "
    "before it: it is not scored and its bytes are not counted, unless the tokenizer begins a text with an id of its "
    "own, such as <s>. A document's end is scored where the tokenizer has an id for it."
)


@dataclasses.dataclass(frozen=True)
class Flags:
    checkpoint: str
    """The run folder that train.py or convert.py wrote, local or on gs://."""
    dataset: str = ""
    """tiny_shakespeare, or a path to a text file, a folder of text files, or a store of the run's tokenizer. Of a
    mixture each store is scored, and all of their documents together, whatever the weights."""
    data_dir: str | None = None
    """Folder to look for the data set in; by default PARALLAX_DATA_DIR."""
    held_out: Switch = False
    """Score only what train.py holds out of this data set: of a single text its last tenth, of documents the last tenth
    of them, of a store what it holds out. Text of more than 64 MiB is trained on as a store: give that."""
    tasks: str = ""
    """Instead of a data set: benchmarks of lm_eval by name or pattern, such as hellaswag,arc_*. It downloads what it
    does not find, and needs pip install "parallax-lm[eval]". The checkpoint may then be a Hugging Face folder too."""
    task_dir: str | None = None
    """For --tasks: a folder of tasks of your own, in the YAML of lm_eval."""
    num_fewshot: int | None = None
    """For --tasks: examples before each question; by default as each task says."""
    limit: int | None = None
    """For --tasks: only so many questions of each."""
    apply_chat_template: Switch = False
    """For --tasks: ask in the form of the model's chat template."""
    window: int | None = None
    """Tokens that the model sees at once; by default as in its training, or 1024 where that is not known."""
    stride: int | None = None
    """Tokens scored in a window, the last ones; by default half the window."""
    batch_size: int = 8
    """Windows at a time, or texts of --tasks."""
    step: int | None = None
    """Which checkpoint; by default the best."""
    param_dtype: Literal["float32", "bfloat16"] | None = None
    """What parameters are held in; by default as the checkpoint has them: float32 after training, an imported model's
    own."""
    mesh: str = ""
    """Spread the model and the windows over a mesh such as data=8; by default one device."""
    json: str | None = None
    """Also write the result to this file."""

    def __post_init__(self):
        for name in ("window", "stride", "batch_size", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1; leave it out")
        if bool(self.dataset) == bool(self.tasks):
            given = "neither is" if not self.dataset else f"{self.dataset} and {self.tasks} are"
            raise ValueError(f"one of --dataset and --tasks must be given, and {given}; try --dataset tiny_shakespeare")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"--num-fewshot {self.num_fewshot} must be at least 0; leave it out")
        for name in ONLY_DATASET if self.tasks else ONLY_TASKS:
            value = getattr(self, name)
            if value not in (None, False):
                needed, other = ("dataset", "tasks") if self.tasks else ("tasks", "dataset")
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} needs --{needed}, and --{other} is given; leave {flag} out")
