"""The command line in the tests' own process, which spares the seconds that imports take."""

import io
from contextlib import redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

from sphereface2.cli import build, main


class Ran(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def ran(*words: object) -> Ran:
    """What a command prints, and its exit status."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main([*map(str, words)])
    return Ran(status, out.getvalue(), err.getvalue())


def call(*words: object) -> Ran:
    """As `ran`, but a UserError is raised."""
    given = [*map(str, words)]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        build(given)(given)
    return Ran(0, out.getvalue(), err.getvalue())


def parsed(*words: str) -> dict[str, Any]:
    """The arguments that a command would get; a word that it does not know is an error."""
    _, bound, _ = build(words).parse_args(words)
    bound.apply_defaults()
    return bound.arguments
