"""A run as it is known before its first step.

Invariant: a job that exists has had all of its input checked, and has touched no run folder.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import re
import sys
from collections.abc import Callable, Iterator

import jax
from etils import epath

from data.corpus import Corpus, load_corpus, overfit_corpus
from data.pipeline import evaluation_batches, prepare, tokenizer_for
from data.preparing.chats import ChatForm
from data.samples import Samples
from data.stores.mixture import by_source, open_stores, rows_by_store
from parallax.config import TransformerConfig, config_to_dict
from parallax.model.adapters import take_adapters
from parallax.model.transformer import parameters
from parallax.run_folder import read_settings, trained_length
from parallax.storage import open_folder
from parallax.tokenizers.base import Tokenizer
from parallax.tokenizers.chat_template import ChatTemplate, read_chat_template
from parallax.tokenizers.registry import load_tokenizer
from parallax.training.loss import NO_TARGET, make_evaluation
from parallax.training.preference import PreferenceConfig, is_pair, make_preference_evaluation
from parallelism.hosts import agree, wait_for_all
from parallelism.planning.hardware import attention_of
from parallelism.sentinel import require_same
from parallelism.strategies import get_strategy
from parallelism.strategy import Layout, Strategy
from scripts.preparing.automatic import find_unprepared, prepare_into_cache
from scripts.training.choices import choose_accumulate, choose_attention, choose_eval_tokens, choose_layer_loop
from scripts.training.flags import Flags, flag_of, flags_to_dict, may_change, model_name
from scripts.training.output_dir import choose_folder, require_corpus
from scripts.training.prompts import Prompts
from scripts.training.step import bind_state, bind_step
from scripts.training.weights_and_biases import check_wandb

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
"""Those that decide what a step computes, or how processes meet in a save."""
PATHS = {"dataset", "held_out", "init_from", "rules", "sample_prompts"}
"""Flags that name files, of which each machine may have its own."""
ANY_VOCABULARY = 2**8 * 3**2 * 5 * 7
"""Stands for one that is not known yet: the axes of a mesh divide it."""
COLLECTIVE = ("resume", "lower_only", "print_param_hash")
"""Flags that no config holds, and after which processes meet in other places."""


def say(line: str) -> None:
    """A line for the person who watches, on standard error; of several processes the first stands for all."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def say_stopped() -> None:
    """How a run ends that has done no step."""
    say("stopped   before the first step")


@dataclasses.dataclass(frozen=True)
class Job:
    """What to train, on what, where, and into which folder."""

    flags: Flags
    corpus: Corpus
    tokenizer: Tokenizer
    training: Samples
    held_out: Samples
    layout: Layout
    strategy: Strategy
    step: Callable
    evaluate: Callable
    folder: epath.Path
    notes: list[str]
    trained_length: int
    """The longest sequence, in tokens, that the parameters will have learned from."""
    chat_template: ChatTemplate | None
    """How the conversations that it learns are written, or those of the run it starts from."""
    prompts: Prompts | None
    """What is continued at each evaluation."""
    has_pairs: bool
    """Whether it learns from pairs of answers, which one is preferred."""

    def describe(self) -> None:
        """Says what is about to be trained."""
        model, settings = self.flags.model, self.flags.train
        say(f"run       {self.folder}")
        say(f"model     {model_name(self.flags)}: {model.num_params():,} parameters, {model.dtype}")
        if model.lora.rank:
            learned = sum(each.size for each in jax.tree.leaves(take_adapters(parameters(model))))
            say(f"adapters  rank {model.lora.rank}: {learned:,} parameters, which alone are learned")
        for note in self.notes:
            say(note)
        say(f"tokens    {self.tokenizer.name}, vocabulary of {self.tokenizer.vocab_size}")
        parts = self.layout.accumulate
        said = f", in {parts} microbatches" if parts > 1 and settings.reduction == "mean" else ""
        say(f"steps     {settings.steps} × {settings.batch_size} sequences × {settings.seq_len} tokens{said}")
        if words := describe_schedule(self.flags):
            say(f"schedule  {words}")
        say(f"strategy  {self.strategy.describe()}")


