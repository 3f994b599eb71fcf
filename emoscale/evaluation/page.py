"""The page a report is written on: one HTML file that loads nothing, in light and dark, on screen and on paper."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

STYLE = """
:root{color-scheme:light dark;--paper:#fdfcfa;--ink:#1d2126;--soft:#646b75;--rule:#e3e0da;--panel:#f6f4ef;
--heat:24 78 148;
--warn:#8a4b00;--warnbg:#fdf1dc;--c0:#225ea8;--c1:#c4501b;--c2:#2f8050;--c3:#8350a8;--c4:#a07a10;--c5:#45707f}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--ink:#e6e4df;--soft:#9aa1ab;--rule:#2f343b;--panel:#1c2026;
--heat:88 148 220;
--warn:#f1bf73;--warnbg:#33270f;--c0:#6ea8e8;--c1:#ef8a58;--c2:#68bd88;--c3:#bb92df;--c4:#d8b552;--c5:#80b3c4}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 Charter,"Bitstream Charter","Sitka Text",
Cambria,Georgia,serif}
main,header,footer{max-width:68rem;margin:0 auto;padding:0 1.5rem}
header{padding-top:3.2rem}
h1{font-size:2.1rem;line-height:1.15;font-weight:600;letter-spacing:-.012em;margin:0 0 .4rem}
h2{font-size:1.35rem;font-weight:600;letter-spacing:-.005em;margin:0 0 .9rem}
h3{font-size:1rem;font-weight:600;margin:1.6rem 0 .5rem}
p{margin:.5rem 0;max-width:46rem}
header p,footer{color:var(--soft);font-size:.88rem}
nav{margin:1.1rem 0 0;font-size:.9rem;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem}
a{color:var(--c0);text-decoration:none}a:hover{text-decoration:underline}
section{padding:2.2rem 0 1.4rem;border-top:1px solid var(--rule);margin-top:1.8rem}
table,.chart,.legend,code,.tick,.source{font-family:ui-sans-serif,system-ui,"Segoe UI",Roboto,"Helvetica Neue",Arial,
sans-serif}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;font-size:.875rem;line-height:1.4;font-variant-numeric:tabular-nums lining-nums;
margin:.3rem 0}
th{font-weight:600;text-align:left;color:var(--soft);font-size:.8rem;white-space:nowrap}
thead th{border-bottom:1px solid var(--ink);vertical-align:bottom}
th,td{padding:.34rem .8rem .34rem 0}
tbody td,tbody th{border-bottom:1px solid var(--rule);vertical-align:baseline}
tbody th{color:var(--ink);font-size:.875rem;font-weight:500;white-space:normal;min-width:8rem;max-width:17rem}
.num{text-align:right;white-space:nowrap;padding-left:.8rem}
thead .num{text-align:right}
td small{display:block;font-size:.74rem;font-weight:400;color:var(--soft)}
td.best{font-weight:700}
td.mark{padding:.1rem .8rem .1rem 0;vertical-align:middle}
td.wide{min-width:16rem;max-width:34rem}
td.code,code{font-family:ui-monospace,"SF Mono","Cascadia Mono",Consolas,"DejaVu Sans Mono",monospace;
font-size:.78rem;overflow-wrap:anywhere}
dl{font-size:.86rem;color:var(--soft);display:grid;grid-template-columns:max-content 1fr;gap:.15rem .9rem;
max-width:52rem;margin:.9rem 0}
dt{font-weight:600;color:var(--ink)}dd{margin:0}
.source{font-size:.76rem;color:var(--soft);margin-top:1.1rem;max-width:none}
.warning{background:var(--warnbg);color:var(--warn);border-left:3px solid;padding:.55rem .9rem;font-size:.92rem}
.note{color:var(--soft);font-size:.88rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(19rem,1fr));gap:1.4rem 1.6rem}
figure{margin:0}
.chart figcaption{font-size:.82rem;font-weight:600;display:flex;justify-content:space-between}
.last{color:var(--soft);font-weight:400;font-variant-numeric:tabular-nums}
.chart svg{display:block;width:100%;height:auto}
.grid{stroke:var(--rule);stroke-width:1}
.tick{fill:var(--soft);font-size:10px;font-variant-numeric:tabular-nums}
.curve{fill:none;stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}.faint{opacity:.28;stroke-width:1}
.point{stroke:none}.c0{stroke:var(--c0)}.c1{stroke:var(--c1)}.c2{stroke:var(--c2)}.c3{stroke:var(--c3)}
.c4{stroke:var(--c4)}.c5{stroke:var(--c5)}
.point{stroke-width:4}
.legend{display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;font-size:.82rem;max-width:none}
.key{display:inline-block;width:1.1rem;height:3px;vertical-align:middle;margin-right:.4rem}
.k0{background:var(--c0)}.k1{background:var(--c1)}.k2{background:var(--c2)}.k3{background:var(--c3)}
.k4{background:var(--c4)}.k5{background:var(--c5)}
.whisker{stroke:var(--soft);stroke-width:1.6}.dot{fill:var(--c0)}.zero{stroke:var(--soft);stroke-width:1;
stroke-dasharray:2 2}
.maps{display:flex;flex-wrap:wrap;gap:1.6rem 3rem}
.maps h3{margin-top:.2rem}
table.map td{text-align:right;min-width:4.4rem;padding:.4rem .6rem;border:2px solid var(--paper)}
table.map th{min-width:0;padding:.3rem .7rem .3rem 0;border:0;color:var(--soft);font-size:.8rem}
table.map thead th{text-align:right;padding:.3rem .6rem}
table.map .hot{color:#fff}table.map small{color:inherit;opacity:.75}
.bar{display:inline-block;height:.55rem;background:var(--c0);opacity:.75;vertical-align:baseline;border-radius:1px}
.bars td{border:0;padding:0 .5rem 0 0;font-size:.78rem}.bars td:last-child{min-width:6rem}
.right{color:var(--c2)}.wrong{color:var(--c1)}
details{margin:.8rem 0}summary{cursor:pointer;font-size:.9rem;color:var(--soft)}
.empty{color:var(--soft);font-size:.85rem}
footer{border-top:1px solid var(--rule);margin-top:2.5rem;padding-top:1rem;padding-bottom:3rem}
@media print{section{break-inside:avoid}nav{display:none}}
"""


@dataclass(frozen=True)
class Section:
    """One part of a report."""

    title: str
    html: str
    """Markup, trusted; the builders escape what they are given."""
    command: str = ""
    """Command that made the numbers."""
    source: str = ""
    """File they were read from."""
    notes: tuple[str, ...] = ()
    """Sentences printed under the section."""
    warning: str | None = None
    """Printed above everything else, such as `Choice.flag`."""


def page(title: str, subtitle: str, sections: list[Section]) -> str:
    """Give the whole document: a title, a table of contents, and the sections."""
    links = "".join(f'<a href="#s{place}">{escape(section.title)}</a>' for place, section in enumerate(sections))
    body = "\n".join(_section(place, section) for place, section in enumerate(sections))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav aria-label="Contents">{links}</nav></header>
<main>
{body}
</main>
<footer>One file; it loads nothing and runs no script.</footer></body></html>
"""


def _section(place: int, section: Section) -> str:
    warning = f'<p class="warning">{escape(section.warning)}</p>' if section.warning else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in section.notes)
    told = [("Command", section.command), ("From", section.source)]
    origin = " · ".join(f"{word} <code>{escape(text)}</code>" for word, text in told if text)
    origin = f'<p class="source">{origin}</p>' if origin else ""
    return f'<section id="s{place}"><h2>{escape(section.title)}</h2>\n{warning}{section.html}{notes}{origin}\n</section>'


def table(head: list[str], rows: list[list[str]], *, css: str = "") -> str:
    """Join ready cells (`<td>…`, `<th>…`) into a table that scrolls sideways where it must."""
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    top = f"<thead><tr>{''.join(head)}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{css}">{top}<tbody>{body}</tbody></table></div>'


def cell(text: object, css: str = "", *, tag: str = "td", span: int = 1) -> str:
    """Give one table cell; the text is escaped."""
    style = f' class="{css}"' if css else ""
    wide = f' colspan="{span}"' if span > 1 else ""
    return f"<{tag}{style}{wide}>{escape(str(text))}</{tag}>"
