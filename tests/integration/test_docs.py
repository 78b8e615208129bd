"""What the README and the documentation say is tried: examples run, commands parse, pages build."""

from __future__ import annotations

import inspect
import re
import shlex
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from command_line import parsed
from mkdocs.__main__ import cli as mkdocs

from sphereface2 import backbones, heads
from sphereface2.training import command
from sphereface2.training import config as configuration

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for kind, text in _BLOCK.findall(page.read_text()) if kind == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configurations_load_and_survive_a_round_trip(path: Path, tmp_path: Path) -> None:
    config = configuration.load(path)
    assert config.name == path.stem
    again = tmp_path / "again.yaml"
    again.write_text(configuration.dump(config))
    assert configuration.load(again) == config
    assert f"configs/{path.name}" in (ROOT / "docs/training.md").read_text()


def test_the_published_recipes_hold_the_published_values() -> None:
    steps = {"vggface2_sfnet20": (100, [50, 78, 94]), "ms1m_iresnet100": (240, [80, 140, 200])}
    published = {
        "vggface2_sfnet20": (0.7, 40, 0.4, 3, 10),
        "ms1m_iresnet100": (0.8, 64, 0.5, 3, 50),
    }
    for name, (total, decays) in steps.items():
        config = configuration.load(ROOT / f"configs/{name}.yaml")
        training = config.training
        assert [round(total * share) for share in training.milestones] == decays
        assert (training.batch_size, training.lr, training.momentum) == (512, 0.1, 0.9)
        assert (training.weight_decay, training.gamma, training.schedule) == (5e-4, 0.1, "step")
        values = tuple(config.head[key] for key in ("lam", "r", "m", "t", "loss_weight"))
        assert values == published[name]


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = dict(heads.registry._HEADS._builders)
    names: dict[str, object] = {"__name__": page.stem}
    try:
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
    finally:
        heads.registry._HEADS._builders.clear()
        heads.registry._HEADS._builders.update(before)


def commands(page: Path) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    words = [shlex.split(line, comments=True) for line in lines]
    found = [line[line.index("sphereface2") + 1 :] for line in words if "sphereface2" in line]
    assert found or not any("sphereface2 " in line for line in lines)
    return found


@pytest.mark.parametrize(
    "page", [page for page in pages_with("bash") if commands(page)], ids=lambda page: page.stem
)
def test_documented_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page):
        arguments = parsed(*words)
        if words[0] == "fit":
            config = arguments["config"]
            path = None if config is None else command.find(config)
            configuration.load(path, arguments["settings"])


@pytest.mark.parametrize("page", pages_with("yaml"), ids=lambda page: page.stem)
def test_yaml_examples_are_configurations(page: Path) -> None:
    for block in blocks(page, "yaml"):
        configuration.from_dict(yaml.safe_load(block))


def test_make_targets_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", page.read_text(), re.MULTILINE)
        assert {one or other for one, other in named} <= targets, page


def test_extras_that_are_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for page in PAGES:
        for named in re.findall(r"(?:sphereface2|\.)\[([a-z0-9,-]+)\]", page.read_text()):
            assert set(named.split(",")) <= set(project["optional-dependencies"]), page


def test_links_between_files_lead_somewhere() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_table_of_losses_is_that_of_the_code() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|.*\| (.*) \| .*\|$", (ROOT / "docs/losses.md").read_text(), re.M
    )
    told = {name: set(re.findall(r"`(\w+=[^`]+)`", cell)) for name, cell in rows}
    known = {}
    for name in heads.available():
        signature = inspect.signature(type(heads.build(name, 4, 3))).parameters
        known[name] = {
            f"{key}={signature[key].default!r}"
            for key in heads.parameters(name)
            if key in signature  # the options of scaling are the same for all
        }
    assert told == known


def test_the_losses_with_all_options_of_scaling_are_named() -> None:
    text = (ROOT / "docs/scaling.md").read_text()
    told = re.findall(r"`(\w+)`", re.findall(r"one-vs-all losses, ([^;]*);", text)[0])
    options = heads.Scaling.__annotations__.keys()
    assert set(told) == {n for n in heads.available() if heads.build(n, 4, 3).scaling >= options}


def test_the_table_of_backbones_is_complete() -> None:
    text = (ROOT / "docs/backbones.md").read_text()
    assert [name for name in backbones.available() if f"`{name}`" not in text] == []


def test_the_tree_of_the_architecture_names_every_folder() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    package = ROOT / "src/sphereface2"
    parts = {path.parent.name for path in package.rglob("*.py")} - {package.name}
    assert [name for name in [*sorted(parts), "box"] if f" {name}/ " not in text] == []


class _Requests(HTMLParser):
    """Addresses that a browser fetches by itself when it opens the page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {key: value or "" for key, value in attrs}
        if tag in ("script", "img", "iframe", "source"):
            self.found.append(values.get("src", ""))
        if tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.found.append(values.get("href", ""))


def test_the_site_builds_and_asks_nothing_of_other_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    mkdocs(["build", "--strict", "--site-dir", str(tmp_path)], standalone_mode=False)
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(
        list((ROOT / "docs").glob("*.md"))
    )  # and the page for what is not found
    for page in pages:
        parser = _Requests()
        parser.feed(page.read_text())
        assert [a for a in parser.found if re.match(r"(https?:)?//", a)] == [], page
    for sheet in tmp_path.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", sheet.read_text()), sheet


def test_every_benchmark_has_its_line() -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    assert [p.name for p in (ROOT / "benchmarks").glob("*.py") if f"/{p.name}`" not in text] == []