def prepare_job(flags: Flags) -> Job:
    """Checks all input and builds what a run needs. Returns once every process has found its input good, and the same.

    Raises ValueError for whatever is wrong with the input.
    """
    if flags.wandb:
        check_wandb(flags.wandb)
    overfit, dataset = flags.mode == "overfit", flags.dataset
    if not overfit:
        dataset = _prepared(flags)
        wait_for_all("the data set is prepared")  # all: where files differ, one process may have nothing to prepare
    notes: list[str] = []  # said once all input is known to be good, so that an error is the only line
    corpus = (
        overfit_corpus()
        if overfit
        else load_corpus(dataset, flags.data_dir, evaluated=flags.held_out, notify=notes.append)
    )
    folder = choose_folder(flags.output_dir, corpus.name, model_name(flags), resume=flags.resume)
    if flags.resume:
        require_corpus(folder, corpus.sha256, corpus.edition)
    tokenizer = _tokenizer(flags, folder, corpus, flags.tokenizer if dataset == flags.dataset else None)
    flags = _with_sizes(flags, tokenizer, corpus)
    # Settled once, so that all evaluations of a run are of the same tokens, whatever a resumed one changes.
    of_store = (corpus.evaluated or corpus.stores) is not None
    flags = dataclasses.replace(flags, eval_tokens=choose_eval_tokens(flags, of_store=of_store))
    fraction = 0.0 if overfit else 0.1
    training, held_out = prepare(
        corpus, tokenizer, flags.train.seq_len, held_out_fraction=fraction, packing=flags.packing
    )
    pairs = _has_pairs(corpus)
    if not pairs:
        _refuse_preferences(flags, corpus)
    _require_targets(flags, corpus, training, held_out, pairs=pairs)
    notes += _count_cut(corpus, training, flags.train.seq_len)
    layout, strategy, step, evaluate = _build_or_explain(flags, pairs=pairs)
    length = _trained_length(flags, folder)
    template = _chat_template(flags, corpus, tokenizer)
    prompts = flags.sample_prompts and Prompts(flags.sample_prompts, flags.model, tokenizer, template)
    job = Job(
        flags=flags,
        corpus=corpus,
        tokenizer=tokenizer,
        training=training,
        held_out=held_out,
        layout=layout,
        strategy=strategy,
        step=step,
        evaluate=evaluate,
        folder=folder,
        notes=notes,
        trained_length=length,
        chat_template=template,
        prompts=prompts or None,
        has_pairs=pairs,
    )
    if jax.process_count() == 1:
        return job
    require_same(facts(job))
    return dataclasses.replace(job, folder=epath.Path(agree(str(folder))))


def _prepared(flags: Flags) -> str:
    """The data set, or its store in the cache; what else can be wrong is found before a store is made, for minutes.

    Raises ValueError.
    """
    sources = find_unprepared(flags.dataset, say)
    if not sources:
        return flags.dataset
    choose_folder(flags.output_dir, "", model_name(flags), resume=flags.resume)
    _build_or_explain(dataclasses.replace(flags, model=dataclasses.replace(flags.model, vocab_size=ANY_VOCABULARY)))
    if flags.held_out is not None:
        open_stores(flags.held_out)
    return prepare_into_cache(flags.dataset, sources, flags.init_from or flags.tokenizer or "char", say)


def _count_cut(corpus: Corpus, training: Samples, seq_len: int) -> Iterator[str]:
    """A line about conversations that are too long for a row, if there are some."""
    stores = () if corpus.stores is None else corpus.stores.stores
    if not any(store.learned for store in stores):
        return
    chats = [(store, rows) for store, rows in zip(stores, rows_by_store(training), strict=True) if store.learned]
    if cut := sum(rows.count_cut() for _, rows in chats):
        documents = sum(store.train.num_documents for store, _ in chats)
        yield f"cut       {cut:,} of {documents:,} conversations, for which --seq-len {seq_len} is too short"


