"""Takes the pictures of the page that docs/serve.md shows: `python tests/support/page_pictures.py`.

Chromium opens the page of a server with the embedded model, sends a document, asks, and opens a passage. playwright and
Chromium must be installed. It takes some minutes.
"""

import io
import shutil
import tempfile
from pathlib import Path

from live_server import live_server
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from headinfer.embedded import embedded_text
from headinfer.serve.service import Service
from headinfer.serve.settings import ServeSettings

FOLDER = Path(__file__).parents[2] / "docs" / "images"
NEEDLES = (("miroka", 48213), ("delusi", 90177), ("bonare", 31586))
QUESTION = "What is the magic number for {}?"
CHARACTERS = 80_000
SCREENS = {
    "page": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light", "reduced_motion": "reduce"},
    "page-phone": {"viewport": {"width": 375, "height": 760}, "color_scheme": "dark", "has_touch": True},
}


def document() -> str:
    """A chapter or two with some facts in it."""
    text = embedded_text()[:CHARACTERS]
    for index, (word, number) in enumerate(NEEDLES, start=1):
        at = text.index(". ", index * len(text) // (len(NEEDLES) + 1)) + 2
        text = f"{text[:at]}The magic number for {word} is {number}. {text[at:]}"
    return text


def take(page: Page, name: str) -> None:
    """Ask two questions, open the first passage of the last answer, and take a picture."""
    page.get_by_role("radio", name="moby-dick.txt").check(force=True)
    for turn, (word, _) in enumerate(NEEDLES[:2], start=1):
        page.fill("#question", QUESTION.format(word))
        page.keyboard.press("Enter")
        page.locator(f".turn:nth-child({turn}) .source").first.wait_for(timeout=120_000)
    page.locator(".turn").last.locator(".source").first.click()
    page.locator(".reader mark").wait_for()
    page.mouse.move(0, 0)
    if name == "page-phone":
        page.locator(".where").scroll_into_view_if_needed()
        page.locator(".where").evaluate("where => where.scrollIntoView()")
    picture = Image.open(io.BytesIO(page.screenshot()))
    picture.quantize(128).save(FOLDER / f"{name}.png", optimize=True)


def main() -> None:
    """Take all pictures."""
    FOLDER.mkdir(exist_ok=True)
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with (
        tempfile.TemporaryDirectory() as root,
        Service(ServeSettings(model="embedded", root=Path(root), device="cpu")) as service,
        live_server(service) as url,
        sync_playwright() as driver,
    ):
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, screen in SCREENS.items():
            page = browser.new_context(**screen).new_page()
            page.goto(url)
            if not service.documents():
                file = {"name": "moby-dick.txt", "mimeType": "text/plain", "buffer": document().encode()}
                page.set_input_files("#files", files=[file])
                page.locator(".row[data-state=ready]").wait_for(timeout=300_000)
            page.locator(".row[data-state=ready]").wait_for()
            take(page, name)
        browser.close()


if __name__ == "__main__":
    main()
