"""The page in a real Chromium: documents, questions, passages, the keyboard, small screens, and hostile texts.

Most tests use the server over a scripted service, so that a test can say what is answered. No test depends on how long
something takes: each waits for what it expects.
"""

import json
import re
import shutil

import pytest
from live_server import live_server
from page_service import PageService, passage

from headinfer.errors import UsageError
from headinfer.serve.access import Access
from headinfer.serve.events import Prefill
from headinfer.serve.service import Service
from headinfer.serve.settings import ServeSettings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
WORDS = "It was the best of times, it was the worst of times, it was the age of wisdom. "
FACT = "The magic number for miroka is 48213."
TEXT = WORDS * 100 + "🐋 " + FACT + " " + WORDS * 60
QUESTION = "What is the magic number for miroka?"
FILES = (("one.txt", WORDS), ("empty.txt", ""), ("two.txt", WORDS))
HOSTILE = "<img src=x onerror=\"window.hit='img'\"><script>window.hit='script'</script>&amp;{{7*7}}"

pytestmark = pytest.mark.browser


def passages(text):
    at = text.find(FACT)
    return (
        passage(text, at, at + len(FACT), 0.62),
        passage(text, 0, 79, 0.2),
        passage(text, len(text) - 100, len(text), 0.004),
    )


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, which is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Pages:
    """Opens pages, and collects what must not happen: messages of the console, and requests to other hosts."""

    def __init__(self, browser):
        self.browser = browser
        self.contexts = []
        self.problems = []

    def open(self, url, **options):
        context = self.browser.new_context(**{"viewport": {"width": 1300, "height": 800}, **options})
        self.contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: self.problems.append(message.text))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        context.on("request", lambda request: request.url.startswith(url) or self.problems.append(request.url))
        page.goto(url)
        return page

    def close(self):
        while self.contexts:
            self.contexts.pop().close()


@pytest.fixture
def pages(browser):
    pages = Pages(browser)
    yield pages
    pages.close()
    assert pages.problems == []


@pytest.fixture(scope="module")
def served():
    service = PageService()
    with live_server(service) as address:
        service.url = f"{address}/"
        yield service


@pytest.fixture
def server(served):
    """The scripted service behind a server, with no documents."""
    served.reset()
    served.passages = passages
    return served


def drop(page, name, text):
    """Drop a file on the page, as a browser does it."""
    data = page.evaluate_handle(
        """([name, text]) => {
            const data = new DataTransfer();
            data.items.add(new File([text], name, {type: "text/plain"}));
            return data;
        }""",
        [name, text],
    )
    for event in ("dragenter", "dragover"):
        page.dispatch_event("main", event, {"dataTransfer": data})
    assert page.locator("body.is-dropping").count() == 1
    page.dispatch_event("main", "drop", {"dataTransfer": data})
    assert page.locator("body.is-dropping").count() == 0


def ask(page, question=QUESTION):
    page.fill("#question", question)
    page.keyboard.press("Enter")


def contents(server):
    """The messages of the last question."""
    return [message["content"] for message in server.asked[-1].messages]


def row(page, state):
    return page.locator(f".row[data-state={state}]")


