"""The report as one HTML page: with its images inside, without scripts and external files."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from mpscl_ray import __version__

_STYLE = """
:root { color-scheme: light; --ink: #1c1c1c; --pale: #5a5a5a; --line: #d9d9d9; --ground: #ffffff; --note: #f4f1ea; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: .9rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.8rem 0 .3rem; }
p { margin: .4rem 0 .7rem; max-width: 78ch; }
.pale { color: var(--pale); font-size: .92rem; }
nav { margin: 1.1rem 0 0; font-size: .92rem; }
nav a { margin-right: 1.1rem; white-space: nowrap; }
a { color: #0b5394; }
figure { margin: 1rem 0 1.6rem; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { color: var(--pale); font-size: .9rem; margin-top: .45rem; max-width: 92ch; }
.note { background: var(--note); border-left: 3px solid #b08d3c; padding: .45rem .8rem; margin: .5rem 0;
  font-size: .92rem; max-width: 92ch; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; margin: .8rem 0 1rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .28rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
tr.above th { border-bottom: none; text-align: center; padding-bottom: 0; }
th:first-join_location, td:first-join_location, td.text, th.text { text-align: left; }
caption { caption-side: bottom; text-align: left; color: var(--pale); font-size: .86rem; padding-top: .4rem;
  white-space: normal; }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .35em;
  vertical-align: -.05em; }
.legend span { margin-right: 1.2rem; white-space: nowrap; }
details { margin: .5rem 0; } summary { cursor: pointer; }
pre { font-size: .8rem; line-height: 1.4; background: #f7f7f7; padding: .7rem; overflow-x: auto; }
@media print { main { max-width: none; padding: 0; } h2 { break-before: page; } figure { break-inside: avoid; } }
"""


@dataclass(frozen=True)
class HtmlFigure:
    """A figure on the page."""

    name: str
    """Of its files."""
    image: bytes
    """PNG."""
    caption: str
    alt_text: str


@dataclass(frozen=True)
class Table:
    """A table of text cells."""

    header: Sequence[str]
    """Titles of the columns."""
    rows: Sequence[Sequence[str]]
    text_columns: frozenset[int] = frozenset({0})
    """Columns of words, which are aligned to the left."""
    caption: str = ""
    """What the numbers are."""
    groups: Sequence[tuple[str, int]] = ()
    """Title and number of columns of each cell of a line above the header; empty for no such line."""


@dataclass
class Section:
    """A heading and its content, in this order."""

    title: str
    lead: str = ""
    """Its subject, in a sentence or two."""
    tables: list[Table] = field(default_factory=list)
    figures: list[HtmlFigure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is missing and why, a sentence each."""


def page(
    title: str,
    summary: str,
    sections: Sequence[Section],
    structures: Sequence[tuple[str, str]],
    settings: Sequence[tuple[str, str]],
) -> str:
    """The whole page.

    Args:
        title: of the report.
        summary: a sentence or two below it.
        sections: in order.
        structures: name and colour of each structure, in display order.
        settings: name of each run and its settings as text, collapsed at the end.
    """
    anchors = [f"s{number}" for number in range(len(sections))]
    links = " ".join(f'<a href="#{a}">{_text(s.title)}</a>' for a, s in zip(anchors, sections, strict=True))
    legend = "".join(
        f'<span><i class="swatch" style="background:{colour}"></i>{_text(name)}</span>' for name, colour in structures
    )
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(summary)}</p>",
        f'<p class="legend pale">Colours of the structures in all figures: {legend}</p>' if structures else "",
        f"<nav>{links}</nav>",
        *(_section(anchor, section) for anchor, section in zip(anchors, sections, strict=True)),
        "<h2>Settings</h2>" if settings else "",
        *(f"<details><summary>{_text(n)}</summary><pre>{_text(text)}</pre></details>" for n, text in settings),
        f'<p class="pale">Made by mpscl_ray {__version__}. Each figure is beside this page as PNG and PDF, in '
        "figures/. Research software, not a medical device.</p>",
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(anchor: str, section: Section) -> str:
    parts = [f'<section id="{anchor}">', f"<h2>{_text(section.title)}</h2>"]
    if section.lead:
        parts.append(f"<p>{_text(section.lead)}</p>")
    parts += [_table(table) for table in section.tables]
    for figure in section.figures:
        data = base64.b64encode(figure.image).decode("ascii")
        parts.append(
            f'<figure id="{figure.name}"><img alt="{_text(figure.alt_text)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{_text(figure.caption)}</figcaption></figure>"
        )
    parts += [f'<p class="note">{_text(note)}</p>' for note in section.notes]
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = (' class="text"' if index in table.text_columns else "" for index in range(len(row)))
        return "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    caption = f"<caption>{_text(table.caption)}</caption>" if table.caption else ""
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    above = "".join(f'<th colspan="{span}">{_text(title)}</th>' for title, span in table.groups)
    above = f'<tr class="above">{above}</tr>' if above else ""
    return (
        f'<div class="scroll"><table>{caption}<thead>{above}<tr>{cells("th", table.header)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(text: str) -> str:
    return html.escape(text, quote=True)
