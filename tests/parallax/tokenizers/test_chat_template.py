"""What a chat template may and may not do, and where it is kept."""

import json
import os
import pickle
import subprocess
import venv
from pathlib import Path

import jinja2
import pytest
from etils import epath

import parallax
from parallax.tokenizers.chat_template import (
    ChatTemplate,
    choose_template,
    plain_template,
    read_chat_template,
    write_chat_template,
)
from parallax.tokenizers.plain import ByteTokenizer, CharTokenizer
from tests.parallax.tokenizers.chats import CHATML, HELLO, LLAMA_2, SYSTEM, TOOLS, TURNS

HOSTILE = {
    "a huge range": "{% for a in range(10 ** 9) %}{% endfor %}",
    "a huge number": "{{ 9 ** (9 ** 9) }}",
    "a huge text": "{{ 'a' * 10 ** 10 }}",
    "a text that doubles": "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s * 2 %}{% endfor %}",
    "much output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "a format": "{{ '%0999999999d' % 1 }}",
    "attributes": "{{ ''.__class__.__mro__ }}",
    "attributes by a filter": "{{ messages | map(attribute='__class__') | list }}",
    "attributes by a format": "{{ '{0.__class__}'.format(messages) }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "a function's globals": "{{ raise_exception.__globals__ }}",
    "a macro without end": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "bad syntax": "{% for %}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(name, refused):
    template = ChatTemplate(HOSTILE[name], {})
    with refused("; give another with --chat-template"):
        template.check()


def test_a_template_that_was_stopped_is_started_again():
    source = "{% for i in messages[1:] * 99999999 %}{% endfor %}{{ messages[0].content }}"
    template = ChatTemplate(source, {})
    assert template.render(HELLO) == HELLO[0]["content"]
    with pytest.raises(ValueError, match="no more than 1 s"):
        template.render(TURNS)
    assert template.render(HELLO) == HELLO[0]["content"]


def test_an_interrupted_rendering_answers_no_later_one():
    template = ChatTemplate("{{ messages[0].content }}", {})
    template.render(HELLO)

    class Interrupted:
        def __init__(self, pipe):
            self._pipe = pipe

        def __getattr__(self, name):
            if name == "readline":
                raise KeyboardInterrupt
            return getattr(self._pipe, name)

    template._process.stdout = Interrupted(template._process.stdout)
    with pytest.raises(KeyboardInterrupt):
        template.render(TURNS)
    assert template.render(HELLO) == HELLO[0]["content"]


def test_jinja_may_be_where_only_the_environment_says(tmp_path):
    venv.create(tmp_path / "bare")
    program = "from parallax.tokenizers.chat_template import ChatTemplate; print(ChatTemplate('Hi', {}).render([]))"
    paths = [str(Path(parallax.__file__).parents[1]), str(Path(jinja2.__file__).parents[1])]
    done = subprocess.run(
        [tmp_path / "bare" / "bin" / "python", "-c", program],
        env={"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "Hi\n"


def test_variables():
    source = "{{ bos_token }}{{ tools | tojson }}{{ thinking }}{{ add_generation_prompt }}{{ messages[0] }}"
    template = ChatTemplate(source, {"bos_token": "<s>"})
    text = template.render(
        [{"role": "user", "content": "a", "name": None}], TOOLS, variables={"thinking": 3, "messages": 1, "self": 2}
    )
    assert text == f"<s>{json.dumps(TOOLS, ensure_ascii=False)}3False{{'role': 'user', 'content': 'a'}}"


def test_a_conversation_is_refused_in_the_words_of_the_template():
    with pytest.raises(ValueError, match=r"refuses the conversation \(roles must alternate\); change its messages"):
        ChatTemplate(LLAMA_2, {"bos_token": "<s>"}).render([*HELLO, *HELLO])


def test_tools_may_have_a_template_of_their_own():
    template = ChatTemplate("plain", {}, "tools")
    assert [template.render(HELLO, tools) for tools in (None, [], TOOLS)] == ["plain", "plain", "tools"]


def test_a_template_goes_to_other_processes():
    template = ChatTemplate(CHATML, {"eos_token": "</s>"})
    copy = pickle.loads(pickle.dumps(template))
    assert copy.render(SYSTEM) == template.render(SYSTEM)


def test_the_plain_form():
    template = plain_template(CharTokenizer("ab", has_eos=True))
    text = template.render([*SYSTEM, {"role": "assistant", "content": "Hi"}], add_generation_prompt=True)
    assert text == "System: Be brief. \nUser: Hello, who are you?\nAssistant: Hi<|endoftext|>\nAssistant:"
    assert plain_template(CharTokenizer("ab")).render(HELLO) == "User: Hello, who are you?\n"


def test_the_plain_form_of_a_folder_stops_where_the_user_would_go_on(tmp_path):
    write_chat_template(plain_template(ByteTokenizer()), tmp_path)
    assert read_chat_template(epath.Path(tmp_path), ByteTokenizer()).stops == ("\nUser:",)


@pytest.mark.parametrize("layout", ["a file", "in the config", "in the config, by name", "beside another"])
def test_where_models_keep_it(tmp_path, layout):
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "unk_token": None}
    tools = None if layout in ("a file", "in the config") else "tools"
    if layout == "in the config":
        config["chat_template"] = CHATML
    if layout == "in the config, by name":
        config["chat_template"] = [
            {"name": "default", "template": CHATML}, {"name": "tool_use", "template": "tools"},
            {"name": "rag", "template": "documents"},
        ]  # fmt: skip
    if layout in ("a file", "beside another"):
        (tmp_path / "chat_template.jinja").write_text(CHATML)
    if layout == "beside another":
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = read_chat_template(epath.Path(tmp_path), ByteTokenizer())
    (tmp_path / "copy").mkdir()
    write_chat_template(template, tmp_path / "copy")
    for each in (template, read_chat_template(epath.Path(tmp_path / "copy"), ByteTokenizer())):
        assert (each.source, each.with_tools) == (CHATML, tools)
        assert each.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_a_folder_may_have_none(tmp_path):
    assert read_chat_template(epath.Path(tmp_path), ByteTokenizer()) is None
    assert choose_template("", None, ByteTokenizer()) is None


@pytest.mark.parametrize("content", ["{", "[]", '{"chat_template": 3}'])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match="restore the model's files"):
        read_chat_template(epath.Path(tmp_path), ByteTokenizer())


def test_what_the_flag_means(tmp_path):
    own, tokenizer = ChatTemplate("own", {"bos_token": "<s>"}), ByteTokenizer()
    (tmp_path / "mine.jinja").write_text("{{ bos_token }}mine")
    texts = [choose_template(given, own, tokenizer).render(HELLO) for given in ("", "plain", f"{tmp_path}/mine.jinja")]
    assert texts == ["own", "User: Hello, who are you?\n", "<s>mine"]
    with pytest.raises(ValueError, match="must be a readable text"):
        choose_template(str(tmp_path / "none"), None, tokenizer)
    (tmp_path / "bad").write_text("{% for %}")
    with pytest.raises(ValueError, match="cannot be used"):
        choose_template(str(tmp_path / "bad"), None, tokenizer)
