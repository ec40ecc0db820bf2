"""Conversations in a store: every shape comes to the same tokens, and only what is learned is a target."""

import json
from fractions import Fraction

import numpy as np
import pytest

from data.preparing.chats import ChatForm, read_conversation, read_pair
from data.samples import Samples
from data.stores.mixture import Stage, Stores
from parallax.tokenizers.chat_template import plain_template
from parallax.tokenizers.plain import ByteTokenizer
from tests.data.small_stores import prepared

TOKENIZER = ByteTokenizer()
TURNS = [("user", "2+2?"), ("assistant", "4"), ("user", "3+3?"), ("assistant", "6")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def form(learned="assistant"):
    return ChatForm.of(plain_template(TOKENIZER), learned)


def store_of(folder, rows, **settings):
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"field": "", "chat": form(), "held_out": 0.0} | settings
    return prepared(folder / "chats.store", path, tokenizer=TOKENIZER, **settings)


def learned_text(store):
    (found,) = store.train.learned_documents()
    _, ids, learned = found
    cuts = np.flatnonzero(np.diff(learned)) + 1
    return [TOKENIZER.decode(run) for at, run in zip([0, *cuts], np.split(ids, cuts), strict=True) if learned[at]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"prompt": MESSAGES[:3], "completion": MESSAGES[3:]},
        {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": c} for r, c in TURNS]},
    ],
)
def test_every_shape_comes_to_the_same_messages(row):
    assert read_conversation(row) == (MESSAGES, None)


def test_texts_are_a_turn_of_each():
    messages, tools = read_conversation({"prompt": "2+2?", "completion": "4", "tools": '[{"name": "add"}]'})
    assert messages == MESSAGES[:2]
    assert tools == [{"name": "add"}]


@pytest.mark.parametrize("learned", ["assistant", "last", "all"])
def test_what_is_learned(tmp_path, learned):
    store = store_of(tmp_path, [{"messages": MESSAGES}], chat=form(learned))
    pieces = learned_text(store)
    if learned == "all":
        assert len(pieces) == 1
        assert "2+2?" in pieces[0]
    else:
        answers = ["4", "6"][-len(pieces) :]
        assert len(pieces) == (2 if learned == "assistant" else 1)
        assert all(piece.strip().startswith(answer) for piece, answer in zip(pieces, answers, strict=True))
        assert not any("?" in piece or "User" in piece for piece in pieces)
    assert store.manifest["max_id"] < TOKENIZER.vocab_size


def targets(samples: Samples) -> list[tuple[int, int]]:
    """(input, target) of all that is learned."""
    batch = samples.gather(samples.all_ids())
    kept = batch["targets"] >= 0
    return sorted(zip(batch["inputs"][kept].tolist(), batch["targets"][kept].tolist(), strict=True))


@pytest.mark.parametrize("packing", [None, "none"])
def test_only_what_is_learned_is_a_target(tmp_path, packing):
    rows = [{"prompt": f"{a}+{a}?", "completion": str(2 * a)} for a in range(20)]
    store = store_of(tmp_path, rows)
    samples = Stores((store,)).training(64, packing)
    expected = []
    for _, ids, learned in store.train.learned_documents():
        expected += [(a, b) for a, b, kept in zip(ids, ids[1:], learned[1:], strict=False) if kept]
    assert targets(samples) == sorted(expected)
    assert len(expected) > 40


def test_text_beside_conversations_is_cut_and_not_cut_off(tmp_path):
    chats = store_of(tmp_path, [{"prompt": f"{a}+{a}?", "completion": str(2 * a)} for a in range(20)])
    (tmp_path / "text.txt").write_text("abcdefghij" * 50)
    text = prepared(tmp_path / "text.store", tmp_path / "text.txt", tokenizer=TOKENIZER, held_out=0.0)
    half = Fraction(1, 2)
    mixture = Stores((chats, text), (Stage(None, (half, half)),)).training(64)
    batch = mixture.gather(mixture.all_ids())
    assert np.isin(batch["inputs"], text.train.read(0, 10)).sum() > 450, "the whole text, and not its first row"
    assert (batch["segments"] > 0).any(axis=1).all()


