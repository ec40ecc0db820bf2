"""Takes the picture of the page that the README shows: `python tests/claims/page_picture.py RUN docs/page.png`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.parallax.serving.browser import browsing
from tests.parallax.serving.server import serving

PROMPT = "ROMEO:\n"
UNSURE = 0.45
TOKENS = """return [...document.querySelectorAll('.token')].map(
  (token) => [+token.style.getPropertyValue('--p'), token.textContent, token.getBoundingClientRect().left])"""
SET = "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('input'));"


def take_picture(run: Path, picture: Path) -> None:
    """A continuation, with the alternatives to a token of which the model was not sure."""
    with serving(run, "--capacity", "512") as server, browsing(server.address) as page:
        page.wait_until_ready()
        page.size(1200, 800)
        page.run(SET, "max_tokens", 320)
        page.ask(PROMPT)
        # The alternatives stand below and to the right of their token: of a token far right, they hide little text.
        unsure = [place for place in enumerate(page.run(TOKENS)) if place[1][0] < UNSURE and place[1][1].strip()]
        page.hover(max(unsure, key=lambda place: place[1][2])[0])
        page.driver.save_screenshot(str(picture))


if __name__ == "__main__":
    take_picture(Path(sys.argv[1]), Path(sys.argv[2]))
