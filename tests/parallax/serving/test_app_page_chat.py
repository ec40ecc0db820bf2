"""The page's chat in a real browser, against what the API says."""

import pytest

from parallax.tokenizers.chat_template import ChatTemplate, write_chat_template
from parallax.tokenizers.plain import ByteTokenizer
from tests.parallax.serving.browser import visiting
from tests.parallax.serving.server import eventually, serving, write_run
from tests.parallax.tokenizers.chats import CHATML

pytestmark = pytest.mark.external
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("chat") / "talker", ByteTokenizer())
    write_chat_template(ChatTemplate(CHATML.replace("<|im_start|>", "[").replace("<|im_end|>", "]"), {}), folder)
    with serving(folder, "--capacity", "256", "--context", "extend", "--slots", "1") as server:
        yield server


@pytest.fixture
def page(served, driver):
    with visiting(driver, served.address) as page:
        page.wait_until_ready()
        page.one("input[value=chat]").click()
        page.run("for (const id of ['max_tokens', 'max_tokens-number']) document.getElementById(id).value = 12")
        yield page
        assert page.driver.get_log("browser") == []


def answer(served, *turns, system="", seed=1):
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": content} for role, content in zip(roles, turns, strict=False)]
    if system:
        messages.insert(0, {"role": "system", "content": system})
    fields = {"messages": messages, "max_tokens": 12, "temperature": 0.8, "seed": seed}
    return served.openai.chat.completions.create(model=served.model, **fields).choices[0].message.content


def turns(page):
    return page.run("return [...document.querySelectorAll('.said')].map(each => each.textContent)")


def say(page, text):
    from selenium.webdriver.common.keys import Keys

    page.one("#message").send_keys(text + Keys.ENTER)
    finished(page)


def finished(page):
    page.wait(lambda: page.one("#chat-status").text == "done")


def test_turns_answer_each_other(served, page):
    say(page, "Hello")
    first = answer(served, "Hello")
    assert turns(page) == ["Hello", first]
    say(page, "And?")
    assert turns(page) == ["Hello", first, "And?", answer(served, "Hello", first, "And?")]
    page.one("#fresh").click()
    assert turns(page) == []


def test_a_system_prompt(served, page):
    page.one("#chat summary").click()
    page.one("#system").send_keys("Be brief.")
    say(page, "Hi")
    assert turns(page)[1] == answer(served, "Hi", system="Be brief.")


def test_an_answer_is_given_again_and_a_turn_is_edited(served, page):
    from selenium.webdriver.common.keys import Keys

    say(page, "Hello")
    page.one("#again").click()
    finished(page)
    page.wait(lambda: turns(page)[1] == answer(served, "Hello", seed=2))
    say(page, "More")
    page.one(".edit").click()
    page.driver.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert len(turns(page)) == 4
    page.one(".edit").send_keys(Keys.ENTER)
    assert page.driver.switch_to.active_element.get_attribute("aria-label") == "Turn 1"
    page.driver.switch_to.active_element.send_keys("!" + Keys.ENTER)
    finished(page)
    page.wait(lambda: turns(page) == ["Hello!", answer(served, "Hello!")])
    assert page.driver.switch_to.active_element.get_attribute("id") == "message"


def test_stop_gives_the_slot_back(served, page):
    fields = {"model": served.model, "prompt": "a", "max_tokens": 200, "n": 32, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=fields):  # holds the only slot
        page.one("#message").send_keys("Hello")
        page.one("#send").click()
        page.wait(lambda: page.one("#halt").is_enabled())
        page.one("#halt").click()
        page.wait(lambda: page.one("#chat-status").text == "stopped")
    assert turns(page) == ["Hello"]
    assert eventually(served.is_idle)
    page.one("#again").click()
    finished(page)
    assert len(turns(page)) == 2


def test_a_turn_is_edited_while_its_answer_is_under_way(served, page):
    from selenium.webdriver.common.keys import Keys

    say(page, "Hello")
    fields = {"model": served.model, "prompt": "a", "max_tokens": 200, "n": 32, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=fields):  # holds the only slot
        page.one("#message").send_keys("More" + Keys.ENTER)
        page.wait(lambda: page.one("#halt").is_enabled())
        page.one("#message").send_keys("Too early" + Keys.ENTER)
        assert (len(turns(page)), page.one("#message").get_attribute("value")) == (4, "Too early")
        page.one(".edit").click()
        page.wait(lambda: page.one("#chat-status").text == "stopped")
        assert page.driver.switch_to.active_element.get_attribute("aria-label") == "Turn 1"
    page.driver.switch_to.active_element.send_keys("!" + Keys.ENTER)
    finished(page)
    assert turns(page) == ["Hello!", answer(served, "Hello!")]


def test_what_the_server_refuses_is_said(page):
    page.run("document.getElementById('message').value = 'a'.repeat(400)")
    page.one("#send").click()
    page.wait(lambda: "must not exceed" in page.one("#chat-status").text)
    complaints = [entry["message"] for entry in page.driver.get_log("browser")]  # Chromium notes each status 400
    assert len(complaints) == 1


def test_small_screens_and_the_other_mode(served, page):
    say(page, "Hello" * 20)
    for width in (380, 320):
        page.size(width, 800, mobile=True)
        assert page.run(OVERFLOW) <= 0
    page.one(".edit").click()
    assert page.run(OVERFLOW) <= 0
    page.one("input[value=continue]").click()
    assert not page.one("#turns").is_displayed()
    page.ask("ab")
    assert page.text.startswith("ab")


def test_a_model_without_a_template_does_not_chat(small_run, driver):
    with serving(small_run) as server, visiting(driver, server.address) as page:
        page.wait_until_ready()
        assert not page.one("#modes").is_displayed()