def test_parquet_and_workers_make_the_same_store(tmp_path):
    import pyarrow
    import pyarrow.parquet

    answer = {"role": "assistant", "content": "yes"}
    rows = [{"messages": [{"role": "user", "content": f"{a}?"}, answer]} for a in range(9)]
    one = store_of(tmp_path, rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "chats.parquet")
    settings = {"field": "", "chat": form(), "held_out": 0.0, "workers": 2}
    other = prepared(tmp_path / "two.store", tmp_path / "chats.parquet", tokenizer=TOKENIZER, **settings)
    assert [ids.tolist() for _, ids in one.train.documents()] == [ids.tolist() for _, ids in other.train.documents()]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ([1], "must be an object"),
        ({"text": "hello"}, "must have messages, prompt and completion, or conversations, and has text"),
        ({"messages": []}, "must be a list of messages, and not empty"),
        ({"messages": [{"content": "hello"}]}, "must be an object with 'role'"),
        ({"messages": [{"role": "user"}]}, "has no 'content'"),
        ({"messages": [{"role": "user", "content": None}, *MESSAGES]}, "message 0 of messages has no 'content'"),
        ({"messages": [{"role": "user", "content": 4}, *MESSAGES]}, "has no 'content' that is a text"),
        ({"conversations": [{"from": "gpt", "tool_calls": [{}]}]}, "message 0 of conversations has no 'value'"),
        ({"messages": MESSAGES, "tools": 5}, "tools must be a list"),
        ({"messages": MESSAGES, "tools": "["}, "tools must be JSON"),
        ({"messages": MESSAGES[:1]}, "no turn of the assistant"),
    ],
)
def test_what_is_no_conversation_is_named(tmp_path, row, rule):
    with pytest.raises(ValueError, match=rf"chats.jsonl:1: .*{rule}"):
        store_of(tmp_path, [row])


def test_what_is_nested_too_deep_is_named(tmp_path):
    (tmp_path / "chats.jsonl").write_text('{"messages":' + "[" * 100_000 + "\n")
    with pytest.raises(ValueError, match=r"chats.jsonl:1: maximum recursion depth"):
        prepared(tmp_path / "deep", tmp_path / "chats.jsonl", tokenizer=TOKENIZER, field="", chat=form())


def test_letters_are_composed_however_json_spells_them(tmp_path):
    store = store_of(tmp_path, [{"prompt": "e\u0301?", "completion": "4"}], nfc=True)
    assert "\u0301" in json.loads((tmp_path / "chats.jsonl").read_text())["prompt"]
    (found,) = store.train.documents()
    assert "\u00e9?" in TOKENIZER.decode(found[1])


def test_a_prompt_that_both_answers_hold_is_there_once():
    row = {"chosen": MESSAGES, "rejected": [*MESSAGES[:3], {"role": "assistant", "content": "7"}]}
    assert read_pair(row | {"prompt": "2+2?"}) == read_pair(row) == (row["chosen"], row["rejected"], None)


def test_a_pair_is_a_row_of_two_segments(tmp_path):
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "five"}
    store = store_of(tmp_path, [row, row | {"prompt": "1+3?"}], chat=form("pairs"))
    samples = Stores((store,)).training(64)
    batch = samples.gather(np.array([0, -1]))
    assert (batch["segments"][1] == 0).all()
    ids, targets, segments = (batch[name][0] for name in ("inputs", "targets", "segments"))
    for segment, answer in ((1, "4"), (2, "five")):
        here = segments == segment
        assert TOKENIZER.decode(ids[here]).startswith("User: 2+2?\nAssistant:")
        assert TOKENIZER.decode(targets[here & (targets >= 0)]).strip().startswith(answer)


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"prompt": "2+2?", "chosen": "4"}, "must be an object with chosen and rejected"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "must differ"),
        ({"chosen": MESSAGES[:2], "rejected": MESSAGES[2:]}, "must answer the same messages"),
        ({"chosen": MESSAGES[:3], "rejected": MESSAGES[:1]}, "must end with a message of the assistant"),
    ],
)
def test_what_is_no_pair_is_named(tmp_path, row, rule):
    with pytest.raises(ValueError, match=rf"chats.jsonl:1: .*{rule}"):
        store_of(tmp_path, [row], chat=form("pairs"))


def test_pairs_go_with_no_packing(tmp_path):
    row = {"prompt": "2+2?", "chosen": "4", "rejected": "five"}
    store = store_of(tmp_path, [row], chat=form("pairs"))
    with pytest.raises(ValueError, match="go with no other store and no --packing"):
        Stores((store,)).training(64, "concat")
