"""Markdown: tables, and text of unknown origin in them."""

from __future__ import annotations

import re
from collections.abc import Sequence


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""

    __slots__ = ()


def escape(text: str) -> Markdown:
    r"""Text that Markdown shows as it is, on one line, in a table's cell too.

    Examples:
        >>> print(escape("a|b\n`c` <d> __e"))
        a\|b \`c\` \<d\> \_\_e
        >>> print(escape(Markdown("**a**")))
        **a**
    """
    if isinstance(text, Markdown):
        return text
    return Markdown(_SPECIAL.sub(r"\\\g<0>", " ".join(text.split())))


# An underscore within a word emphasises nothing.
_SPECIAL = re.compile(r"[\\`*\[\]<>|&~]|(?<![^\W_])_|_(?![^\W_])")


def code(text: str) -> Markdown:
    """Text as a code span, on one line.

    Examples:
        >>> print(code("a.pt"), code("`|`"))
        `a.pt` `` `|` ``
    """
    line = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    edge = " " if "`" in line else ""
    return Markdown(f"{fence}{edge}{line}{edge}{fence}")


def lines(*parts: str) -> Markdown:
    """Lines of one cell."""
    return Markdown("<br>".join(map(escape, parts)))


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """A table whose first ``left`` columns are text and the others numbers; all cells are escaped.

    Examples:
        >>> print(table(["set", "images"], [["a|b", "12"]]), end="")
        | set | images |
        | --- | ---: |
        | a\\|b | 12 |
    """
    rule = [Markdown("---" if k < left else "---:") for k in range(len(header))]
    return "".join(f"| {' | '.join(map(escape, line))} |\n" for line in (header, rule, *rows))