def test_drop_read_ask_see_the_passage_reload_and_delete(pages, server):
    page = pages.open(server.url)
    assert page.title() == "headinfer"
    page.get_by_text("Drop a document here").wait_for()

    drop(page, "book.txt", TEXT)
    row(page, "reading").wait_for()
    assert re.search(r"Reading, 50 % · about 12 s left · 1,\d+ of 3,\d+ tokens", row(page, "reading").inner_text())
    assert row(page, "reading").locator("progress").evaluate("bar => bar.value") == pytest.approx(0.5, abs=0.01)
    row(page, "ready").wait_for()
    assert page.get_by_role("radio", name="book.txt").is_checked()

    ask(page)
    page.locator(".source").first.wait_for()
    assert page.locator(".answer").inner_text() == "The magic number is 60732."
    assert page.locator("#announce").inner_text() == "The magic number is 60732."  # for screen readers
    assert "8,201 of 8,234 prompt tokens were read before" in page.locator(".turn-facts").inner_text()
    assert server.asked[-1].session in server.stored
    assert server.asked[-1].where
    assert contents(server) == [QUESTION]

    assert page.locator(".passage-share").all_inner_texts() == ["62 %", "20 %", "< 1 %"]
    strip = page.locator("#strip").bounding_box()
    band = page.locator(".band").first.bounding_box()
    assert (band["y"] - strip["y"]) / strip["height"] == pytest.approx(TEXT.find(FACT) / len(TEXT), abs=0.02)
    page.locator(".band").first.click()
    mark = page.locator(".reader mark")
    mark.wait_for()
    assert mark.inner_text() == FACT  # characters are counted as Python counts them, also after a whale
    reader = page.locator(".reader-text")
    at = TEXT.find(FACT)
    assert reader.text_content() == TEXT[at - 800 : at + len(FACT) + 800]
    page.get_by_role("button", name="Earlier").click()
    page.get_by_text(f"Characters {at - 3800:,} to").wait_for()
    assert reader.text_content() == TEXT[at - 3800 : at + len(FACT) + 800]

    ask(page, "And again?")
    page.locator(".turn:nth-child(2) .source").first.wait_for()
    assert contents(server) == [QUESTION, "The magic number is 60732.", "And again?"]

    page.reload()
    page.locator(".turn:nth-child(2) .source").first.wait_for()
    assert page.locator(".question").all_inner_texts() == [QUESTION, "And again?"]
    page.locator(".source").first.click()
    mark.wait_for()
    assert mark.inner_text() == FACT

    page.get_by_role("button", name="Delete book.txt").click()
    page.get_by_role("button", name="Cancel").click()
    assert server.stored
    page.get_by_role("button", name="Delete book.txt").click()
    page.get_by_role("button", name="Delete", exact=True).click()
    page.get_by_text("Drop a document here").wait_for()
    assert not server.stored
    assert page.evaluate("Object.keys(localStorage).filter(key => key.includes('history'))") == []


def test_with_a_model(pages, tmp_path):
    """The whole server: the embedded model reads a document, answers, and says where the answer came from."""
    text = WORDS * 20 + FACT + " " + WORDS * 10
    with Service(ServeSettings(model="embedded", root=tmp_path, device="cpu")) as service, live_server(service) as url:
        page = pages.open(f"{url}/")
        drop(page, "book.txt", text)
        row(page, "ready").wait_for()
        ask(page)
        page.locator(".source").first.click()
        assert page.locator(".answer").inner_text() == FACT
        assert FACT in page.locator(".reader mark").inner_text()
        assert page.locator(".reader-text").text_content() in text
        page.get_by_role("button", name="Delete book.txt").click()
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_text("Drop a document here").wait_for()
        assert service.documents() == []
        pages.close()


