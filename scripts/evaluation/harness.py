"""Benchmarks of lm_eval, the harness by which the field compares models, on a run or a Hugging Face folder.

Invariant: tokens, truncation and scores are those of lm_eval's own backend `hf` for the same model, exported.
"""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
from rich.console import Console
from rich.progress import track

import parallax
from parallax.inference.generate import Generator
from parallax.inference.sampling import SETTINGS
from parallax.inference.stopping import round_up
from parallax.loading import SMALLEST_WIDTH, Model, token_log_probs
from parallax.text import decode, make_request
from parallelism.placement import on_mesh
from scripts.common.placement import place_model
from scripts.evaluation.flags import Flags

IS_INSTALLED = importlib.util.find_spec("lm_eval") is not None


def _module(name: str) -> Any:
    """A module of lm_eval, by name, so that types are the same with it and without; None where it is not installed."""
    return importlib.import_module(name) if IS_INSTALLED else None


lm_eval, models, utils = _module("lm_eval"), _module("lm_eval.models.utils"), _module("lm_eval.utils")
TemplateLM: Any = _module("lm_eval.api.model").TemplateLM if IS_INSTALLED else object

Request = TypeVar("Request")
Answer = TypeVar("Answer")
Ids: TypeAlias = list[int]
Scored: TypeAlias = tuple[float, bool]
"""The log-probability of a continuation in nats, and whether greedy decoding would give it."""


def evaluate_tasks(flags: Flags) -> dict[str, Any]:
    """What lm_eval reports: scores with their standard errors, and how they were taken.

    Raises ValueError if lm_eval is not installed, the model, the mesh or a task cannot be used, or its data be had.
    """
    if not IS_INSTALLED:
        raise ValueError('--tasks needs lm_eval, which is not installed; pip install "parallax-lm[eval]"')
    if flags.task_dir is not None and not Path(flags.task_dir).is_dir():
        raise ValueError(f"--task-dir {flags.task_dir} must be a folder; check the path")
    tasks, known = flags.tasks.split(","), _module("lm_eval.tasks").TaskManager(include_path=flags.task_dir)
    for task in tasks:
        if not known.match_tasks([task]):
            raise ValueError(f"--tasks {task} is not known to lm_eval; see lm_eval ls tasks, or name a --task-dir")
    mesh = on_mesh(flags.mesh) if flags.mesh else None
    model = parallax.load(flags.checkpoint, step=flags.step, param_dtype=flags.param_dtype, mesh=mesh)
    try:
        results = lm_eval.simple_evaluate(
            HarnessModel(model, max_length=flags.window, mesh=flags.mesh, batch_size=flags.batch_size),
            tasks=known.match_tasks(tasks),  # a name may be a pattern, such as arc_*
            task_manager=known,
            num_fewshot=flags.num_fewshot,
            limit=flags.limit,
            apply_chat_template=flags.apply_chat_template,
        )
    except ConnectionError as error:
        raise ValueError(f"--tasks {flags.tasks} needs data that cannot be had: {error}; try again") from None
    kept = "results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better"
    return {name: results[name] for name in kept if name in results} | {
        "lm_eval": results["lm_eval_version"],
        "checkpoint": str(model.folder),
        "step": model.step,
    }


def table(results: dict[str, Any]) -> str:
    """What `evaluate_tasks` gives, in lm_eval's own form."""
    return "\n".join(utils.make_table(results, column) for column in ("results", "groups") if column in results)