def _refuse_preferences(flags: Flags, corpus: Corpus) -> None:
    """Raises ValueError if flags of preferences are given, for a corpus without pairs."""
    for name, value in config_to_dict(flags.dpo).items():
        if value != getattr(PreferenceConfig(), name):
            raise ValueError(
                f"{flag_of('dpo', name)} {value} needs pairs, and {corpus.name} has none; "
                "prepare some with prepare.py --chat pairs, or leave it out"
            )


def _has_pairs(corpus: Corpus) -> bool:
    """Raises ValueError if only one of what is trained on and what is evaluated has pairs."""
    found = {
        stores is not None and all(store.learned == "pairs" for store in stores.stores)
        for stores in (corpus.stores, corpus.evaluated or corpus.stores)
    }
    if len(found) > 1:
        raise ValueError("--held-out and --dataset must both have pairs, or neither; leave out --held-out")
    return found == {True}


def _require_targets(flags: Flags, corpus: Corpus, training: Samples, held_out: Samples, *, pairs: bool) -> None:
    """Raises ValueError where conversations are cut off before anything that is learned of them, all of a side."""
    stores = [store for stores in (corpus.stores, corpus.evaluated) if stores is not None for store in stores.stores]
    if not any(store.learned for store in stores):
        return
    parts = by_source(held_out)
    most = None if flags.eval_tokens is None else flags.eval_tokens // len(parts)
    sides = [("training", training, None), *((f"held-out {name}".strip(), part, most) for name, part in parts.items())]
    for side, samples, most_tokens in sides:
        batches = evaluation_batches(samples, batch_size=flags.train.batch_size, most_tokens=most_tokens)
        targets = (is_pair(batch) if pairs else batch["targets"] != NO_TARGET for batch in batches)
        if not any(each.any() for each in targets):  # which mostly reads one batch
            rule = f"seq_len={flags.train.seq_len} must reach tokens that are learned, and the {side} side shows none"
            raise ValueError(f"{rule}; use a longer --seq-len, or prepare more conversations")


def _build_or_explain(flags: Flags, *, pairs: bool = False) -> tuple[Layout, Strategy, Callable, Callable]:
    """As `build`; where the flags at fault are those of a run that is resumed, the error says what else to change."""
    try:
        return build(flags, pairs=pairs)
    except ValueError as error:
        rule, _, remedy = str(error).rpartition("; ")
        if flags.resume and not all(map(may_change, re.findall(r"--[a-z][\w.-]*", remedy))):
            raise ValueError(f"{rule}, as the run was started; try another --mesh, or --strategy single") from None
        raise


def facts(job: Job) -> dict[str, tuple[str, str]]:
    """What all processes must have alike, as `require_same` takes it: what is learned, how, and by which programs."""
    flags, settings = job.flags, job.flags.train
    found = {f"package {name}": (importlib.metadata.version(name), "") for name in PACKAGES}
    for part, values in flags_to_dict(flags).items():
        for name in values.keys() - PATHS:
            found[flag_of(part, name)] = (json.dumps(values[name]), "")
    for name in COLLECTIVE:
        found[f"--{name.replace('_', '-')}"] = (str(getattr(flags, name)), "")
    shardings = [str(leaf.sharding) for leaf in jax.tree.leaves(job.strategy.abstract())]
    batch = job.training.gather(job.training.draw(settings.batch_size, settings.seed, 0))
    return {
        "the text": (job.corpus.sha256, f"{job.corpus.edition} with sha256 {job.corpus.sha256}"),
        "the tokenizer": (_sha256(json.dumps(job.tokenizer.to_json()).encode()), job.tokenizer.name),
        **dict(sorted(found.items())),
        "the sample prompts": (_sha256("\n".join(job.prompts.lines).encode()) if job.prompts else "", ""),
        "the layout": (_sha256("".join(shardings).encode()), job.strategy.describe()),
        "the first batch": (_sha256(b"".join(array.tobytes() for array in batch.values())), ""),
    }


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def describe_schedule(flags: Flags) -> str:
    """How the learning rate ends, where its schedule is not as long as the run."""
    learning, steps = flags.learning, flags.train.steps
    length = learning.schedule_steps or steps
    if length == steps:
        return ""
    ends = f"falls until step {length} and stays at {learning.final_rate * learning.learning_rate:g}"
    if length > steps:
        ends = f"would fall until step {length} and is cut off at step {steps}"
    shorter = f" --warmup-steps {max(1, steps // 10)}" if (learning.warmup_steps or 0) > steps else ""
    return f"the rate {ends}; --schedule-steps {steps}{shorter} lets it fall until the end"


