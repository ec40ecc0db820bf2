"""generate.py --chat: each message is answered with all turns before it in sight."""

import dataclasses
import functools

import pytest

import parallax
from parallax.inference.generate import Generator
from parallax.text import decode, make_request
from parallax.tokenizers.chat import Chat
from parallax.tokenizers.chat_template import plain_template
from parallax.tokenizers.plain import ByteTokenizer
from scripts import generate
from scripts.generation import writer
from tests.scripts.untrained import one_layer, write_untrained

generator = functools.cache(Generator)  # compiles once for all tests
FLAGS = ("--chat", "--chat-template", "plain", "--max-tokens", "6", "--temperature", "0")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "run"
    write_untrained(folder, ByteTokenizer(), one_layer(257), step=1)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return parallax.load(folder)


@pytest.fixture(autouse=True)
def shared_generator(monkeypatch):
    monkeypatch.setattr(writer, "Generator", generator)


def answer(model, *turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    prompt = Chat(plain_template(model.tokenizer), model.tokenizer).prompt(messages)
    request = make_request(model.tokenizer, ["a"], max_tokens=6, temperature=0)
    # Streamed, so that no further programs are compiled.
    pairs = generator(model.config).stream(model.params, dataclasses.replace(request, prompts=[prompt]))
    return "".join(decode((token for _, token in pairs), model.tokenizer, "\nUser:"))


def test_one_message(folder, model, call):
    status, out, _ = call(generate, "--checkpoint", folder, *FLAGS, "--system", "Be brief.", "--prompt", "Hi")
    assert (status, out.removesuffix("\n")) == (0, answer(model, ("system", "Be brief."), ("user", "Hi")))


def test_turns_are_kept_until_a_new_chat(folder, model, call):
    status, out, _ = call(generate, "--checkpoint", folder, *FLAGS, stdin="Hi\nAnd?\n/new\nHi\n")
    first = answer(model, ("user", "Hi"))
    second = answer(model, ("user", "Hi"), ("assistant", first), ("user", "And?"))
    assert (status, out) == (0, f"{first}\n{second}\n{first}\n")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--chat",), "has no chat template; give one with --chat-template FILE, or plain"),
        (("--chat", "--interactive"), "--interactive cannot go with --chat"),
        (("--chat", "--num-samples", "2"), "--num-samples 2 cannot go with --chat"),
        (("--system", "a"), "--system is of a chat; add --chat"),
        (("--chat", "--chat-template", "/none"), "chat template /none must be a readable text"),
        (("--chat", "--chat-template", "s3://bucket/file"), "must be a local path or start with gs://"),
    ],
)
def test_bad_flags(folder, call, flags, message):
    status, out, err = call(generate, "--checkpoint", folder, *flags)
    assert (status, out) == (2, "")
    assert message in err