def test_everything_with_the_keyboard(pages, server):
    server.add("book.txt", TEXT)
    page = pages.open(server.url)
    page.get_by_role("radio", name="book.txt").wait_for()

    def focus():
        return page.evaluate(
            """() => {
                const at = document.activeElement;
                const ring = [at, ...document.querySelectorAll(":has(:focus-visible), #files:focus-visible + label")];
                const isSeen = ring.some((one) => parseFloat(getComputedStyle(one).outlineWidth) > 0
                    && getComputedStyle(one).outlineStyle !== "none");
                return [at.getAttribute("aria-label") ?? at.labels?.[0]?.innerText ?? at.innerText, isSeen];
            }"""
        )

    def tab_to(start):
        """Press Tab until the name of the control in focus begins like this; each control on the way shows focus."""
        for _ in range(30):
            page.keyboard.press("Tab")
            name, is_seen = focus()
            assert is_seen, name
            if name.strip().startswith(start):
                return
        raise AssertionError(f"Tab never reaches {start}")

    tab_to("Skip to the question")
    tab_to("Add documents")
    tab_to("No document")
    page.keyboard.press("ArrowDown")
    assert page.get_by_role("radio", name="book.txt").is_checked()
    tab_to("Delete book.txt")
    tab_to("Question about book.txt")
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines?")
    page.keyboard.press("Enter")
    page.locator(".source").first.wait_for()
    assert contents(server) == ["Two\nlines?"]
    tab_to("Send earlier")
    tab_to("Ask")
    tab_to("Passage 1")
    page.keyboard.press("Enter")
    page.locator(".reader mark").wait_for()
    assert page.locator(".passage-head").first.get_attribute("aria-expanded") == "true"
    tab_to("Text around passage 1")
    tab_to("Later")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    assert page.locator(".passage-head").first.get_attribute("aria-expanded") == "false"

    page.locator("body").press("Home")
    page.get_by_role("radio", name="book.txt").focus()
    tab_to("Delete book.txt")
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for()
    tab_to("Delete")
    page.keyboard.press("Enter")
    page.get_by_text("Drop a document here").wait_for()
    page.wait_for_function("document.activeElement.type === 'radio'")
    assert not server.stored


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_in_both_schemes(pages, server, scheme):
    server.add("a-very-long-file-name-without-any-space-in-it-" * 4 + ".txt", TEXT)
    server.add("failed.pdf", "x", status="failed", error="The file is no PDF: give another one.")
    page = pages.open(
        server.url, viewport={"width": 375, "height": 700}, color_scheme=scheme, reduced_motion="reduce", has_touch=True
    )

    def fits():
        return page.evaluate("document.documentElement.scrollWidth") <= 375

    page.get_by_text("The file is no PDF: give another one.").wait_for()
    assert fits()
    page.get_by_role("radio", name="a-very-long").check(force=True)
    ask(page, "unbroken" * 40)
    page.locator(".source").first.wait_for()
    page.locator(".source").first.tap()
    page.locator(".reader mark").wait_for()
    assert fits()
    page.get_by_role("button", name="Clear history").click()
    assert fits()
    box = page.locator("dialog[open]").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 375
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper))) > 384) == (scheme == "light")
    moving = (
        "[...document.querySelectorAll('*')].filter(one => getComputedStyle(one).transitionDuration !== '0s').length"
    )
    assert page.evaluate(moving) == 0


def test_several_files_of_which_one_is_refused(pages, server):
    page = pages.open(server.url)
    page.get_by_text("Drop a document here").wait_for()
    files = [{"name": name, "mimeType": "text/plain", "buffer": text.encode()} for name, text in FILES]
    page.set_input_files("#files", files=files)
    page.locator(".upload .row-facts", has_text="empty.txt is empty: add a file with text").wait_for()
    for name in ("one.txt", "two.txt"):
        page.get_by_role("radio", name=name).wait_for()
    page.get_by_role("button", name="Close the message about empty.txt").click()
    assert page.locator(".upload").count() == 0
    assert all("400" in problem for problem in pages.problems)
    pages.problems.clear()


def test_texts_are_never_markup(pages, server):
    text = HOSTILE + TEXT
    server.answer = (HOSTILE, " is the answer")
    server.passages = lambda text: (passage(text, 0, len(HOSTILE), 1.0, HOSTILE),)
    server.add("failed.txt", "x", status="failed", error=HOSTILE)
    page = pages.open(server.url)
    drop(page, HOSTILE.replace("/", "-"), text)
    row(page, "ready").wait_for()
    ask(page, HOSTILE)
    page.locator(".source").first.click()
    page.locator(".reader mark").wait_for()
    assert page.locator(".question").inner_text() == HOSTILE
    assert page.locator(".answer").inner_text() == HOSTILE + " is the answer"
    assert page.locator(".reader mark").inner_text() == HOSTILE
    assert HOSTILE in page.locator(".passage-place").inner_text()
    assert HOSTILE in row(page, "failed").inner_text()
    server.figures = {"model": HOSTILE}
    page.locator("#model", has_text=HOSTILE).wait_for()
    page.reload()
    page.locator(".source").first.wait_for()
    assert page.locator(".answer").inner_text() == HOSTILE + " is the answer"
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 1
    assert page.locator("script").count() == 1