class HarnessModel(TemplateLM):
    """A loaded model as lm_eval asks one; `simple_evaluate(HarnessModel(model, ...), tasks=[...])`.

    Args:
      max_length: tokens that the model sees at once; by default as in its training. What is longer loses its beginning.
      mesh: the one that the model was loaded on, such as data=8, or empty.
      batch_size: texts at a time.

    Raises ValueError for a max_length beyond max_seq_len.
    """

    def __init__(self, model: Model, *, max_length: int | None = None, mesh: str = "", batch_size: int = 8):
        super().__init__()
        most = model.config.max_seq_len
        self.model, self.batch_size, self.max_length = model, batch_size, max_length or model.context_length
        if self.max_length > most:
            raise ValueError(f"window of {self.max_length} must not exceed max_seq_len={most}; try {most}")
        self._generator = Generator(model.config)
        strategy = place_model(model.config, mesh, batch_size=batch_size, seq_len=most)
        self._score = strategy.compile_evaluation(
            lambda params, batch: token_log_probs(model.config, params, batch["inputs"], batch["targets"])
        )

    @property
    def eot_token_id(self) -> int | None:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is scored after. Raises ValueError where the tokenizer has no id for it."""
        ids = [*self.model.tokenizer.encode(""), *self.model.tokenizer.end_ids]
        if not ids:
            rule = f"tokenizer {self.model.tokenizer.name} has no id that begins or ends a text"
            raise ValueError(f"{rule}, which tasks that score a whole text need; leave those out")
        return int(ids[0])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Ids:
        tokenizer = self.model.tokenizer
        return (tokenizer.encode_part if add_special_tokens is False else tokenizer.encode)(string).tolist()

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, Ids, Ids]], **options: Any) -> list[Scored]:
        def score(batch: Sequence[tuple[Any, Ids, Ids]]) -> list[Scored]:
            rows = [(context + continuation)[-self.max_length - 1 :] for _, context, continuation in batch]
            width = min(max(SMALLEST_WIDTH, round_up(max(map(len, rows)) - 1)), self.max_length)
            inputs, targets = np.zeros((2, self.batch_size, width), np.int32)
            for row, ids in enumerate(rows):
                inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            log_probs, greedy = map(np.asarray, self._score(self.model.params, {"inputs": inputs, "targets": targets}))
            spans = [(len(ids) - 1 - len(given[2]), len(ids) - 1) for ids, given in zip(rows, batch, strict=True)]
            return [
                (float(log_probs[row, begin:end].sum()), bool(greedy[row, begin:end].all()))
                for row, (begin, end) in enumerate(spans)
            ]

        longest = max((len(continuation) for *_, continuation in requests), default=0)
        if longest > self.max_length:
            rule = f"a text to score of {longest} tokens must not exceed the {self.max_length} that the model reads"
            raise ValueError(f"{rule}; leave that task out")
        results = self._by_batches(requests, score, "texts scored", lambda request: len(request[1]) + len(request[2]))
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token once: in windows that share nothing but the token before each."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += log_prob
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, greedy unless a task says otherwise, up to the first of its stops."""
        tokenizer = self.model.tokenizer

        def generate(batch: Sequence[Any]) -> list[str]:
            options = models.normalize_gen_kwargs(batch[0].args[1], default_max_gen_toks=256)
            most, stops = options["max_gen_toks"], [stop for stop in options["until"] if stop]
            if most >= self.max_length:
                rule = (
                    f"a task's max_gen_toks={most} must be less than the {self.max_length} tokens that the model reads"
                )
                raise ValueError(f"{rule}; leave that task out")
            prompts = [self.tok_encode(request.args[0])[most - self.max_length :] for request in batch]
            sampling = {name: options[name] for name in SETTINGS if name in options}
            request = make_request(tokenizer, [""] * self.batch_size, max_tokens=most, stop=stops, **sampling)
            filled = [*prompts, *[prompts[-1]] * (self.batch_size - len(prompts))]  # one compilation for all batches
            request = dataclasses.replace(request, prompts=[np.array(ids, np.int32) for ids in filled])
            rows = self._generator.generate(self.model.params, request)
            return ["".join(decode(row.tolist(), tokenizer, stops)) for row in rows[: len(prompts)]]

        def sampling_of(request: Any) -> str:
            return repr(sorted(request.args[1].items()))

        texts = self._by_batches(
            requests, generate, "texts continued", lambda request: len(request.args[0]), sampling_of
        )
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text; without `add_generation_prompt` its last message is still to be continued."""
        template = self.model.chat_template
        if template is None:
            raise ValueError(f"{self.model.folder} has no chat template; leave --apply-chat-template out")
        try:
            text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        except ValueError:  # as hf: some templates take no system prompt
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            return self.apply_chat_template(others, add_generation_prompt)
        if add_generation_prompt:
            return text
        begun = chat_history[-1]["content"]
        return text[: text.rindex(begun) + len(begun)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self.model.chat_template
        return template.source if template and chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.name

    def _by_batches(
        self,
        requests: Sequence[Request],
        answer: Callable[[Sequence[Request]], list[Answer]],
        what: str,
        size: Callable[[Request], int],
        settings: Callable[[Request], str] = lambda _: "",
    ) -> list[Answer]:
        """Answers in the order of requests, asked for the longest first, a batch having the same settings."""
        groups: dict[str, list[int]] = {}
        for number in sorted(range(len(requests)), key=lambda number: -size(requests[number])):
            groups.setdefault(settings(requests[number]), []).append(number)
        batches = [
            group[start : start + self.batch_size]
            for group in groups.values()
            for start in range(0, len(group), self.batch_size)
        ]
        answers: dict[int, Answer] = {}
        console = Console(stderr=True)
        for batch in track(batches, what, console=console, disable=not console.is_terminal, transient=True):
            answers |= zip(batch, answer([requests[number] for number in batch]), strict=True)
        return [answers[number] for number in range(len(requests))]
