"""What makes text of files: encodings and formats. All files are made here."""

import codecs
import io
import sys
import zipfile

import pytest

from headinfer.errors import UsageError
from headinfer.jobs.convert import NoTextError, is_binary, to_text

ENGLISH = "It was a bright cold day in April, and the “clocks” were striking thirteen — in the café.\n"
RUSSIAN = "Был холодный ясный апрельский день, и часы пробили тринадцать.\n"
JAPANESE = "四月の晴れた寒い日だった。時計が十三時を打っていた。\n"


def pdf(*pages):
    """A PDF with a page for each list of lines."""
    kids = " ".join(f"{4 + 2 * number} 0 R" for number in range(len(pages)))
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for number, lines in enumerate(pages):
        shown = "BT /F1 12 Tf 72 720 Td 14 TL " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
        objects += [
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * number} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>",
            f"<< /Length {len(shown)} >>\nstream\n{shown}\nendstream",
        ]
    data = b"%PDF-1.4\n"
    offsets = []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n{content}\nendobj\n".encode()
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    trailer = f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{trailer}".encode()


def zipped(**members):
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def docx(body):
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    kind = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    types = "http://schemas.openxmlformats.org/package/2006/content-types"
    main = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    return zipped(
        **{
            "[Content_Types].xml": f'<Types xmlns="{types}"><Override PartName="/word/document.xml" '
            f'ContentType="{main}"/></Types>',
            "_rels/.rels": f'<Relationships xmlns="{relations}"><Relationship Id="r1" Type="{kind}" '
            'Target="word/document.xml"/></Relationships>',
            "word/document.xml": f'<w:document xmlns:w="{word}"><w:body>{body}</w:body></w:document>',
        }
    )


def paragraph(text, style=""):
    properties = f'<w:pPr><w:pStyle w:val="{style}"/></w:pPr>' if style else ""
    return f"<w:p>{properties}<w:r><w:t>{text}</w:t></w:r></w:p>"


def epub(locked="", **chapters):
    """An EPUB whose chapters are in the reverse order of their names."""
    items = "".join(
        f'<item id="{name}" href="{name}%20x.xhtml" media-type="application/xhtml+xml"/>' for name in chapters
    )
    spine = "".join(f'<itemref idref="{name}"/>' for name in sorted(chapters, reverse=True))
    members = {
        "mimetype": "application/epub+zip",
        "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
        '<rootfile full-path="book/p.opf"/></rootfiles></container>',
        "book/p.opf": f'<package xmlns="http://www.idpf.org/2007/opf"><manifest>{items}</manifest>'
        f"<spine>{spine}</spine></package>",
    }
    if locked:
        members["META-INF/encryption.xml"] = (
            '<encryption xmlns="urn:oasis:names:tc:opendocument:xmlns:container" '
            'xmlns:e="http://www.w3.org/2001/04/xmlenc#"><e:EncryptedData><e:CipherData>'
            f'<e:CipherReference URI="{locked}"/></e:CipherData></e:EncryptedData></encryption>'
        )
    for name, body in chapters.items():
        members[f"book/{name} x.xhtml"] = (
            '<?xml version="1.0" encoding="utf-8"?>\n<html xmlns="http://www.w3.org/1999/xhtml"><head><title>T</title>'
            f"</head><body><h1>Chapter {name}</h1>{body}</body></html>"
        )
    return zipped(**members)


def locked():
    """A PDF that opens with a password."""
    security = "/Encrypt << /Filter /Standard /V 1 /R 2 /O <{0}> /U <{0}> /P -4 >> /ID [<00> <00>]".format("5a" * 32)
    return pdf(["x"]).replace(b"/Root 1 0 R", b"/Root 1 0 R " + security.encode())