def test_answers_with_light_markup(pages, server):
    answer = "# A *b*\n\nOne **two `3*4`**\nnext 2 * 3 * 4\n- a\n  more\n  - b\n- c\n7. x\n> q\n\n```py\nx = '<b>'\n"
    shown = (
        "<h4>A <em>b</em></h4><p>One <strong>two <code>3*4</code></strong>\nnext 2 * 3 * 4</p>"
        "<ul><li>a\nmore<ul><li>b</li></ul></li><li>c</li></ul>"
        '<ol start="7"><li>x</li></ol><blockquote><p>q</p></blockquote>'
        "<pre tabindex=\"0\"><code>x = '&lt;b&gt;'\n</code></pre>"
    )
    server.answer = tuple(answer)  # letter by letter
    page = pages.open(server.url)
    page.get_by_text("Drop a document here").wait_for()
    ask(page)
    page.locator(".turn-facts", has_text="12 tokens").wait_for()
    assert page.locator(".answer").evaluate("answer => answer.innerHTML") == shown
    ask(page, "And?")
    page.locator(".turn:nth-child(2) .turn-facts", has_text="12 tokens").wait_for()
    assert contents(server)[1] == answer  # the model gets what it wrote


def test_progress_while_reading_and_stop(pages, server):
    server.add("book.txt", TEXT)
    server.prefill = (Prefill(34000, 120000, 80.0),)
    server.may_answer.clear()
    page = pages.open(server.url)
    page.get_by_role("radio", name="book.txt").check(force=True)
    ask(page)
    page.get_by_text("Reading 34,000 of 120,000 tokens · about 1 min 20 s left").wait_for()
    assert page.locator("#announce").inner_text() == "25 % has been read · about 1 min 20 s left"
    assert page.locator(".turn").get_attribute("aria-busy") == "true"
    page.get_by_role("radio", name="No document").check(force=True)  # the answer goes on
    assert page.locator(".turn").count() == 0
    page.get_by_role("radio", name="book.txt").check(force=True)
    page.get_by_role("button", name="Stop").click()
    page.locator(".turn-facts", has_text="Stopped.").wait_for()
    assert page.get_by_role("button", name="Ask").is_visible()
    assert page.locator(".turn").get_attribute("aria-busy") is None
    assert page.evaluate("document.activeElement.id") == "question"
    assert server.works[-1].cancelled.wait(30)  # the server has noticed that nobody listens


def test_a_key_is_asked_for_and_kept_only_in_this_tab(pages, server):
    server.add("book.txt", TEXT)
    with live_server(server, Access(keys=("a secret",))) as address:
        page = pages.open(f"{address}/")
        page.get_by_label("Key", exact=True).fill("wrong")
        page.keyboard.press("Enter")
        page.get_by_text("The server refused this key.").wait_for()
        page.get_by_label("Key", exact=True).fill("a secret")
        page.keyboard.press("Enter")
        page.get_by_role("radio", name="book.txt").wait_for()
        assert page.locator("dialog[open]").count() == 0
        drop(page, "other.txt", TEXT)
        page.get_by_role("radio", name="other.txt").wait_for()
        page.reload()
        page.get_by_role("radio", name="other.txt").wait_for()
        kept = page.evaluate("[JSON.stringify(localStorage), JSON.stringify(sessionStorage)]")
        pages.close()
    assert "a secret" not in kept[0]
    assert json.loads(kept[1]) == {"headinfer.key": "a secret"}
    assert len(pages.problems) == 2  # the browser notes both answers of 401
    assert all("401" in problem for problem in pages.problems)
    pages.problems.clear()


def test_errors_are_shown_as_the_servers_sentence(pages, server):
    server.error = UsageError(
        "the prompt has 3,000,000 tokens, but this model reads 1,048,576: ask about a shorter text"
    )
    page = pages.open(server.url)
    page.get_by_text("Drop a document here").wait_for()
    ask(page, "Why?")
    page.locator(".turn-error", has_text=str(server.error)).wait_for()
    assert server.asked[-1].session is None
    server.error = None
    ask(page, "Why not?")
    page.locator(".answer", has_text="The magic number is 60732.").wait_for()
    assert contents(server) == ["Why not?"]
    assert all("400" in problem for problem in pages.problems)

    page.context.set_offline(True)
    page.get_by_text("No answer from the server, trying again").wait_for()
    ask(page, "Are you there?")
    page.locator(".turn-error", has_text="The server does not answer. Check that it is running.").wait_for()
    page.context.set_offline(False)
    page.locator("#connection", has_text="Idle").wait_for()
    pages.problems.clear()