def _tokenizer(flags: Flags, folder: epath.Path, corpus: Corpus, spec: str | None) -> Tokenizer:
    """That of the run, of the run it starts from, or one for the text, as `spec` says."""
    for run in (folder, flags.init_from and open_folder(flags.init_from)):
        if run and (run / "tokenizer.json").exists():
            return load_tokenizer(run / "tokenizer.json")
    return tokenizer_for(corpus, spec)


def _chat_template(flags: Flags, corpus: Corpus, tokenizer: Tokenizer) -> ChatTemplate | None:
    """That of conversations that were prepared, else of the run it starts from."""
    for store in corpus.stores.stores if corpus.stores is not None else ():
        if store.learned:
            return ChatForm(**store.manifest["settings"]["chat"]).chat_template()
    return None if flags.init_from is None else read_chat_template(open_folder(flags.init_from), tokenizer)


def _trained_length(flags: Flags, folder: epath.Path) -> int:
    """That of the run, or of its sequences and of those of the run it starts from."""
    for run in (folder, flags.init_from and open_folder(flags.init_from)):
        if run and (run / "config.json").exists():
            return max(flags.train.seq_len, trained_length(read_settings(run)))
    return flags.train.seq_len


def _with_sizes(flags: Flags, tokenizer: Tokenizer, corpus: Corpus) -> Flags:
    """The sizes that follow from the text: the vocabulary and, to learn one sentence, its length."""
    train = flags.train
    if flags.mode == "overfit":
        train = dataclasses.replace(train, seq_len=len(tokenizer.encode(corpus.documents[0])) - 1)
        if train.seq_len > flags.model.max_seq_len:
            rule = f"the sentence of {train.seq_len} tokens must not exceed max_seq_len={flags.model.max_seq_len}"
            raise ValueError(f"{rule}; try --model.max-seq-len {train.seq_len}")
    model = dataclasses.replace(flags.model, vocab_size=tokenizer.vocab_size)
    return dataclasses.replace(flags, train=train, model=model)


def build(flags: Flags, *, pairs: bool = False) -> tuple[Layout, Strategy, Callable, Callable]:
    """The settled layout, the strategy, the step with everything bound but state and batch, and the evaluation.

    Raises ValueError if the layout does not fit the devices, the batch or the model.
    """
    layout = settle_layout(flags)
    init_state, axes = bind_state(flags.model, flags.train, flags.learning)
    strategy = get_strategy(layout, init_state, axes)
    model = settle_model(flags, strategy)
    preference = flags.dpo if pairs else None
    step = bind_step(model, flags.train, flags.learning, strategy.gradients, preference)
    evaluate = make_evaluation(model) if preference is None else make_preference_evaluation(model, preference)
    return layout, strategy, step, evaluate


def settle_model(flags: Flags, strategy: Strategy) -> TransformerConfig:
    """The model with the attention and the layer loop that are fastest on the devices, where these are open."""
    fastest = attention_of(strategy.devices[0])
    model = choose_attention(flags.model, flags.train.seq_len, strategy.length_parts, fastest)
    return choose_layer_loop(model, strategy.devices[0].platform, flags.train.reduction)


def settle_layout(flags: Flags) -> Layout:
    """The layout that the flags ask for, with the number of microbatches chosen by the devices where it is open."""
    return Layout(
        strategy=flags.strategy or "single",
        mesh=flags.mesh,
        rules=flags.rules,
        reduction=flags.train.reduction,
        accumulate=choose_accumulate(flags, jax.default_backend(), jax.device_count()),
        batch_size=flags.train.batch_size,
        seq_len=flags.train.seq_len,
    )
