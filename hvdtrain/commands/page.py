"""A page of tables and pictures, written twice: one HTML file that needs no other, and Markdown with PNG beside it.

    page = Page("Scaling of demo", [Text("..."), Heading("Times"), Table(head, rows), Picture("speed", png, "...")])
    write_page(page, Path("runs/x/scaling"))   ->   scaling.html, scaling.md, scaling-speed.png

The HTML holds its pictures and its looks, has no script, and forbids itself to ask any server for anything: it can be
mailed, and opened without a network.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hvdtrain.errors import OutputError
from hvdtrain.files import make_folder, write_bytes, write_text


@dataclass(frozen=True)
class Heading:
    text: str


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """As it is typed."""

    text: str


@dataclass(frozen=True)
class Table:
    """Cells as they are shown. marked: rows in italics. words: not numbers, which stand to the right but for the first
    column.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: frozenset[int] = frozenset()
    words: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and what is said of them."""

    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Picture:
    """name: of its file, behind the page's own. said: what is to be seen, for those who see it not."""

    name: str
    png: bytes
    said: str


Block = Heading | Text | Code | Facts | Table | Picture


@dataclass
class Page:
    title: str
    blocks: list[Block] = field(default_factory=list)


def write_page(page: Page, path: Path) -> list[Path]:
    """``path`` is without its ending. Returns the files, the HTML first. Errors: OutputError."""
    pictures = {block.name: path.with_name(f"{path.name}-{block.name}.png") for block in _pictures(page)}
    files = [path.with_name(f"{path.name}.html"), path.with_name(f"{path.name}.md"), *pictures.values()]
    try:
        make_folder(path.parent)
        for block in _pictures(page):
            write_bytes(pictures[block.name], block.png)
        write_text(files[0], as_html(page))
        write_text(files[1], as_markdown(page, {name: file.name for name, file in pictures.items()}))
    except OSError as error:
        raise OutputError(f"cannot write {path.parent}: {error.strerror or error}") from None
    return files


def png_of(figure: Any) -> bytes:
    """A figure of matplotlib, with a thin grid and without a frame."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    return data.getvalue()


def _pictures(page: Page) -> list[Picture]:
    return [block for block in page.blocks if isinstance(block, Picture)]


# --- HTML --------------------------------------------------------------------------------------------------------

_LOOKS = """
body { font: 15px/1.5 sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.15rem; margin-top: 2rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 2px solid #888 } th:first-child, td:first-child { text-align: left }
table.words th, table.words td { text-align: left }
tr.marked { font-style: italic; color: #555 }
pre { background: #f4f4f4; padding: 0.7rem; white-space: pre-wrap }
dl { display: grid; grid-template-columns: max-content auto; gap: 0.15rem 1.2rem }
dt { color: #555 } dd { margin: 0; overflow-wrap: anywhere }
img { max-width: 100% }
"""


def as_html(page: Page) -> str:
    body = "\n".join(_HTML[type(block)](block) for block in page.blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width">\n<link rel="icon" href="data:,">\n'
        f"<title>{_safe(page.title)}</title>\n<style>{_LOOKS}</style>\n</head>\n<body>\n"
        f"<h1>{_safe(page.title)}</h1>\n{body}\n</body>\n</html>\n"
    )


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _table_in_html(table: Table) -> str:
    head = "".join(f"<th>{_safe(cell)}</th>" for cell in table.head)
    rows = [
        f"<tr{' class=marked' if number in table.marked else ''}>"
        + "".join(f"<td>{_safe(cell)}</td>" for cell in row)
        + "</tr>"
        for number, row in enumerate(table.rows)
    ]
    return (
        f'<div class="wide"><table{" class=words" if table.words else ""}>\n<tr>{head}</tr>\n'
        + "\n".join(rows)
        + "\n</table></div>"
    )


def _facts_in_html(facts: Facts) -> str:
    rows = (f"<dt>{_safe(name)}</dt><dd>{_safe(said)}</dd>" for name, said in facts.rows)
    return "<dl>\n" + "\n".join(rows) + "\n</dl>"


def _picture_in_html(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return f'<p><img alt="{_safe(picture.said)}" src="data:image/png;base64,{data}"></p>'


_HTML: dict[type, Callable[[Any], str]] = {
    Heading: lambda block: f"<h2>{_safe(block.text)}</h2>",
    Text: lambda block: f"<p>{_safe(block.text)}</p>",
    Code: lambda block: f"<pre>{_safe(block.text)}</pre>",
    Facts: _facts_in_html,
    Table: _table_in_html,
    Picture: _picture_in_html,
}


# --- Markdown ----------------------------------------------------------------------------------------------------


def as_markdown(page: Page, files: dict[str, str]) -> str:
    """files: of the pictures, by their names."""
    texts = [f"# {page.title}"]
    for block in page.blocks:
        if isinstance(block, Picture):
            texts.append(f"![{block.said}]({files[block.name]})")
        elif isinstance(block, Table):
            texts.append(_table_in_markdown(block))
        elif isinstance(block, Facts):
            texts.append("\n".join(f"- {name}: {said}" for name, said in block.rows))
        elif isinstance(block, Code):
            texts.append("\n".join(f"    {line}" for line in block.text.splitlines()))
        else:
            texts.append(f"## {block.text}" if isinstance(block, Heading) else block.text)
    return "\n\n".join(texts) + "\n"


def _table_in_markdown(table: Table) -> str:
    def row(cells: Sequence[str], mark: str = "") -> str:
        shown = [cell.replace("|", "\\|") for cell in cells]
        return "| " + " | ".join(f"{mark}{cell}{mark}" if cell else "" for cell in shown) + " |"

    line = "| --- |" + (" --- |" if table.words else " ---: |") * (len(table.head) - 1)
    rows = [row(cells, "*" if number in table.marked else "") for number, cells in enumerate(table.rows)]
    return "\n".join([row(table.head), line, *rows])
