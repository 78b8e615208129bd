"""The command line: names each command and the function it runs.

A function's signature, defaults and docstring are the command's options and help. Its module is
imported when the command is run; the list of commands shows the docstrings' first lines, which are
read without importing.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from cyclopts import (
    App,
    CycloptsError,
    MissingArgumentError,
    Parameter,
    Token,
    UnknownCommandError,
    UnusedCliTokensError,
    convert,
)

from sphereface2.console import accept_any_encoding, note
from sphereface2.errors import Stopped, UserError, did_you_mean
from sphereface2.signals import PARENT, in_rank
from sphereface2.version import __version__

COMMANDS = {
    "fit": "sphereface2.training.command:fit",
    "evaluate": "sphereface2.recognition.evaluate:evaluate",
    "calibrate": "sphereface2.recognition.calibrate:calibrate",
    "verify": "sphereface2.recognition.verify:verify",
    "embed": "sphereface2.recognition.features:embed_set",
    "export": "sphereface2.recognition.export:export",
    "import": "sphereface2.recognition.importing:import_weights",
    "align": "sphereface2.align.folder:align",
    "serve": "sphereface2.recognition.service.commands:serve",
}
"""Commands and their functions, ``module:function``."""

GROUPS = {
    "gallery": (
        "Enrol people and search for faces among them.",
        {
            "add": "sphereface2.recognition.gallery.enrol:add",
            "search": "sphereface2.recognition.gallery.commands:search",
            "verify": "sphereface2.recognition.gallery.commands:verify",
            "set": "sphereface2.recognition.gallery.commands:set_metadata",
            "rename": "sphereface2.recognition.gallery.commands:rename",
            "remove": "sphereface2.recognition.gallery.commands:remove",
            "list": "sphereface2.recognition.gallery.commands:list_people",
            "stats": "sphereface2.recognition.gallery.commands:stats",
            "index": "sphereface2.recognition.gallery.commands:index",
            "compact": "sphereface2.recognition.gallery.commands:compact",
            "reembed": "sphereface2.recognition.gallery.enrol:reembed",
        },
    ),
    "keys": (
        "Manage the API keys of the service.",
        {
            "add": "sphereface2.recognition.service.commands:add_key",
            "list": "sphereface2.recognition.service.commands:list_keys",
            "remove": "sphereface2.recognition.service.commands:remove_key",
        },
    ),
    "data": (
        "Inspect, clean, convert and fetch data sets.",
        {
            "info": "sphereface2.data.info:info",
            "audit": "sphereface2.recognition.audit.commands:audit",
            "cluster": "sphereface2.recognition.audit.cluster:cluster",
            "convert": "sphereface2.data.convert:convert",
            "fetch": "sphereface2.data.fetch:fetch",
        },
    ),
    "study": (
        "Compare losses and settings over seeds and data conditions.",
        {
            "run": "sphereface2.study.runner:run_study",
            "report": "sphereface2.study.report:report",
        },
    ),
}
"""Groups of commands: what each is for, and its commands."""

_OPTIONS = {"as_json": "json", "fars": "far", "suites": "suite", "run": "run-folder"}
"""Options whose names are not those of the parameters."""


def build(words: Sequence[str] = ()) -> App:
    """The command line's parser.

    Args:
        words: what it will parse. Where they name no command, each command gets its line in the
            list of commands.
    """
    app = App(
        name="sphereface2",
        help="Train, evaluate and use face recognition by binary classification.",
        version=f"sphereface2 {__version__}",
        help_format="plaintext",
        default_parameter=Parameter(
            negative_iterable=(),
            name_transform=_option,
            converter=_converted,
            show_default=_default,
        ),
        result_action="return_none",
        print_error=False,
        exit_on_error=False,
        suppress_keyboard_interrupt=False,  # `main` says that it was one
    )
    app.register_install_completion_command()
    first, second = [*words, "", ""][:2]
    _add(app, COMMANDS, listed=first not in {*COMMANDS, *GROUPS})
    for name, (meaning, commands) in GROUPS.items():
        group = App(name=name, help=meaning)
        _add(group, commands, listed=first == name and second not in commands)
        app.command(group)
    if first == "fit" and {"--help", "-h"}.intersection(words):
        from sphereface2.training.command import settings_help

        app["fit"].help_epilogue = settings_help()
    return app


def _add(app: App, commands: Mapping[str, str], *, listed: bool) -> None:
    for name, function in commands.items():
        # A line that is given here would replace the whole docstring in the command's own help.
        line = _first_line(function) if listed else None
        app.command(function, name=name, help=line, help_format="markdown")


def _option(parameter: str) -> str:
    return _OPTIONS.get(parameter, parameter.strip("_").replace("_", "-"))


def _default(value: Any) -> str | None:
    """A default in a command's help: as it is typed, and nothing where there is none."""
    values = value if isinstance(value, tuple) else (value,)
    return None if value is None else ", ".join(map(str, values)) or None


