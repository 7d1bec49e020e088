"""Makes text of the bytes of a file: plain text in any encoding that can be told, PDF, HTML, EPUB and DOCX.

Plain text in UTF-8, UTF-16 and UTF-32 needs nothing. Everything else needs the extra `headinfer[documents]`.
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import posixpath
import re
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.parsers.expat import ExpatError

from headinfer.errors import UsageError

__all__ = ["SNIFFED_BYTES", "NoTextError", "Text", "is_binary", "to_text"]

SNIFFED_BYTES = 8192
"""How many bytes from the beginning of a file is_binary() looks at."""

# The longer marks come first: that of UTF-16 is the beginning of one of UTF-32.
_MARKS = (
    (codecs.BOM_UTF8, "UTF-8"),
    (codecs.BOM_UTF32_LE, "UTF-32-LE"),
    (codecs.BOM_UTF32_BE, "UTF-32-BE"),
    (codecs.BOM_UTF16_LE, "UTF-16-LE"),
    (codecs.BOM_UTF16_BE, "UTF-16-BE"),
)
_PDF = b"%PDF-"
_ZIP = b"PK\x03\x04"
_HTML_SUFFIXES = (".html", ".htm", ".xhtml")
_HTML_BEGINNING = re.compile(rb"\s*(<!doctype html|<html)", re.IGNORECASE)
_DECLARED_ENCODING = re.compile(rb"<meta[^>]+charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_DECLARED_BYTES = 1024  # in which HTML declares its encoding
_LATIN_1 = ("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii")  # in HTML they mean windows-1252
_NOT_IN_TEXT = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]")
_WITHOUT_TEXT = ("script", "style", "template", "noscript", "head")
_DOCX_PART = "word/document.xml"
_EPUB_PART = "META-INF/container.xml"
_EPUB_LOCKS = "META-INF/encryption.xml"
_MOST_PAGES_NAMED = 5
# What the converters raise for files that are damaged. Errors about memory are not among them.
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ExpatError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class NoTextError(UsageError):
    """A file holds no text that can be read.

    Args:
        name: the name of the file.
        reason: why, as the end of a sentence that begins with the name of the file.
        advice: what would work.
    """

    def __init__(self, name: str, reason: str, advice: str) -> None:
        super().__init__(f"cannot read {name}: it {reason}; {advice}")
        self.reason = reason


@dataclass(frozen=True)
class Text:
    """The text of a file.

    Attributes:
        content: the text. Lines end with a newline character.
        read_as: the encoding, or the format and the library that converted it.
        is_guessed: whether the encoding was guessed.
        notes: what the user should know about the conversion, as sentences without the name of the file.
    """

    content: str
    read_as: str
    is_guessed: bool = False
    notes: list[str] = field(default_factory=list)


def is_binary(beginning: bytes) -> bool:
    """Return whether a file is neither text nor a format that to_text() converts.

    Args:
        beginning: the first SNIFFED_BYTES of the file, or all bytes of a shorter one.
    """
    if beginning.startswith((_PDF, _ZIP, *(mark for mark, _ in _MARKS))):
        return False
    return b"\0" in beginning and _utf_16_without_mark(beginning) is None


def to_text(data: bytes, name: str) -> Text:
    """Make text of the bytes of a file.

    PDF, EPUB and DOCX are recognized by their bytes. HTML is recognized by the suffix of the name; if there is none, as
    of standard input, by its beginning.

    Args:
        data: all bytes of the file.
        name: the name of the file, for its suffix and for messages.

    Raises:
        NoTextError: the file is binary, damaged or protected, or has no text, such as a PDF of scanned pages.
        UsageError: the library that it needs is not installed.
    """
    if data.startswith(_PDF):
        return _from_pdf(data, name)
    if data.startswith(_ZIP):
        return _from_zip(data, name)
    suffix = posixpath.splitext(name)[1].lower()
    if suffix in _HTML_SUFFIXES or (not suffix and _HTML_BEGINNING.match(data)):
        return _from_html(data, name)
    content, encoding, is_guessed = _decode(data, name)
    return Text(content, encoding, is_guessed)


# -- plain text --------------------------------------------------------------------------------------------------------


def _decode(data: bytes, name: str, declared: str | None = None) -> tuple[str, str, bool]:
    """Decode a text.

    Args:
        data: the bytes.
        name: the name of the file.
        declared: the encoding that the text itself declares. It is used if it is known and right.

    Returns:
        The text with newline characters at the ends of lines, its encoding, and whether the encoding was guessed.
    """
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            try:
                return _lines(data[len(mark) :].decode(encoding)), encoding, False
            except UnicodeDecodeError as error:
                reason = f"begins with the byte order mark of {encoding}, and is not {encoding} text"
                raise NoTextError(name, reason, "save it in UTF-8") from error
    utf_16 = _utf_16_without_mark(data)
    for candidate in (declared, utf_16, "UTF-8"):
        if candidate is not None:
            try:
                return _lines(data.decode(candidate)), candidate, candidate == utf_16
            except (LookupError, UnicodeError):
                continue
    unknown = NoTextError(name, "is not UTF-8 text, and no other encoding fits", "give text, PDF, HTML, EPUB or DOCX")
    if _NOT_IN_TEXT.search(data):
        raise unknown
    encoding = _guessed_encoding(data, name)
    try:
        return _lines(data.decode(encoding)), encoding, True
    except (LookupError, UnicodeDecodeError):
        raise unknown from None


def _lines(text: str) -> str:
    """Return a text with newline characters at the ends of its lines, as Python reads a text file."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _utf_16_without_mark(data: bytes) -> str | None:
    """Return the encoding of text in UTF-16 without a byte order mark, if at least half of it is ASCII."""
    beginning = data[:SNIFFED_BYTES]
    for encoding, zeros, others in (
        ("UTF-16-LE", beginning[1::2].count(0), beginning[::2].count(0)),
        ("UTF-16-BE", beginning[::2].count(0), beginning[1::2].count(0)),
    ):
        if not others and zeros * 4 >= len(beginning) > 0:
            text = beginning.decode(encoding, "replace")
            return None if _NOT_IN_TEXT.search(text.encode("utf-8", "replace")) else encoding
    return None


