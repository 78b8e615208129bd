"""Names of unknown origin in tables: an independent parser reads them back as they were given."""

from __future__ import annotations

from types import SimpleNamespace as Record
from typing import Any

import numpy as np
from markdown_it import MarkdownIt

from sphereface2 import markdown
from sphereface2.recognition.audit import report as audit
from sphereface2.recognition.audit.findings import Finding
from sphereface2.recognition.card import _elsewhere

NAMES = ["a|b", "`code`", r"back\|slash", "**bold** _and_ __so__", "<b>&lt;</b>", "[x](y) ~~z~~"]
BROKEN = "two\nlines\r\nand\tmore"


def cells(text: str) -> list[list[str]]:
    """The text of each cell of each row; a cell that holds more than text is not among them."""
    tokens = MarkdownIt().enable(["table", "strikethrough"]).parse(text)
    rows: list[list[str]] = []
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and rows:
            parts = token.children or []
            if all(part.type in ("text", "text_special") for part in parts):
                rows[-1].append("".join(part.content for part in parts))
    return rows


def test_cells_show_what_they_were_given() -> None:
    lines = [[name, "1"] for name in [*NAMES, BROKEN]]
    expected = [["x | y", "n"], *lines[:-1], [" ".join(BROKEN.split()), "1"]]
    assert cells(markdown.table(["x | y", "n"], lines)) == expected
    for name in NAMES:
        (token,) = (MarkdownIt().parse(markdown.code(name))[1].children or [])[:1]
        assert (token.type, token.content) == ("code_inline", name)


def test_cards_and_audits_show_names_as_they_are(tmp_path: Any, monkeypatch: Any) -> None:
    estimate = Record(value=0.01, ci=(0.0, 0.1))
    at = Record(asked=0.01, far=estimate, tar=estimate, transfer=estimate)
    sets = [Record(name=name, images=5, people=2, thresholds=[at]) for name in NAMES]
    card: Any = Record(checked=sets)
    assert [row[0] for row in cells(_elsewhere(card))[1:]] == NAMES

    monkeypatch.setattr(audit, "shown", lambda *_: np.zeros((96, 8, 3), np.uint8))
    found = [
        Finding("wrong label", k, f"{name}/0.jpg", name, -1, "", 0.5, "remove")
        for k, name in enumerate(NAMES)
    ]
    source: Any = Record(labels=[0] * len(NAMES))
    audit.write_report(tmp_path, "Audit of a|b", source, found, {"images": "6"}, 60)
    rows = cells((tmp_path / "report.md").read_text())
    assert [row[2] for row in rows[-len(NAMES) :]] == NAMES
