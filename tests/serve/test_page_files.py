"""The files of the page, without a browser: nothing foreign, nothing inline, no text as markup, enough contrast."""

import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from scripted_service import ScriptedService
from starlette.routing import Match

import headinfer
from headinfer.serve.access import Access
from headinfer.serve.app import build_app

ROOT = Path(__file__).parents[2]
PAGE = Path(headinfer.__file__).parent / "serve" / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir()) if path.is_file()}
SCRIPTS = [name for name in FILES if name.endswith(".js")]
HTML = FILES["index.html"]
CSS = FILES["page.css"]
NAMESPACE = 'xmlns="http://www.w3.org/2000/svg"'  # a name, which no browser fetches


class Elements(HTMLParser):
    """All start tags of an HTML text, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


TAGS = Elements(HTML).tags
IDS = [attributes["id"] for _, attributes in TAGS if "id" in attributes]


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_another_host(name):
    text = FILES[name].replace(NAMESPACE, "")
    assert not re.search(r"""(?:[a-z]+:)//|["'(]//""", text, re.IGNORECASE)
    assert not re.search(r"@import|url\(|\bdata:[a-z]+/|\bwss?:|sendBeacon|WebSocket|EventSource", text)


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_or_code_of_text(name):
    words = (
        "innerHTML|outerHTML|insertAdjacentHTML|setHTML|parseHTML|srcdoc|DOMParser|createContextualFragment|execCommand"
        r"|document\.write|\beval\b|\bFunction\(|javascript:|import\(|cssText"
    )
    assert not re.search(words, FILES[name])
    assert not re.search(r"""\bset(Timeout|Interval)\(\s*["'`]""", FILES[name])


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_sets_an_attribute_that_the_policy_forbids(name):
    """Under "default-src 'self'" a style is set by properties, and a listener by a function."""
    assert not re.search(r"""setAttribute\(\s*["'](style|on\w+)|\bstyle:""", FILES[name])


def test_the_page_has_no_inline_script_style_or_listener():
    assert "<style" not in HTML
    for tag, attributes in TAGS:
        assert not [name for name in attributes if name == "style" or name.startswith("on")], (tag, attributes)
        assert tag != "script" or attributes["src"].startswith("/page/")
    assert not re.search(r"<script[^>]*>[^<]", HTML)


def test_all_files_that_the_page_loads_exist_and_all_are_loaded():
    wanted = {value for _, attributes in TAGS for key in ("src", "href") if (value := attributes.get(key, ""))}
    named = {path.removeprefix("/page/") for path in wanted if path.startswith("/page/")}
    for name in SCRIPTS:
        named |= set(re.findall(r'from "\./([\w.]+)"', FILES[name]))
    assert named | {"index.html"} == set(FILES)


def test_all_addresses_that_the_page_asks_for_exist():
    """Calls in api.js: json(path, {method: ...}), request(path, ...) and exchange.open(method, path)."""
    text = FILES["api.js"]
    text = text.replace("${encodeURIComponent(name)}", "NAME").replace("${file(name)}", "/v1/files/NAME")
    text = text.replace("file(name)", "`/v1/files/NAME`").replace("${range}", "?start=0&stop=9")
    calls = re.findall(r"""(?:json|request)\(\s*["`](/v1/[^"`]*)["`](?:,\s*\{\s*method: "(\w+)")?""", text)
    calls += [(path, method) for method, path in re.findall(r"""open\("(\w+)", "([^"]*)"\)""", text)]
    assert len(calls) == 7
    assert {path for path, _ in calls} == set(re.findall(r"/v1/[\w/?=&]+", text))
    assert not [name for name in SCRIPTS if name != "api.js" and re.search(r"/v1/|fetch\(|XMLHttp", FILES[name])]
    routes = build_app(ScriptedService(), Access()).router.routes
    for path, method in calls:
        scope = {"type": "http", "path": path.split("?")[0], "root_path": "", "method": method or "GET"}
        assert Match.FULL in [route.matches(scope)[0] for route in routes], (method, path)


def test_all_elements_that_are_named_exist_once():
    assert len(IDS) == len(set(IDS))
    icons = {name for name in IDS if name.startswith("icon-")}
    made = re.findall(r'icon\("(\w+)"\)', "".join(FILES.values()))
    used = re.findall(r'href="#(icon-\w+)"', HTML)
    named = {f"icon-{name}" for name in made} | set(used)
    assert named == icons
    for name in SCRIPTS:
        assert set(re.findall(r'byId\("([\w-]+)"\)', FILES[name])) <= set(IDS), name
    for _, attributes in TAGS:
        for key in ("for", "aria-labelledby", "aria-describedby"):
            assert attributes.get(key) is None or attributes[key] in IDS, attributes


def test_all_controls_have_names():
    labelled = {attributes.get("for") for tag, attributes in TAGS if tag == "label"}
    for tag, attributes in TAGS:
        if tag in ("input", "textarea") and attributes.get("type") != "checkbox":
            assert attributes["id"] in labelled
    assert TAGS[0] == ("html", {"lang": "en"})


def test_the_page_is_installed_with_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["headinfer"]
    for name in FILES:
        assert any(fnmatch(f"serve/page/{name}", pattern) for pattern in patterns), name


def test_scripts_and_styles_have_short_lines_and_say_what_they_do():
    for name, text in FILES.items():
        if name.endswith((".js", ".css", ".html")):
            lines = text.splitlines()
            assert max(map(len, lines)) <= 120, (name, max(lines, key=len))
        if name.endswith(".js"):
            assert len(lines) <= 500
            assert text.startswith("// ")


# -- colours -----------------------------------------------------------------------------------------------------------


def colours(text):
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", text))


LIGHT = colours(CSS.split("@media")[0])
DARK = LIGHT | colours(CSS.split("@media")[1])


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_colours_have_the_contrast_of_wcag_aa(scheme):
    """WCAG 2.2: 4.5 for text (1.4.3), 3 for the borders of controls and for what graphics show (1.4.11)."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for text in ("ink", "quiet", "accent", "warning"):
        for ground in ("paper", "surface", "sunken"):
            assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
    for text, ground in (
        ("ink", "tint"),
        ("accent", "tint"),
        ("warning", "tint"),
        ("on-accent", "accent"),
        ("on-warning", "warning"),
        ("warning", "warning-tint"),
    ):
        assert contrast(scheme[text], scheme[ground]) >= 4.5, (text, ground)
    for ground in ("paper", "surface"):
        assert contrast(scheme["control"], scheme[ground]) >= 3, ground


def test_no_rule_has_a_colour_of_its_own():
    rules = re.sub(r"--[\w-]+: [^;]*;", "", CSS)
    assert not re.search(r"#[0-9a-f]{3,8}\b(?!-)", re.sub(r"#[a-z][\w-]*", "", rules))
