"""Pages of tables and pictures: what is written, and what a browser makes of it."""

from pathlib import Path

import pytest
from browser import open_page

from hvdtrain.commands.page import Code, Facts, Heading, Page, Picture, Table, Text, as_html, png_of, write_page
from hvdtrain.errors import OutputError


def _picture() -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([1, 2])
    return png_of(figure)


def _page() -> Page:
    rows = [("1", "a|b"), ("2", "<script>alert(1)</script>")]
    table = Table(("nodes", "said"), rows, frozenset({1}))
    blocks = [Heading("Speed & more"), Text('says "x"'), Code("a --b\nc"), Facts([("ranks", "4")]), table]
    return Page("A <page>", [*blocks, Picture("speed", _picture(), "a line")])


def test_a_page_is_one_file_and_markdown_with_its_pictures(tmp_path: Path):
    files = write_page(_page(), tmp_path / "deep" / "all")
    assert [path.name for path in files] == ["all.html", "all.md", "all-speed.png"]
    assert files[2].read_bytes() == _picture()
    assert files[1].read_text() == (
        '# A <page>\n\n## Speed & more\n\nsays "x"\n\n    a --b\n    c\n\n- ranks: 4\n\n'
        "| nodes | said |\n| --- | ---: |\n| 1 | a\\|b |\n| *2* | *<script>alert(1)</script>* |\n\n"
        "![a line](all-speed.png)\n"
    )


def test_a_browser_opens_it_and_asks_nobody(tmp_path: Path):
    """What stands in a cell stays text, and the picture is in the page."""
    page = write_page(_page(), tmp_path / "all")[0]
    (tmp_path / "all-speed.png").unlink()
    shown, asked = open_page(page, tmp_path)
    assert asked == set()
    assert "&lt;script&gt;" in shown and "<td>1</td>" in shown and "data:image/png;base64," in shown


def test_the_browser_would_tell(tmp_path: Path):
    """Else the test above could not fail."""
    page = tmp_path / "bad.html"
    page.write_text('<img src="http://127.0.0.1:9/x.png">')
    assert open_page(page, tmp_path)[1] == {"http://127.0.0.1:9/x.png"}
    page.write_text("<script>nothing()</script>")
    with pytest.raises(AssertionError, match="nothing is not defined"):
        open_page(page, tmp_path)


def test_the_page_forbids_itself_all_requests(tmp_path: Path):
    text = as_html(_page()).replace("<h1>", '<script src="http://127.0.0.1:9/x.js"></script><h1>')
    page = tmp_path / "asks.html"
    page.write_text(text)
    with pytest.raises(AssertionError, match="Content Security Policy"):
        open_page(page, tmp_path)


def test_a_page_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        write_page(_page(), tmp_path / "file" / "all")