# -- encodings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text", "read_as", "is_guessed"),
    [
        (ENGLISH.encode(), ENGLISH, "UTF-8", False),
        (codecs.BOM_UTF8 + ENGLISH.encode(), ENGLISH, "UTF-8", False),
        (codecs.BOM_UTF16_LE + ENGLISH.encode("utf-16-le"), ENGLISH, "UTF-16-LE", False),
        (codecs.BOM_UTF16_BE + ENGLISH.encode("utf-16-be"), ENGLISH, "UTF-16-BE", False),
        (codecs.BOM_UTF32_LE + ENGLISH.encode("utf-32-le"), ENGLISH, "UTF-32-LE", False),
        (ENGLISH.encode("utf-16-le"), ENGLISH, "UTF-16-LE", True),
        (ENGLISH.encode("utf-16-be"), ENGLISH, "UTF-16-BE", True),
        (ENGLISH.encode("cp1252"), ENGLISH, "windows-1252", True),
        ("café\n".encode("latin-1"), "café\n", "windows-1252", True),
        (RUSSIAN.encode("cp1251"), RUSSIAN, "windows-1251", True),
        (RUSSIAN.encode("koi8-r"), RUSSIAN, "KOI8-U", True),
        (JAPANESE.encode("shift_jis"), JAPANESE, "Shift_JIS", True),
        (JAPANESE.encode("euc_jp"), JAPANESE, "EUC-JP", True),
        (b"one\r\ntwo\rthree\n", "one\ntwo\nthree\n", "UTF-8", False),
        (b"", "", "UTF-8", False),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_an_encoding_is_told(data, text, read_as, is_guessed):
    found = to_text(data, "book.txt")
    assert (found.content, found.read_as, found.is_guessed) == (text, read_as, is_guessed)
    assert not is_binary(data)
    assert found == to_text(data, "book.txt")


@pytest.mark.parametrize("data", [bytes(range(256)), b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\1\2\0\xff"])
def test_what_is_not_text_is_refused(data):
    assert is_binary(data)
    with pytest.raises(NoTextError, match="cannot read an image: it is not UTF-8 text, and no other encoding fits"):
        to_text(data, "an image")
    with pytest.raises(NoTextError, match="begins with the byte order mark of UTF-16-LE"):
        to_text(codecs.BOM_UTF16_LE + b"x", "an image")


# -- formats -----------------------------------------------------------------------------------------------------------


def test_pdf():
    found = to_text(pdf(["The clocks were stri-", "king thirteen."], [], ["Page three."]), "book.pdf")
    assert found.content == "The clocks were striking thirteen.\n\nPage three."
    assert found.read_as.startswith("PDF by pypdfium2 ")
    assert found.notes == ["1 of 3 pages hold no text (2): they are blank or scanned"]


def test_docx():
    table = "".join(f"<w:tr><w:tc>{paragraph(a)}</w:tc><w:tc>{paragraph(b)}</w:tc></w:tr>" for a, b in ("kv", "12"))
    found = to_text(docx(paragraph("Part", "Heading1") + paragraph("a_b * “c”") + f"<w:tbl>{table}</w:tbl>"), "x.docx")
    assert "# Part\n\na_b * “c”" in found.content
    assert "| 1 | 2 |" in found.content
    assert found.read_as.startswith("DOCX by mammoth ")


def test_epub_chapters_are_in_the_order_of_the_spine():
    found = to_text(epub(a="<p>First.</p>", b="<p>Über.</p><img src='x.png'/>"), "book.epub")
    assert found.content == "# Chapter b\n\nÜber.\n\n# Chapter a\n\nFirst."
    assert found.read_as.startswith("EPUB by markdownify ")
    assert to_text(epub(locked="book/font.ttf", a="<p>x</p>"), "x.epub").content == "# Chapter a\n\nx"


def test_html():
    page = (
        "<!DOCTYPE html><html><head><title>T</title><style>x{}</style></head><body><p>One &amp; two"
        "<p>A <a href='http://x.y/z'>link</a>, <a href='#in'>inside</a> <img src='data:x' alt='cat'>."
        "<ul><li>a<li>b</ul><script>no()</script></body></html>"
    )
    found = to_text(page.encode(), "page.HTML")
    assert found.content == "# T\n\nOne & two\n\nA [link](http://x.y/z), inside cat.\n\n- a\n- b"
    assert to_text(page.encode(), "standard input") == found
    assert to_text(page.encode(), "page.txt").content == page
    declared = to_text(b'<meta charset="koi8-r">' + RUSSIAN.encode("koi8-r"), "p.htm")
    assert declared.content == RUSSIAN.strip()
    assert declared.read_as.startswith("koi8-r, HTML by")


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("scan.pdf", pdf([], []), "is PDF that holds no text; scanned pages need text recognition"),
        ("cut.pdf", pdf(["x"])[:200], "is PDF that is damaged"),
        ("locked.pdf", locked(), "is PDF with a password; save it without one"),
        ("empty.docx", docx(""), "is DOCX that holds no text"),
        ("cut.docx", docx(paragraph("x"))[:-30], "is a zip file that is damaged"),
        ("bad.docx", docx("<w:p>"), "is DOCX that is damaged"),
        ("bad.epub", zipped(**{"META-INF/container.xml": "<x/>"}), "is EPUB that is damaged"),
        ("drm.epub", epub(locked="book/a%20x.xhtml", a="x"), "is EPUB that is protected (DRM)"),
        ("x.zip", zipped(a="b"), "is a zip file, and neither EPUB nor DOCX"),
        ("empty.html", b"<html><body><script>x</script></body></html>", "is HTML that holds no text"),
        ("deep.html", b"<div>" * 3000 + b"x", "is HTML that is nested too deeply"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and " " not in value else "",
)
def test_a_file_without_text_is_refused_in_one_sentence(name, data, says):
    with pytest.raises(NoTextError) as raised:
        to_text(data, name)
    assert str(raised.value).startswith(f"cannot read {name}: it {says}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("library", "name", "data"),
    [
        ("pypdfium2", "x.pdf", pdf(["x"])),
        ("mammoth", "x.docx", docx(paragraph("x"))),
        ("bs4", "x.epub", epub(a="<p>x</p>")),
        ("lxml.etree", "x.html", b"<p>x</p>"),
        ("chardetng_py", "x.txt", b"caf\xe9"),
    ],
)
def test_without_the_extra_a_sentence_says_what_to_install(library, name, data, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UsageError) as raised:
        to_text(data, name)
    assert not isinstance(raised.value, NoTextError)
    assert f"cannot read {name}: " in str(raised.value)
    assert "pip install 'headinfer[documents]'" in str(raised.value)
