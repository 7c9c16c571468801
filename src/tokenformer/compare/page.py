"""A page of elements, written as self-contained HTML and as Markdown. All text is data: nothing in it is markup."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

_NUMBER = re.compile(r"([−+]|[<≤] )?\d[^a-z]*|–|not reached")
_STYLE = """\
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem 1rem 4rem;max-width:78rem;background:#fff;color:#1b1f24;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:break-word}
h1{font-size:1.5rem;line-height:1.25;margin:.5rem 0}
h2{font-size:1.25rem;margin:2.2rem 0 .6rem;padding-top:.7rem;border-top:1px solid #d9dee5}
p,ul{max-width:46rem;margin:.5rem 0}
ul{padding-left:1.2rem}li{margin:.2rem 0}
a,summary{color:#0b5cad}
summary{cursor:pointer;padding:.35rem 0;font-weight:600}
.lead{font-size:1.1rem;border-left:4px solid #0b6bcb;padding:.1rem 0 .1rem .9rem;margin:1rem 0}
nav{font-size:.9rem;margin-top:1.5rem}nav a{display:inline-block;margin-right:.9rem}
.wide{overflow-x:auto;margin:.8rem 0}
table{border-collapse:collapse;font-size:.86rem;line-height:1.35;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .65rem;text-align:left;vertical-align:top;border-bottom:1px solid #d9dee5}
th{vertical-align:bottom;font-weight:600;color:#5a6472}
td.n,th.n{text-align:right}td.n{white-space:nowrap}
td:first-child,th:first-child{position:sticky;left:0;background:#fff;min-width:11rem;max-width:16rem;
overflow-wrap:anywhere}
td{white-space:nowrap}td.long,td:first-child{white-space:normal}td.long{min-width:15rem}
tr.mark td{background:#f4f6f8}
figcaption{font-size:.86rem;color:#5a6472;padding:.2rem 0;max-width:60rem}
.chart>div{height:auto!important}
figure{margin:.6rem 0}figure img{display:block;width:100%;min-width:40rem;height:auto}
pre{background:#f4f6f8;padding:.8rem 1rem;overflow-x:auto;font-size:.8rem;line-height:1.4;border-radius:6px}
@media (max-width:40rem){h1{font-size:1.2rem}.lead{font-size:1rem}
td:first-child,th:first-child{min-width:7rem;max-width:9rem}}
@media print{body{max-width:none;padding:0;font-size:10pt}nav{display:none}figure img{min-width:0}
.wide{overflow:visible}table{font-size:7.5pt}th,td{padding:.15rem .3rem}td{white-space:normal}td.long{min-width:0}
pre{white-space:pre-wrap}figure,tr{break-inside:avoid}h2{break-after:avoid}td:first-child,th:first-child{position:static}}"""


@dataclass(frozen=True)
class Heading:
    """The heading of a part of the page, which the page's list of contents names."""

    text: str

    def html(self) -> str:
        """As HTML."""
        return f'<h2 id="{anchor(self.text)}">{escape(self.text)}</h2>'

    def markdown(self) -> str:
        """As Markdown."""
        return f"## {plain(self.text)}"


@dataclass(frozen=True)
class Paragraph:
    """Running text; `lead` is the one to read if only one is read."""

    text: str
    lead: bool = False

    def html(self) -> str:
        """As HTML."""
        return f"<p{_class('lead' if self.lead else '')}>{shown(self.text)}</p>"

    def markdown(self) -> str:
        """As Markdown."""
        return f"**{plain(self.text)}**" if self.lead else plain(self.text)


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]

    def html(self) -> str:
        """As HTML."""
        return f"<ul>{''.join(f'<li>{shown(item)}</li>' for item in self.items)}</ul>"

    def markdown(self) -> str:
        """As Markdown."""
        return "\n".join(f"- {plain(item)}" for item in self.items)


@dataclass(frozen=True)
class Table:
    """Rows under a head; columns of numbers are aligned right, rows that begin with one of `marked` are shaded."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    marked: Sequence[str] = field(default=())

    def _numeric(self) -> list[bool]:
        return [all(_NUMBER.fullmatch(row[i]) for row in self.rows) for i in range(len(self.head))]

    def html(self) -> str:
        """As HTML."""
        kinds = ["n" if numeric else "" for numeric in self._numeric()]
        head = "".join(f"<th{_class(kind)}>{shown(cell)}</th>" for cell, kind in zip(self.head, kinds, strict=True))
        rows = [
            f"<tr{_class('mark' if row[0] in self.marked else '')}>"
            + "".join(
                f"<td{_class(kind or ('long' if len(cell) > 40 else ''))}>{shown(cell)}</td>"
                for cell, kind in zip(row, kinds, strict=True)
            )
            for row in self.rows
        ]
        return (
            f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n'
            + "\n".join(f"{row}</tr>" for row in rows)
            + "\n</tbody></table></div>"
        )

    def markdown(self) -> str:
        """As Markdown."""
        rule = ["--:" if n else "---" for n in self._numeric()]
        rows = [[plain(cell) for cell in row] for row in (self.head, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]])


@dataclass(frozen=True)
class Picture:
    """A figure: in the page as SVG, beside the Markdown as the file `name`.png.

    Where there is a `chart`, HTML with its script, the page shows that instead, and the SVG only without JavaScript.
    """

    name: str
    caption: str
    svg: bytes
    png: bytes
    chart: str = ""

    def html(self) -> str:
        """As HTML."""
        data, caption = base64.b64encode(self.svg).decode(), escape(self.caption)
        image = f'<div class="wide"><img alt="{caption}" src="data:image/svg+xml;base64,{data}"></div>'
        if self.chart:
            image = f'<div class="chart">{self.chart}</div><noscript>{image}</noscript>'
        return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"

    def markdown(self) -> str:
        """As Markdown."""
        return f"![{plain(self.caption)}]({self.name}.png)"


@dataclass(frozen=True)
class Code:
    """Text as it stands."""

    text: str

    def html(self) -> str:
        """As HTML."""
        return f"<pre>{escape(self.text)}</pre>"

    def markdown(self) -> str:
        """As Markdown."""
        return "\n".join(f"    {line}" for line in self.text.splitlines())


@dataclass(frozen=True)
class Folded:
    """Elements behind a line of summary, shown when a reader asks for them."""

    summary: str
    elements: Sequence[Element]

    def html(self) -> str:
        """As HTML."""
        inside = "\n".join(element.html() for element in self.elements)
        return f"<details><summary>{shown(self.summary)}</summary>\n{inside}\n</details>"

    def markdown(self) -> str:
        """As Markdown, which takes this much HTML."""
        inside = "\n\n".join(element.markdown() for element in self.elements)
        return f"<details>\n<summary>{escape(self.summary)}</summary>\n\n{inside}\n\n</details>"


Element = Heading | Paragraph | Bullets | Table | Picture | Code | Folded


def html_page(title: str, elements: Sequence[Element]) -> str:
    """Write a whole page that needs nothing from elsewhere; its list of contents stands before the first heading."""
    headings = [element for element in elements if isinstance(element, Heading)]
    nav = " ".join(f'<a href="#{anchor(heading.text)}">{escape(heading.text)}</a>' for heading in headings)
    written = [
        f"<nav>{nav}</nav>\n{element.html()}" if headings and element is headings[0] else element.html()
        for element in elements
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>\n{_STYLE}\n</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(written)
        + "\n</body>\n</html>\n"
    )


def markdown_page(title: str, elements: Sequence[Element]) -> str:
    """Write a whole page as Markdown (GitHub's tables)."""
    return "\n\n".join([f"# {plain(title)}", *(element.markdown() for element in elements)]) + "\n"


def scientific(value: float) -> str:
    """Write a number as 1.6·10¹²; as it is below a million."""
    if abs(value) < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    shown = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
    return power if shown == "1" else f"{shown}·{power}"


def rounded(value: float) -> str:
    """Write a number to three digits or as a whole number, without an exponent."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def plain(text: str) -> str:
    """Write text so that Markdown shows it as it is, on one line."""
    return re.sub(r"([\\`*<|\[\]])", r"\\\1", re.sub(r"\s+", " ", text))


def shown(text: str) -> str:
    """Write text so that HTML shows it as it is; a number keeps its interval on the same line."""
    return escape(text).replace(" ± ", "&nbsp;±&nbsp;")


def anchor(text: str) -> str:
    """Return a heading's place in the page."""
    return re.sub(r"\W+", "-", text.lower()).strip("-")


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
