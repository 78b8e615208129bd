"""What mkdocs does to a page beyond its plugins: sets formulas and lists the settings of a run."""

import re
from html import unescape
from typing import Any

from latex2mathml.converter import convert

from sphereface2.training.command import settings_of
from sphereface2.training.config import RunConfig
from sphereface2.training.sections import shown

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(html: str, **_: Any) -> str:
    """Set formulas as MathML, which browsers draw without a script; keep figures on one line."""

    def set_one(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(unescape(match[2]), display=display)

    html = html.replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")
    html = re.sub(r"(\de-)(?=\d+</th>)", "\\1\N{WORD JOINER}", html)
    return _FORMULA.sub(set_one, html)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the table of settings where a page asks for it."""
    if "<!-- settings -->" not in markdown:
        return markdown
    rows = ["| setting | default | meaning |", "|---|---|---|"]
    for key, default, meaning in settings_of(RunConfig):
        meaning = meaning.replace("``", "`").replace("|", "\\|")
        value = shown(list(default) if isinstance(default, tuple) else default)
        rows.append(f"| `{key}` | `{value}` | {meaning} |")
    return markdown.replace("<!-- settings -->", "\n".join(rows))
