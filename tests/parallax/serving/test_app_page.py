"""The page at / in a real browser: what a reader sees and does, against what the API says.

Invariant: each test ends with no complaint in the browser's console, where a broken Content-Security-Policy would show.
"""

import json
import math
import re
import shutil

import pytest

from parallax.training.metric_writers import SAMPLES_FILE
from tests.parallax.serving.browser import visiting
from tests.parallax.serving.server import LETTERS, eventually, serving

pytestmark = pytest.mark.external

PROMPT = "a bad☃"
OVERFLOW = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
NARROWEST = "return Math.min(...[...document.querySelectorAll('#config dd')].map(each => each.clientWidth))"
WATCH = """
window.steps = [];
new MutationObserver(() => steps.push(document.getElementById('text').children.length))
  .observe(document.getElementById('text'), {childList: true});
"""


@pytest.fixture(scope="module")
def served(small_run):
    many = ("--max-answers", "250", "--queue", "1000")
    with serving(small_run, "--capacity", "256", "--context", "extend", "--slots", "1", *many) as server:
        yield server


@pytest.fixture
def page(served, driver):
    with visiting(driver, served.address) as page:
        page.wait_until_ready()
        yield page
        assert page.driver.get_log("browser") == []


def answer(served, prompt, **fields):
    """What the page's request should give."""
    settings = {"max_tokens": 200, "temperature": 0.8, "seed": 1, "logprobs": 10} | fields
    return served.complete(prompt, **settings).choices[0]


def percent(logprob):
    return "< 0.1%" if math.exp(logprob) < 0.0005 else f"{100 * math.exp(logprob):.1f}%"


def test_a_prompt_is_continued_as_it_streams(served, page):
    page.run(WATCH)
    page.ask(PROMPT)
    expected = answer(served, PROMPT)
    assert page.text == PROMPT + expected.text
    steps = page.run("return steps")
    assert len(set(steps)) > 5  # it grew by and by
    assert re.fullmatch(r"\d+ tokens · \d+ a second, done", page.status)
    assert int(page.status.split()[0]) == len(expected.logprobs.tokens)


def test_colours_are_probabilities(served, page):
    page.ask(PROMPT)
    shares = page.run(
        "return [...document.querySelectorAll('.token:not(.prompt)')].map(t => +t.style.getPropertyValue('--p'))"
    )
    logprobs = answer(served, PROMPT).logprobs.token_logprobs
    assert shares == pytest.approx([math.exp(logprob) ** 0.5 for logprob in logprobs])
    colours = page.run(
        "return [...document.querySelectorAll('.token:not(.prompt)')].map(t => getComputedStyle(t).backgroundColor)"
    )
    assert len(set(colours)) > 3


def test_pointing_at_a_token_shows_its_alternatives_and_one_branches(served, page):
    page.ask(PROMPT)
    at = len(PROMPT) + 3
    before = page.text
    logprobs = answer(served, PROMPT).logprobs
    shown = page.hover(at)
    expected = [percent(logprob) for logprob in list(logprobs.top_logprobs[3].values())]
    assert [words.rpartition(", ")[2] for words in shown] == expected
    others = [rank for rank, spelling in enumerate(logprobs.top_logprobs[3]) if spelling != logprobs.tokens[3]]
    chosen = logprobs.top_token_ids[3][others[1]]
    page.all("#choices button")[others[1]].click()
    page.wait_until_done()
    ids = [*LETTERS.encode(PROMPT).tolist(), *logprobs.token_ids[:3], chosen]
    assert page.text == before[:at] + LETTERS.decode([chosen]) + answer(served, ids).text
    assert len(page.all(".token.chosen")) == 1
    page.one("#back").click()
    assert page.text == before


def test_the_keyboard_is_enough(served, page):
    from selenium.webdriver.common.keys import Keys

    page.one("#prompt").clear()
    page.one("#prompt").send_keys(PROMPT + Keys.CONTROL + Keys.ENTER)
    page.wait_until_done()
    before = page.text
    page.run("document.querySelector('#text .token').focus()")

    def press(key):
        page.driver.switch_to.active_element.send_keys(key)

    for _ in range(len(PROMPT)):
        press(Keys.ARROW_RIGHT)
    press(Keys.ARROW_DOWN)
    press(Keys.ARROW_DOWN)
    second = page.driver.switch_to.active_element.get_attribute("aria-label")
    assert second.startswith("Go on with ")
    press(Keys.ESCAPE)
    assert page.driver.switch_to.active_element.get_attribute("role") == "button"
    press(Keys.ARROW_DOWN)
    press(Keys.ARROW_DOWN)
    press(Keys.ENTER)
    page.wait_until_done()
    top = answer(served, PROMPT).logprobs.top_token_ids[0]
    assert page.text.startswith(PROMPT + LETTERS.decode([top[1]]))
    assert page.text != before