def _converted(kind: Any, tokens: Sequence[Token]) -> Any:
    """The value of an argument's words.

    Of a home (``--out=~/x``, which shells leave as it is) comes its path. Refused are empty words,
    which variables that are not set leave and which would be the current folder, and fractions of
    whole numbers, which would be rounded.
    """
    given = []
    for token in tokens:
        word = token.value
        if not word:
            raise UserError(
                "an empty argument, as a shell variable leaves that is not set; give a value"
            )
        if int in (kind, *get_args(kind)) and re.fullmatch(r"[+-]?\d*\.\d*[1-9]\d*", word):
            raise UserError(f"{word} is not a whole number")
        given.append(token.evolve(value=os.path.expanduser(word)) if word[:2] == "~/" else token)
    return convert(kind, given)


def _first_line(function: str) -> str:
    """The first line of a function's docstring, read from its module's source."""
    module, name = function.split(":")
    path = Path(__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    raise LookupError(f"{path} has no function {name}")


def main(words: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    A mistake of the user's (`UserError`, a wrong option, a file that the system refuses) ends in
    one sentence on standard error and status 2; a signal that a command ends in order for, in
    status 128 and the signal's number. Output that nobody reads any more, as after ``| head``, ends
    it without a word, in status 1 (as of what rich prints).

    Args:
        words: the command and its options; None: those that the process was started with.
    """
    accept_any_encoding()
    if PARENT in os.environ:
        in_rank()
    words = sys.argv[1:] if words is None else list(words)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn  # type: ignore[assignment]
            build(words)(words)
            print(end="", flush=True)  # here it can be told that it fails
    except Stopped as stop:
        note(stop)
        return stop.status
    except KeyboardInterrupt:  # of a command that keeps nothing, or before it has begun
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except UserError as error:
        message = str(error)
    except CycloptsError as error:
        message = _misuse(error)
    except OSError as error:
        if (refusal := _refusal(error)) is None:
            return 1
        message = refusal
    except ImportError as error:
        if (module := _missing(error)) is None:
            raise
        message = (
            f"{' '.join(['sphereface2', *words[:1]])} needs {module}, which is not installed; "
            "pip install sphereface2 installs it (images for serving leave it out)"
        )
    except (MemoryError, RuntimeError) as error:
        if (why := _memory_wanted(error)) is None:
            raise
        message = f"there is not enough memory ({why}): choose a smaller batch, image or network"
    else:
        return 0
    note(f"error: {message}")
    return 2


def _misuse(error: CycloptsError) -> str:
    """What is wrong with the words given."""
    name = " ".join(["sphereface2", *(error.command_chain or ())])
    more = f"; `{name} --help` tells what it takes"
    if isinstance(error, UnknownCommandError):  # its own text imports every command, torch too
        group = (error.command_chain or ("",))[0]
        known = [*GROUPS[group][1]] if group in GROUPS else [*COMMANDS, *GROUPS]
        word = (error.unused_tokens or [""])[0]
        return f"unknown command {word!r}{did_you_mean(word, known)}; `{name} --help` lists all"
    if isinstance(error, UnusedCliTokensError):
        unused = [*map(repr, error.unused_tokens or ())]
        rest = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        return f"unexpected argument {', '.join(unused[:3])}{rest}{more}"
    if isinstance(error, MissingArgumentError):
        keyword = error.keyword
        told = f"{name} needs \\1{more}." if keyword is None else f"{keyword} needs a value{more}."
        return re.sub(r"^.* parameter (\S+) requires an argument\.", told, str(error)).rstrip(".")
    return str(error)


def _refusal(error: OSError) -> str | None:
    """What the system refuses, and of what file; None: nobody reads the output any more."""
    file = error.filename2 or error.filename  # of a renaming, the name that was wanted
    if file is not None:
        return f"{file}: {error.strerror}"
    try:
        print(flush=True)
    except BrokenPipeError:  # as after `| head`, which has all it wants
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed at exit
        return None
    except OSError as refused:
        return f"standard output cannot be written: {refused.strerror}"
    return str(error)


def _missing(error: BaseException) -> str | None:
    """The package whose absence an import failed for; None: it failed for something else."""
    while error.__cause__ is not None:  # the parser's error comes from that of the import
        error = error.__cause__
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    # A part is missing of a broken package, or of a Python that was built without it.
    broken = name is None or "." in name or name in sys.stdlib_module_names
    return None if broken else name


def _memory_wanted(error: BaseException) -> str | None:
    """What an error says of memory that could not be had, on a device or not; None: it is another.

    torch is not imported for its class: many commands do without.
    """
    first = str(error).partition("\n")[0]
    told = ("out of memory", "allocate memory", "not enough memory")
    if isinstance(error, MemoryError) or any(words in first for words in told):
        return first.rpartition("Allocator: ")[2].partition(". ")[0] or "the system refuses it"
    return None


def _warn(message: Warning | str, *_: object) -> None:
    """Print a warning on one line, without the place in the code that it comes from."""
    note(f"warning: {message}")


if __name__ == "__main__":
    sys.exit(main())
