"""A report as a page: Markdown, and the same as one HTML file without anything from elsewhere."""

from __future__ import annotations

import html
from pathlib import Path

import markdown

from sphereface2.files import atomic_write

_STYLE = """
:root { color-scheme: light dark; --page: #f6f6f9; --card: #fff; --text: #1b1c25;
  --quiet: #5c5f70; --line: #d9dae4; --accent: #4450b8; }
@media (prefers-color-scheme: dark) { :root { --page: #12131a; --card: #1b1d27; --text: #ecedf4;
  --quiet: #a6a9bb; --line: #323544; --accent: #a3adff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1, h2, h3 { line-height: 1.25; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; }
h2 { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
code { font-size: .9em; overflow-wrap: anywhere; }
blockquote { margin: 1rem 0; padding: .1rem 1rem; border-left: 4px solid var(--accent);
  background: var(--card); border-radius: 0 8px 8px 0; }
nav { padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; font-size: .95rem; }
nav ul { margin: .25rem 0; padding-left: 1.2rem; }
nav summary { cursor: pointer; font-weight: 600; }
.box { overflow-x: auto; margin: 1rem 0; background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; vertical-align: top; white-space: nowrap; line-height: 1.45; }
/* Numbers are aligned by an attribute, text is not: text may wrap, but for a row's name. */
td:not([style]) { white-space: normal; min-width: 14rem; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--card);
  white-space: nowrap; min-width: 0; }
@media (max-width: 40rem) {
  th, td { padding: .4rem .5rem; }
  td:not([style]) { min-width: 10rem; }
  td:first-child, th:first-child { white-space: normal; max-width: 8rem; min-width: 6.5rem;
    overflow-wrap: anywhere; }
  td[style] { vertical-align: bottom; }
}
th { color: var(--quiet); font-weight: 600; text-align: left; vertical-align: bottom; }
tr + tr td, tbody tr:first-child td { border-top: 1px solid var(--line); }
.picture { max-width: none; overflow-x: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 10px; padding: .75rem; }
.picture img { display: block; width: min(100%, 52rem); min-width: 30rem; height: auto;
  margin: 0 auto; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def write(folder: Path, name: str, title: str, text: str) -> None:
    """Write ``text``, Markdown, as ``folder/NAME.md`` and as ``folder/NAME.html``.

    In the HTML, contents follow the first heading where there are headings below it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / f"{name}.md", text.encode())
    renderer = markdown.Markdown(
        extensions=["tables", "sane_lists", "toc"],
        extension_configs={"toc": {"toc_depth": "2-3"}},
    )
    body = renderer.convert(text.replace(".md)", ".html)"))
    # Wide tables and pictures scroll inside a box of their own, not the page.
    body = body.replace("<table>", '<div class="box" tabindex="0"><table>')
    body = body.replace("</table>", "</table></div>").replace("<p><img", '<p class="picture"><img')
    contents: str = renderer.toc  # type: ignore[attr-defined]
    if "<li>" in contents:
        contents = f"<nav><details><summary>Contents</summary>{contents}</details></nav>"
        body = body.replace("</h1>", f"</h1>\n{contents}", 1)
    page = _PAGE.format(title=html.escape(title), style=_STYLE, body=body)
    atomic_write(folder / f"{name}.html", page.encode())
