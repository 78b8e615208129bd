"""The exception that the command line turns into a single sentence, and help with its wording."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a bad file, a wrong option, a missing path.

    The message is one sentence that names the thing and the remedy. The command line prints it
    without a traceback and exits with status 2; library callers catch it as a ``ValueError``.
    """


class Stopped(BaseException):
    """A signal asked the command to end, and it ended in order.

    The message says what is kept and how to go on; the command line prints it and exits with
    ``status``, 128 + the signal's number.
    """

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.status = 128 + signum


def did_you_mean(name: object, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the candidate nearest to ``name``, or nothing."""
    near = difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def counted(number: float, thing: str) -> str:
    """A number of things, in the singular where it is one.

    Examples:
        >>> counted(1, "image"), counted(2_000, "broken link"), counted(0, "person")
        ('1 image', '2,000 broken links', '0 people')
        >>> counted(1.0, "epoch"), counted(2.5, "epoch")
        ('1 epoch', '2.5 epochs')
    """
    many = "people" if thing == "person" else f"{thing}s"
    shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
    return f"{shown} {thing if number == 1 else many}"


def check_count(name: str, value: object, least: int) -> None:
    """Raise a UserError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        remedy = _remedy(value, "__index__", int)
        raise UserError(f"{name} must be an integer ≥ {least}, got {value!r}{remedy}")


def _remedy(value: object, method: str, kind: type) -> str:
    """``: give int(…) of it`` for what is no int, but an array's or a tensor's; else nothing."""
    like = hasattr(value, method) and not isinstance(value, int | float)
    return f": give {kind.__name__}(…) of it" if like else ""


def check_flag(name: str, value: object) -> None:
    """Raise a UserError unless ``value`` is true or false."""
    if not isinstance(value, bool):
        raise UserError(f"{name} must be true or false, got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a UserError unless ``value`` is one of ``choices``."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise UserError(f"{name} must be one of {listed}, got {value!r}")


def check_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    """Raise a UserError unless ``value`` is a finite number within the bounds given.

    ``above`` and ``below`` exclude the bound, ``least`` and ``most`` include it.
    """
    bounds = [
        (sign, bound, compare)
        for sign, bound, compare in (
            (">", above, operator.gt),
            ("≥", least, operator.ge),
            ("<", below, operator.lt),
            ("≤", most, operator.le),
        )
        if bound is not None
    ]
    if not (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and abs(value) < math.inf
        and all(compare(value, bound) for _, bound, compare in bounds)
    ):
        wanted = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in bounds) or "finite"
        remedy = _remedy(value, "__float__", float)
        raise UserError(f"{name} must be a number {wanted}, got {value!r}{remedy}")
