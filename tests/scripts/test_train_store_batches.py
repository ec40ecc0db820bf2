"""Five hundred batches by their hashes: the same for any processes and devices, and resumed on any layout from any."""

import hashlib
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data.corpus import load_corpus
from data.pipeline import prepare, tokenizer_for, training_batches
from data.stores import rows as rows_module
from parallelism.rows import RowBlocks
from tests.data.small_stores import prepared, texts, write_jsonl

BATCHES, SIZE, SEQ_LEN, SEED = 500, 8, 16, 7
CUTS = {(1, 1): (1, 1), (1, 2): (2, 1), (1, 4): (2, 2), (2, 1): (2, 1), (2, 2): (4, 1), (2, 4): (8, 1)}
CUTS |= {(4, 1): (2, 2), (4, 2): (8, 1)}
"""Layouts, as processes and devices of each; the parts that they cut rows into, and the devices that hold each part."""
STAGES = [
    {"until_step": 167, "weights": {"web.store": 1}},
    {"until_step": 250, "weights": {"web.store": 0.25, "code.store": 0.75}},
    {"weights": {"web.store": 0.125, "code.store": 0.875}},
]


@pytest.fixture
def batches(request, tmp_path, monkeypatch):
    """What a process sees that opens a mixture in stages by itself: batches from `start` on, of each the given rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rows_module, "BLOCK_TOKENS", 64 * SEQ_LEN)
    for seed, name in enumerate(("web", "code")):
        write_jsonl(tmp_path / f"{name}.jsonl", texts(90, seed))
        prepared(tmp_path / f"{name}.store", f"{name}.jsonl", held_out=0.2, shard_tokens=900)
    (tmp_path / "mix.json").write_text(json.dumps({"stages": STAGES}))

    def opened(rows, start):
        corpus = load_corpus("mix.json", notify=lambda line: None)
        training, _ = prepare(corpus, tokenizer_for(corpus), SEQ_LEN, packing=request.param)
        return training_batches(training, batch_size=SIZE, seed=SEED, rows=rows, start=start)

    return opened


def rows_of(layout):
    """The rows that each process holds, as its strategy says."""
    processes, devices = layout
    parts, copies = CUTS[layout]
    mesh = Mesh(np.array(jax.devices()[: parts * copies]).reshape(parts, copies), ("data", "copies"))
    everywhere = NamedSharding(mesh, PartitionSpec("data"))

    def held_by(process):
        def indices(shape):
            held = everywhere.devices_indices_map(shape).items()
            return {device: index for device, index in held if device.id // devices == process}

        return RowBlocks(SimpleNamespace(addressable_devices_indices_map=indices), parts).rows(SIZE)

    return [held_by(process) for process in range(processes)]


def hashes(batches, layout, start, count):
    """Of global batches, which are put together from what the processes hold of them."""
    rows = rows_of(layout)
    assert sorted({row for held in rows for row in held.tolist()}) == list(range(SIZE))
    for parts in itertools.islice(zip(*(batches(held, start) for held in rows), strict=True), count):
        whole = {name: np.zeros((SIZE, *array.shape[1:]), array.dtype) for name, array in parts[0].items()}
        for held, part in zip(rows, parts, strict=True):
            for name, array in part.items():
                whole[name][held] = array
        yield hashlib.sha256(b"".join(array.tobytes() for array in whole.values())).hexdigest()


def journey():
    """Layouts one after the other, in which every one comes behind every one, itself too."""
    for place, layout in enumerate(CUTS):
        yield layout
        for other in [*CUTS][place + 1 :]:
            yield from (layout, other)
    yield next(iter(CUTS))


@pytest.mark.parametrize("batches", ["best-fit"], indirect=True)
def test_batches_are_the_same_resumed_on_any_layout_from_any(batches):
    alone = list(hashes(batches, (1, 1), 0, BATCHES))
    assert len(set(alone)) == BATCHES
    layouts = list(journey())
    assert set(itertools.pairwise(layouts)) == set(itertools.product(CUTS, repeat=2))
    stops = np.random.default_rng(0).choice(np.arange(1, BATCHES), len(layouts) - 1, replace=False)
    resumed = []
    for layout, stop in zip(layouts, [*sorted(stops.tolist()), BATCHES], strict=True):
        resumed += hashes(batches, layout, len(resumed), stop - len(resumed))
    assert resumed == alone


@pytest.mark.parametrize("batches", ["concat"], indirect=True)
def test_batches_are_the_same_for_1_2_and_4_processes(batches):
    alone, two, four = (list(hashes(batches, layout, 0, BATCHES)) for layout in ((1, 1), (2, 2), (4, 2)))
    assert alone == two == four