def _guessed_encoding(data: bytes, name: str) -> str:
    """Return the encoding that Firefox would guess for a page without a declared one."""
    with _extra(name, "it is not UTF-8 text, and telling its encoding"):
        from chardetng_py import EncodingDetector
    detector = EncodingDetector()
    detector.feed(data, last=True)
    encoding: str = detector.guess(tld=None, allow_utf8=False)
    return encoding


# -- formats -----------------------------------------------------------------------------------------------------------


@contextmanager
def _extra(name: str, what: str) -> Iterator[None]:
    """Turn the ImportError of a library of the extra into a UsageError.

    Args:
        name: the name of the file.
        what: what needs the library.
    """
    try:
        yield
    except ImportError as error:
        raise UsageError(
            f"cannot read {name}: {what} needs more libraries; run pip install 'headinfer[documents]', or save the "
            "file as UTF-8 text"
        ) from error


@contextmanager
def _converting(name: str, kind: str) -> Iterator[None]:
    """Turn the errors of a converter into a NoTextError."""
    try:
        yield
    except UsageError:
        raise
    except RecursionError as error:
        raise NoTextError(name, f"is {kind} that is nested too deeply", "save it as text") from error
    except _DAMAGE as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "password" in reason.lower() or "encrypted" in reason.lower():
            raise NoTextError(name, f"is {kind} with a password", "save it without one") from error
        raise NoTextError(name, f"is {kind} that is damaged ({reason})", "save it again, or as text") from error


def _converted(content: str, name: str, kind: str, library: str, notes: list[str] | None = None) -> Text:
    """Return the text of a converted file.

    Raises:
        NoTextError: there is none.
    """
    content = _lines(content).encode("utf-8", "ignore").decode("utf-8")
    if not content.strip():
        raise NoTextError(name, f"is {kind} that holds no text", "scanned pages need text recognition (OCR) first")
    return Text(content, f"{kind} by {library} {version(library)}", notes=notes or [])


def _from_pdf(data: bytes, name: str) -> Text:
    with _extra(name, "reading PDF"):
        import pypdfium2
    pages: list[str] = []
    with _converting(name, "PDF"), closing(pypdfium2.PdfDocument(data)) as document:
        for number in range(len(document)):
            with closing(document[number]) as page, closing(page.get_textpage()) as text_page:
                text: str = text_page.get_text_range()
            pages.append(text.replace("\ufffe", "").strip())  # PDFium's mark of a word that is cut at the end of a line
    empty = [str(number) for number, page in enumerate(pages, 1) if not page]
    notes = []
    if empty:
        named = ", ".join(empty[:_MOST_PAGES_NAMED]) + (", ..." if len(empty) > _MOST_PAGES_NAMED else "")
        notes.append(f"{len(empty)} of {len(pages)} pages hold no text ({named}): they are blank or scanned")
    return _converted("\n\n".join(page for page in pages if page), name, "PDF", "pypdfium2", notes)


