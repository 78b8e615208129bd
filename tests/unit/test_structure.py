"""The house stays one that can be lived in: `benchmarks/structure.py` prints these figures."""

import ast
import subprocess
import sys
from pathlib import Path

import structure

# To be cut; nothing joins them.
LONG_FUNCTIONS = {
    "heads/kernels.py:_block_terms",
    "recognition/export.py:export",
    "recognition/gallery/commands.py:search",
    "recognition/gallery/enrol.py:add",
    "recognition/gallery/enrol.py:reembed",
}


def test_no_circle_of_files():
    assert structure.circles() == []


def test_files_and_functions_are_short():
    files = {
        name
        for name, text in structure.files().items()
        if len(text.splitlines()) > structure.MAX_FILE
    }
    assert files == set()
    functions = {name for name, _ in structure.long_functions()}
    assert functions <= LONG_FUNCTIONS


def test_what_windows_lacks_is_imported_where_it_is_used():
    unix = {"fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"}
    for name, text in structure.files().items():
        for node in ast.parse(text).body:
            names = [one.name for one in getattr(node, "names", ())]
            assert not unix.intersection([*names, getattr(node, "module", None)]), name


def test_a_circle_would_be_found(tmp_path):
    """Imports for type checkers and those inside functions count."""
    package = tmp_path / "sphereface2"
    package.mkdir()
    (package / "__init__.py").write_text("")
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sphereface2 import b\n"
    (package / "a.py").write_text(typed)
    (package / "b.py").write_text("def f():\n    from sphereface2.a import x\n")
    code = "import structure; print(*structure.circles())"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": f"{tmp_path}:{Path(structure.__file__).parent}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(found.stdout.split("'")[1::2]) == {"sphereface2.a", "sphereface2.b"}
