"""Stores as one source of samples: a single one, or several in exact shares, which stages may change.

Invariant: which source sample g of a run comes from, and its number there, follow from the stages, the seed and g
alone. Each block of samples holds exactly its share of every source, and a source goes on with its own epochs where it
was, whatever the stage.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data.samples import Batch, Samples
from data.stores.order import shuffled
from data.stores.rows import PACKINGS, Packing, Pairs, StoreRows
from data.stores.store import TokenSide, TokenStore, open_store
from parallax.storage import is_remote

BLOCK = 1000
"""Samples in a block, or the next multiple of what the weights' decimals need."""
LARGEST_BLOCK = 10**6
WEIGHT = re.compile(r":\s*[-+]?\.?\d[^/:,]*(,|$)")
"""What tells a list from an address such as gs://bucket/web.store, and from a path with a colon."""
REMEDY = 'write it as "web.store:0.7,code.store:0.3"'


@dataclass(frozen=True)
class Stage:
    """Shares of the sources in their order, which add up to 1, up to a step or, where that is None, for good."""

    until_step: int | None
    weights: tuple[Fraction, ...]

    @property
    def block(self) -> int:
        """Samples after which every source has exactly its share."""
        least = math.lcm(*(weight.denominator for weight in self.weights))
        return least * -(-BLOCK // least)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Samples of each source in a block."""
        return tuple(int(weight * self.block) for weight in self.weights)


@dataclass(frozen=True, eq=False)
class Stores:
    """One store or several, with the shares in which they are trained on."""

    stores: tuple[TokenStore, ...]
    stages: tuple[Stage, ...] = (Stage(None, (Fraction(1),)),)

    @property
    def sha256(self) -> str:
        """The sha256 of the content of a single store, or of all and their stages."""
        if len(self.stores) == 1:
            return self.stores[0].content_sha256
        stages = [[stage.until_step, [str(weight) for weight in stage.weights]] for stage in self.stages]
        value = [[store.content_sha256 for store in self.stores], stages]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    @property
    def tokenizer_path(self) -> epath.Path:
        return self.stores[0].tokenizer_path

    @property
    def names(self) -> list[str]:
        return [str(store.folder) for store in self.stores]

    @property
    def short_names(self) -> list[str]:
        """Names without folder and suffix, where that tells them apart."""
        stems = [store.name for store in self.stores]
        return stems if len(set(stems)) == len(stems) else self.names

    @property
    def title(self) -> str:
        if len(self.stores) == 1:
            return f"store {self.names[0]}"
        shares = ", ".join(f"{name}:{float(w):g}" for name, w in zip(self.names, self.stages[0].weights, strict=True))
        more = f", in {len(self.stages)} stages" if len(self.stages) > 1 else ""
        return f"mixture of {shares}{more}"

    def training(self, seq_len: int, packing: str | None = None) -> "StoreRows | Mixture":
        """Rows to train on, filled as one of PACKINGS. Raises ValueError where a store has none."""
        return self._joined(seq_len, packing, [store.train for store in self.stores], "training")

    def held_out(self, seq_len: int, packing: str | None = None) -> "StoreRows | Mixture":
        """Rows that are held out. Raises ValueError where a store has none."""
        return self._joined(seq_len, packing, [store.held_out for store in self.stores], "held-out")

    def _packing(self, name: str | None, store: TokenStore) -> Packing:
        """By default concat; conversations are kept apart, since one is no context of another, and text beside them
        too, which is cut and not cut off.

        Raises ValueError for pairs beside what is none.
        """
        if any(store.learned == "pairs" for store in self.stores):
            if not all(store.learned == "pairs" for store in self.stores) or name is not None:
                raise ValueError(f"{self.title} has pairs, which go with no other store and no --packing; leave it out")
            return Pairs
        beside = "best-fit" if any(store.learned for store in self.stores) else "concat"
        return PACKINGS[name or ("whole" if store.learned else beside)]

    def _joined(
        self, seq_len: int, packing: str | None, sides: Sequence[TokenSide], name: str
    ) -> "StoreRows | Mixture":
        """The rows of one side of each store; `name` is what messages call that side."""
        parts: list[StoreRows] = [
            self._packing(packing, store)(side, seq_len, f"the {name} side of {store.folder}")
            for store, side in zip(self.stores, sides, strict=True)
        ]
        return parts[0] if len(parts) == 1 else Mixture(self.short_names, parts, self.stages)

    def seen(self, training: Samples, batch_size: int, seed: int, step: int) -> dict[str, dict[str, float]]:
        """By source: the share of it in step `step`, tokens of it in all steps up to that, and epochs of them."""
        samples, rows = step * batch_size, rows_by_store(training)
        counts = training.counts(batch_size, seed, samples) if isinstance(training, Mixture) else [samples]
        stage = next(each for each in self.stages if each.until_step is None or step <= each.until_step)
        return {
            name: {"weight": float(weight), "tokens": count * training.seq_len, "epochs": round(part.epochs(count), 6)}
            for name, weight, count, part in zip(self.short_names, stage.weights, counts, rows, strict=True)
        }


class Mixture:
    """Rows of several stores; a sample id is a row's number behind all those of the stores before."""

    def __init__(self, names: Sequence[str], parts: Sequence[StoreRows], stages: Sequence[Stage]) -> None:
        self.names, self.parts, self.seq_len, self._stages = names, parts, parts[0].seq_len, tuple(stages)
        self.starts = np.cumsum([0, *(part.order.size for part in parts)])

    def draw(self, batch_size: int, seed: int, k: int) -> np.ndarray:
        sources, numbers = self._placed(np.arange(k * batch_size, (k + 1) * batch_size), batch_size, seed)
        ids = self.starts[sources]
        for source in np.unique(sources).tolist():
            here = sources == source
            ids[here] += self.parts[source].order.rows(numbers[here], seed)
        return ids

    def all_ids(self, most: int | None = None) -> np.ndarray:
        """As of any samples; with `most` a like number from each store."""
        share = None if most is None else max(1, most // len(self.parts))
        return np.concatenate([self.starts[place] + part.all_ids(share) for place, part in enumerate(self.parts)])

    def gather(self, sample_ids: np.ndarray) -> Batch:
        sources = self.source_of(sample_ids)
        batch = self.parts[0].gather(np.where(sources == 0, sample_ids, -1))
        for source in np.unique(sources[sources > 0]).tolist():
            here = sources == source
            rows = self.parts[source].gather(sample_ids[here] - self.starts[source])
            for name, array in rows.items():
                batch[name][here] = array
        low = np.where(sample_ids < 0, -1, sample_ids & 0x7FFFFFFF)
        return batch | {"sample_ids": low.astype(np.int32)}

    def source_of(self, sample_ids: np.ndarray | int) -> np.ndarray:
        """The store that each sample is from; -1 for padding."""
        return np.searchsorted(self.starts, sample_ids, "right") - 1

    def counts(self, batch_size: int, seed: int, samples: int) -> list[int]:
        """How many of the first samples of a run are of each store."""
        counts, start = [0] * len(self.parts), 0
        for place, stage in enumerate(self._stages):
            end = samples if stage.until_step is None else min(samples, stage.until_step * batch_size)
            blocks, rest = divmod(max(0, end - start), stage.block)
            begun = _block(stage, seed, place, blocks)[0][:rest]
            for source, quota in enumerate(stage.quotas):
                counts[source] += blocks * quota + int(np.count_nonzero(begun == source))
            start = max(start, end)
        return counts

    def sample_of(self, source: int, number: int, batch_size: int, seed: int) -> int:
        """Which sample of a run is the one of this number among those of a source; a run must see so many."""
        start = 0
        for place, stage in enumerate(self._stages):
            before = self.counts(batch_size, seed, start)[source]
            end = None if stage.until_step is None else stage.until_step * batch_size
            if end is None or number < self.counts(batch_size, seed, end)[source]:
                block, rank = divmod(number - before, stage.quotas[source])
                within = np.flatnonzero(_block(stage, seed, place, block)[0] == source)[rank]
                return start + block * stage.block + int(within)
            start = end
        raise ValueError(f"no stage has sample {number} of {source}; ask for one that was seen")

    def _placed(self, samples: np.ndarray, batch_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample of a run, and its number among the samples of that source."""
        sources, numbers = np.empty_like(samples), np.empty_like(samples)
        start = 0
        for place, stage in enumerate(self._stages):
            end = samples[-1] + 1 if stage.until_step is None else stage.until_step * batch_size
            here = np.flatnonzero((samples >= start) & (samples < end))
            if len(here):
                before = np.array(self.counts(batch_size, seed, start))
                blocks, places = np.divmod(samples[here] - start, stage.block)
                for block in np.unique(blocks).tolist():
                    at = here[blocks == block]
                    found, ranks = (column[places[blocks == block]] for column in _block(stage, seed, place, block))
                    sources[at] = found
                    numbers[at] = before[found] + block * np.array(stage.quotas)[found] + ranks
            start = end
        return sources, numbers


def by_source(samples: Samples) -> dict[str, Samples]:
    """The samples of each store of a mixture; what is no mixture has no name here."""
    return dict(zip(samples.names, samples.parts, strict=True)) if isinstance(samples, Mixture) else {"": samples}


def rows_by_store(samples: Samples) -> list[StoreRows]:
    """The rows of each store. Raises ValueError where they are of none."""
    rows = [part for part in by_source(samples).values() if isinstance(part, StoreRows)]
    if not rows:
        raise ValueError("where documents were seen is known of stores alone; prepare the data with prepare.py")
    return rows


@lru_cache(maxsize=64)
def _block(stage: Stage, seed: int, place: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each sample of a block, and its rank among those of that source in the block."""
    dealt = np.repeat(np.arange(len(stage.quotas)), stage.quotas)
    sources, ranks = dealt[shuffled(np.arange(stage.block), stage.block, seed, place, block)], np.empty_like(dealt)
    for source, quota in enumerate(stage.quotas):
        ranks[sources == source] = np.arange(quota)
    return sources, ranks


def open_stores(name: str) -> Stores:
    """A store by its address, or what `load_stores` takes. Raises ValueError if it cannot be read."""
    return load_stores(name) or Stores((open_store(os.path.expanduser(name)),))


def load_stores(name: str) -> Stores | None:
    """What `--dataset` says where it names several stores: a list with weights, or a JSON file with stages.

    None where it says something else. Raises ValueError if the weights do not add up to 1, a stage or a store cannot be
    read, one store is spelled in two ways, or the stores have different tokenizers.
    """
    path = Path(name).expanduser()
    if os.path.exists(path):  # that of pathlib raises for a name that is too long, as a list may be
        stages = _read_stages(path) if path.suffix == ".json" and path.is_file() else None
    else:
        stages = [(None, _read_list(name))] if WEIGHT.search(name) else None
    if stages is None:
        return None
    names = list(dict.fromkeys(store for _, weights in stages for store in weights))
    stores = tuple(open_store(os.path.expanduser(each)) for each in names)
    places: dict[str, str] = {}
    for each, store in zip(names, stores, strict=True):
        place = str(store.folder) if is_remote(store.folder) else os.path.realpath(store.folder)
        if (first := places.setdefault(place, each)) != each:
            raise ValueError(f"stores of a mixture must be several, and {first} and {each} are one; spell it one way")
    for store in stores[1:]:
        first, other = (each.manifest["tokenizer"] for each in (stores[0], store))
        if first["sha256"] != other["sha256"]:
            raise ValueError(
                f"stores of a mixture must have one tokenizer, and {names[0]} has {first['name']} (sha256 "
                f"{first['sha256'][:12]}…), {store.folder} {other['name']} ({other['sha256'][:12]}…); prepare one "
                f"again with --tokenizer {names[0]}"
            )
    return Stores(
        stores,
        tuple(Stage(until, tuple(weights.get(each, Fraction(0)) for each in names)) for until, weights in stages),
    )


def _read_list(text: str) -> dict[str, Fraction]:
    weights: dict[str, str] = {}
    for part in text.split(","):
        name, _, weight = part.strip().rpartition(":")
        if not name or name in weights:
            raise ValueError(f"mixture {text!r} must give each store once, with a weight; {REMEDY}")
        weights[name] = weight
    return _checked(weights, text)


def _read_stages(path: Path) -> list[tuple[int | None, dict[str, Fraction]]] | None:
    """The stages of a JSON file, or None where it is no object with `stages`."""
    if path.stat().st_size > LARGEST_BLOCK:
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(values, dict) or "stages" not in values:
        return None
    stages: list[tuple[int | None, dict[str, Fraction]]] = []
    last = 0
    given = values["stages"] if isinstance(values["stages"], list) else []
    for place, stage in enumerate(given, start=1):
        match stage:
            case {"weights": dict(weights), **rest} if weights and not rest.keys() - {"until_step"}:
                until = rest.get("until_step")
            case _:
                raise ValueError(f'stage {place} of {path} must be {{"until_step": …, "weights": {{…}}}}; correct it')
        if place < len(given) and not (type(until) is int and until > last):
            raise ValueError(
                f"stage {place} of {path} must end at a step after {last}, got {until}; correct until_step"
            )
        stages.append((until if place < len(given) else None, _checked(weights, f"stage {place} of {path}")))
        last = 0 if until is None else until
    if not stages:
        raise ValueError(f"{path} must list a stage in stages and lists none; add one")
    if last:
        raise ValueError(f"the last stage of {path} must go on to the end, got until_step {last}; leave that out")
    return stages


def _checked(weights: dict[str, Any], what: str) -> dict[str, Fraction]:
    """Weights as they were written, which are exact."""
    found: dict[str, Fraction] = {}
    for name, weight in weights.items():
        try:
            found[name] = Fraction(str(weight))
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"weight {weight!r} of {name} in {what} must be a number; {REMEDY}") from None
        if not 0 < found[name] <= 1:
            raise ValueError(f"weight {weight} of {name} in {what} must be over 0 and at most 1; {REMEDY}")
    total = sum(found.values())
    if total != 1:
        raise ValueError(f"the weights of {what} must add up to 1 and add up to {float(total):g}; correct one")
    if math.lcm(*(weight.denominator for weight in found.values())) > LARGEST_BLOCK:
        raise ValueError(f"the weights of {what} must have at most 6 decimals; round them")
    return found