def _from_zip(data: bytes, name: str) -> Text:
    with _converting(name, "a zip file"), zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if _DOCX_PART in names:
            return _from_docx(data, name)
        if _EPUB_PART in names:
            return _from_epub(archive, name)
    raise NoTextError(name, "is a zip file, and neither EPUB nor DOCX", "give text, PDF, HTML, EPUB or DOCX")


def _from_docx(data: bytes, name: str) -> Text:
    with _extra(name, "reading DOCX"):
        import mammoth
    with _converting(name, "DOCX"):
        images = mammoth.images.img_element(lambda image: {})
        markup = mammoth.convert_to_html(io.BytesIO(data), convert_image=images).value
        return _converted(_markdown(markup, name), name, "DOCX", "mammoth")


def _from_epub(archive: zipfile.ZipFile, name: str) -> Text:
    """Return the text of the chapters of an EPUB, in their order (EPUB 3.3, sections 4.2.6.3.1 and 5.7)."""
    with _converting(name, "EPUB"):
        container = ElementTree.fromstring(archive.read(_EPUB_PART))
        package_path = container.findall(".//{*}rootfile")[0].attrib["full-path"]
        package = ElementTree.fromstring(archive.read(package_path))
        locked = set()
        if _EPUB_LOCKS in archive.namelist():
            locks = ElementTree.fromstring(archive.read(_EPUB_LOCKS))
            locked = {unquote(lock.attrib["URI"]) for lock in locks.findall(".//{*}CipherReference")}
        items = {item.attrib["id"]: item for item in package.findall("{*}manifest/{*}item")}
        chapters = []
        for reference in package.findall("{*}spine/{*}itemref"):
            item = items[reference.attrib["idref"]]
            if "html" in item.attrib.get("media-type", ""):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(package_path), unquote(item.attrib["href"])))
                if path in locked:
                    raise NoTextError(name, "is EPUB that is protected (DRM)", "give one without protection")
                chapters.append(_markdown(archive.read(path), name))
        text = "\n\n".join(chapter for chapter in chapters if chapter)
        return _converted(text, name, "EPUB", "markdownify")


def _from_html(data: bytes, name: str) -> Text:
    found = _DECLARED_ENCODING.search(data[:_DECLARED_BYTES])
    declared = found[1].decode("ascii").lower() if found else None
    content, encoding, is_guessed = _decode(data, name, "windows-1252" if declared in _LATIN_1 else declared)
    with _converting(name, "HTML"):
        text = _converted(_markdown(content, name), name, "HTML", "markdownify")
    if encoding.upper() == "UTF-8":
        return text
    return dataclasses.replace(text, read_as=f"{encoding}, {text.read_as}", is_guessed=is_guessed)


def _markdown(markup: str | bytes, name: str) -> str:
    """Convert HTML to Markdown, without scripts, styles and pictures, and without links inside of the document."""
    with _extra(name, "converting HTML"):
        import lxml.etree  # noqa: F401 - the parser of BeautifulSoup
        from bs4 import BeautifulSoup, XMLParsedAsHTMLWarning
        from markdownify import MarkdownConverter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)  # XHTML
        page: Any = BeautifulSoup(markup, "lxml")
    title = page.title.get_text().strip() if page.title is not None and page.find("h1") is None else ""
    for tag in page(_WITHOUT_TEXT):
        tag.decompose()
    for tag in page("img"):
        tag.replace_with(tag.get("alt") or "")
    for tag in page("a"):
        if not str(tag.get("href", "")).startswith(("http:", "https:", "mailto:")):
            tag.unwrap()
    converter = MarkdownConverter(
        heading_style="ATX",
        bullets="-",
        escape_asterisks=False,
        escape_underscores=False,
        table_infer_header=True,
    )
    text = re.sub(r"[ \t]+\n", "\n", converter.convert_soup(page))
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    return f"# {title}\n\n{text}" if title and text else text or title
