"""The table of optional packages is that of pyproject.toml, and a missing one is one sentence."""

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from sphereface2.errors import UserError
from sphereface2.extras import EXTRAS, require

README = Path(__file__).parents[2] / "README.md"
PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]


def distributions(extra: str) -> set[str]:
    """The packages that an extra brings, without those of other extras in it."""
    names = {re.match(r"[\w.-]+", one)[0] for one in PROJECT["optional-dependencies"][extra]}
    return {name.lower().replace("_", "-") for name in names} - {"sphereface2"}


@pytest.mark.parametrize("module", EXTRAS)
def test_each_module_comes_with_its_extra(module):
    pytest.importorskip(module)
    brought = {name.lower().replace("_", "-") for name in packages_distributions()[module]}
    assert brought & distributions(EXTRAS[module])


def test_all_holds_every_extra_for_use():
    (listed,) = PROJECT["optional-dependencies"]["all"]
    names = set(re.search(r"\[(.*)\]", listed)[1].split(","))
    assert names == set(PROJECT["optional-dependencies"]) - {
        "all",
        "test",
        "docs",
        "dev",
        "teacher-dlib",
        "examples",
    }
    assert set(EXTRAS.values()) == names


def test_a_missing_package_names_the_command_that_brings_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"networks of timm need timm.*'sphereface2\[timm\]'"):
        require("networks of timm", "timm")


def test_the_readme_lists_the_extras_there_are():
    rows = re.findall(r"^\| `([\w-]+)` \|[^|]*\|$", README.read_text(), re.MULTILINE)
    assert set(rows) == set(PROJECT["optional-dependencies"]) - {"test", "docs", "dev"}


def test_extras_are_spelled_the_same_everywhere():
    root = Path(__file__).parents[2]
    for file in [*root.glob("src/**/*.py"), *root.glob("docs/*.md"), root / "README.md"]:
        for extras in re.findall(r"sphereface2\[([\w,]+)\]", file.read_text()):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), file
