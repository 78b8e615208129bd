"""The command line: what it lists, refuses and leaves unimported."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import cv2
import docstring_parser
import numpy as np
import pytest
import yaml

from sphereface2 import __version__, cli
from sphereface2.training import command
from sphereface2.training.config import RunConfig

FUNCTIONS = {
    **cli.COMMANDS,
    **{f"{group} {name}": f for group, (_, t) in cli.GROUPS.items() for name, f in t.items()},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_command_and_option_has_a_help(name):
    module, function = FUNCTIONS[name].split(":")
    found = getattr(importlib.import_module(module), function)
    doc = docstring_parser.parse(inspect.getdoc(found))
    assert cli._first_line(FUNCTIONS[name]) == doc.short_description
    assert doc.short_description.endswith(".")
    described = {parameter.arg_name: parameter.description for parameter in doc.params}
    wanted = set(inspect.signature(found).parameters) - {"settings"}
    assert wanted <= set(described)
    for meaning in described.values():
        assert meaning[0].isupper() or meaning.startswith(("lfw", '"')), meaning
        assert meaning.endswith("."), meaning


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ([], "calibrate"),
        (["--help"], "calibrate"),
        (["gallery"], "reembed"),
        (["--version"], __version__),
    ],
)
def test_lists_import_nothing_heavy(words, shown):
    code = (
        "import sys; from sphereface2.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy', 'cv2', 'pydantic'} & set(sys.modules);"
        "assert not heavy, heavy; sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_the_package_offers_its_main_things_lazily():
    code = (
        "import sys, sphereface2;"
        "assert not {'torch', 'numpy'} & set(sys.modules);"
        "assert sphereface2.heads.available() and sphereface2.backbones.available();"
        "assert sphereface2.FaceEmbedder and sphereface2.Gallery;"
        "assert set(sphereface2.__all__) == set(dir(sphereface2))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(ImportError):
        from sphereface2 import FaceEmbeder  # noqa: F401


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ft"], "unknown command 'ft' .did you mean 'fit'.*; `sphereface2 --help` lists all"),
        (["galery", "add"], "did you mean 'gallery'"),
        (["gallery", "serch"], "did you mean 'search'.*; `sphereface2 gallery --help` lists all"),
        (["verify", "a.png", "b.png", "--model", "m", "--alined"], "Did you mean --aligned"),
        (["verify", "a.png"], "sphereface2 verify needs SECOND; `sphereface2 verify --help` tells"),
        (["evaluate", "m", "--seed", "one"], 'unable to convert "one" into int'),
        (["fit"], "a recipe: .*small.*--data.train"),
        (["fit", "--config", "smal"], "did you mean 'small'"),
        (["fit", "--cofnig", "small"], "did you mean '--config'"),
        (["fit", "--batch-size", "3"], "did you mean '--training.batch_size'"),
        (["fit", "--training.epoch", "3"], "did you mean 'epochs'"),
        (["study", "report", "--out", "x"], "at least one study"),
    ],
)
def test_mistakes_end_in_one_line_that_says_what_is_right(words, message, capsys):
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert len(printed.err.splitlines()) == 1
    assert re.search(message, printed.err), printed.err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("fit", "sphereface2 fit needs torch, which is not installed"),
        ("ft", "unknown command 'ft'"),
    ],
)
def test_a_package_that_is_not_installed_is_named_where_it_is_needed(word, message):
    code = (
        "import sys; sys.modules['torch'] = None; from sphereface2 import cli;"
        f"sys.exit(cli.main(['{word}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["data", "info", "SET", "--json"]])
def test_output_that_nobody_reads_any_more_is_no_error(words, tmp_path):
    (tmp_path / "ann").mkdir()
    assert cv2.imwrite(str(tmp_path / "ann" / "1.png"), np.zeros((16, 16, 3), np.uint8))
    words = [str(tmp_path) if word == "SET" else word for word in words]
    command = [sys.executable, "-m", "sphereface2", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert (process.returncode, told) == (1, b"")


@pytest.mark.parametrize("place", ["sphereface2.nothing:fit", "lzma:open"])
def test_a_broken_package_or_python_is_no_mistake_of_the_users(monkeypatch, place):
    monkeypatch.setitem(cli.COMMANDS, "fit", place)
    monkeypatch.delitem(sys.modules, "lzma", raising=False)
    monkeypatch.setitem(sys.modules, "_lzma", None)  # as where Python was built without it
    with pytest.raises(ImportError):
        cli.main(["fit"])


def test_an_interrupted_command_says_so_in_one_word(capsys, monkeypatch, tmp_path):
    def interrupted(path: Path):
        raise KeyboardInterrupt

    monkeypatch.setattr("sphereface2.data.info.info", interrupted)
    assert cli.main(["data", "info", str(tmp_path)]) == 130
    assert capsys.readouterr() == ("", "stopped\n")


def test_print_config_shows_every_setting(capsys):
    assert cli.main(["fit", "--config", "small", "--print-config", "--training.epochs", "3"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert settings["training"]["epochs"] == 3
    assert (
        settings["training"]["lr"] == command.configuration.load(command.find("small")).training.lr
    )


def test_fit_help_lists_the_settings_with_their_defaults(capsys):
    assert cli.main(["fit", "--help"]) == 0
    shown = capsys.readouterr().out
    for setting in ("--training.batch_size null", "--data.subset.people null", "--config"):
        assert setting in shown
    assert [key for key, _, meaning in command.settings_of(RunConfig) if not meaning] == []
    assert "Probability of the mirror image" in shown


def test_help_shows_defaults_as_they_are_typed(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["calibrate"], ["serve"], ["data", "audit"]):
        assert cli.main([*words, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "[default: 0.01]" in shown and "[default: 16]" in shown
    assert "[default: (" not in shown and "[default: None]" not in shown
    # --move, whose text says that none is moved
    assert re.search(r"default: none is moved, all\s+│?\s*│?\s*are removed\.\s+│", shown)


def test_a_start_alone_takes_the_data_of_the_environment(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("SPHEREFACE2_DATA", raising=False)
    assert cli.main(["fit", "--start-from", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell):
    script = cli.build().generate_completion(shell=shell)
    for word in ("calibrate", "reembed", "detector-weights"):
        assert word in script