def test_a_slider_changes_the_request(served, page):
    from selenium.webdriver.common.keys import Keys

    page.one("#temperature").send_keys(Keys.HOME)
    page.one("#max_tokens-number").send_keys(Keys.CONTROL + "a" + Keys.NULL + "30" + Keys.TAB)
    assert page.one("#temperature-number").get_attribute("value") == "0"
    assert page.one("#max_tokens").get_attribute("value") == "30"
    page.ask(PROMPT)
    assert page.text == PROMPT + answer(served, PROMPT, temperature=0, max_tokens=30).text
    page.one("#more").click()
    page.wait_until_done()
    assert page.text == PROMPT + answer(served, PROMPT, temperature=0, max_tokens=60).text


def test_stop_gives_the_slot_back(served, page):
    fields = {"model": served.model, "prompt": "a", "max_tokens": 250, "n": 250, "stream": True}
    with served.http.stream("POST", "/v1/completions", json=fields):  # holds the only slot
        page.one("#prompt").send_keys("a")
        page.one("#go").click()
        page.wait(lambda: page.one("#stop").is_enabled())
        page.one("#stop").click()
        page.wait(lambda: page.status == "0 tokens, stopped")
    assert eventually(served.is_idle)


def test_what_the_server_refuses_is_said(page):
    page.one("#prompt").send_keys("9")
    page.one("#go").click()
    page.wait(lambda: "is not among the" in page.status)
    complaints = [entry["message"] for entry in page.driver.get_log("browser")]  # Chromium notes each status 400
    assert len(complaints) == 1
    assert "400" in complaints[0]


def test_dark_and_small_screens(page):
    def brightness(element):
        colour = page.run("return getComputedStyle(arguments[0]).backgroundColor", page.one(element))
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    page.ask(PROMPT)
    page.colours("light")
    light = brightness("body")
    page.colours("dark")
    assert brightness("body") < 150 < 600 < light
    for width in (380, 320):
        page.size(width, 800, mobile=True)
        assert page.run(OVERFLOW) <= 0  # nothing that was open stays where it was
        for index in (len(PROMPT), len(page.all("#text .token")) - 1):
            page.hover(index)
            assert page.run(OVERFLOW) <= 0
            box, button = page.one("#choices").rect, page.all("#choices button")[-1].rect
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert button["width"] > 100


def test_the_run_is_shown(page):
    assert "Loss over 9 steps" in page.one("#loss svg").get_attribute("aria-label")
    assert len(page.all("#loss polyline")) == 2
    page.one("aside details:not(#kept) summary").click()
    assert "embed_dim" in page.one("#config").text
    assert page.run(NARROWEST) > 40  # no value is squeezed to a letter a line
    assert not page.one("#kept").is_displayed()


def test_samples_of_the_last_evaluation_are_shown(small_run, tmp_path, driver):
    """Text as text, whatever it spells."""
    run = shutil.copytree(small_run, tmp_path / "sampled")
    texts = {"To be": " or <b>not</b>", "Who?": " It is I"}
    rows = [
        json.dumps({"step": step, "prompt": prompt, "text": f"{text} {step}"}) + "\n"
        for step in (3, 6)
        for prompt, text in texts.items()
    ]
    (run / SAMPLES_FILE).write_text("".join(rows))
    with serving(run) as server, visiting(driver, server.address) as page:
        page.wait_until_ready()
        page.one("#kept summary").click()
        shown = page.run("return [...document.querySelectorAll('#samples > *')].map(each => each.textContent)")
        assert shown == ["To be", " or <b>not</b> 6", "Who?", " It is I 6"]
        assert page.one("#samples").is_displayed()
        assert page.driver.get_log("browser") == []


def test_a_key_is_asked_for(small_run, driver):
    with serving(small_run, key="a-long-secret") as server, visiting(driver, server.address) as page:
        page.wait(lambda: page.one("#unlock").is_displayed())
        assert not page.one("#go").is_enabled()
        page.one("#key").send_keys("a-long-secret\n")
        page.wait_until_ready()
        assert not page.one("#unlock").is_displayed()
        page.ask(PROMPT)
        assert page.text.startswith(PROMPT)
