"""The exception that the command line turns into a single sentence, and help with its wording."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in what the user gave: a bad file, a wrong option, a missing path.

    The message is one sentence that names the thing and the remedy. The command line prints it
    without a traceback and exits with status 2; library callers catch it as a ``ValueError``.
    """


def did_you_mean(name: object, candidates: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for the candidate nearest to ``name``, or nothing."""
    near = difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""
