import tarfile
from functools import partial
from pathlib import Path

import pytest
import yaml

from sphereface2.errors import UserError
from sphereface2.study import design, runner
from sphereface2.training import config as configuration

ROOT = Path(__file__).parents[2]
UNFINISHED = {"claim", "confirmation"}
"""Of which a part is published."""
STUDIES = sorted((ROOT / "configs" / "study").glob("*.yaml"))

BASE = {
    "data": {"validation_people": 4, "test_people": 4},
    "training": {"epochs": 1},
    "validation": {"pairs": [], "fars": [0.1, 0.001]},
}
TREE = {
    "base": BASE,
    "seeds": [0, 1],
    "baseline": "cosface",
    "arms": {
        "cosface": {
            "settings": {"head": {"name": "cosface", "s": 30}},
            "trials": [{"head.m": 0.1}, {"head.m": 0.2}],
        },
        "normface": {"settings": {"head": {"name": "normface"}}},
    },
    "conditions": {"clean": {}, "noisy": {"data.label_noise.share": 0.2}},
    "sweeps": {"s": {"arm": "cosface", "key": "head.s", "values": [30, 64]}},
}


def write(folder: Path, tree: dict, name: str = "study.yaml") -> Path:
    path = folder / name
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def changed(**sections):
    return TREE | sections


def test_a_study_becomes_its_cells(tmp_path):
    study = design.load(write(tmp_path, TREE))
    assert study.name == "study"
    trials = design.trials(study)
    assert [(cell.arm, cell.changed, cell.seed) for cell in trials] == [
        ("cosface", {"head.m": 0.1}, 0),
        ("cosface", {"head.m": 0.2}, 0),
    ]
    cells = design.grid(study, {"cosface": {"head.m": 0.2}, "normface": {}})
    grid = [cell for cell in cells if cell.role == "grid"]
    places = [(c.seed, c.condition, c.arm) for c in grid]
    assert places == [
        (seed, condition, arm)
        for condition in ("clean", "noisy")
        for seed in (0, 1)
        for arm in ("cosface", "normface")
    ]
    of = dict(zip(places, grid, strict=True))
    noisy = of[1, "noisy", "cosface"].config
    assert noisy.data.label_noise.share == 0.2
    assert noisy.seed == 1
    assert noisy.head == {"name": "cosface", "s": 30, "m": 0.2}
    # A chosen trial and a sweep's value that the arm has anyway are the grid's own cell.
    sweep = [cell for cell in cells if cell.role == "sweep"]
    assert [cell.config.head["s"] for cell in sweep] == [30, 64]
    assert sweep[0].key == of[0, "clean", "cosface"].key == trials[1].key
    assert sweep[1].key != sweep[0].key
    assert design.swept_value(study, study.sweeps["s"], {"cosface": {"head.m": 0.2}}) == 30


def test_a_key_tells_what_determines_a_cell_and_nothing_else(tmp_path):
    def key(base, name="study.yaml"):
        study = design.load(write(tmp_path, changed(base=base), name))
        return design.trials(study)[0].key

    def with_(section, **settings):
        return BASE | {section: BASE.get(section, {}) | settings}

    first = key(BASE)
    assert key(BASE, "another.yaml") == first
    assert key(with_("training", log_every=3, threads=2, checkpoint_every=7)) == first
    assert key(with_("training", momentum=0.9)) == first  # the default, spelt out
    assert key(BASE | {"output": "elsewhere"}) == first
    for base in (
        with_("training", epochs=2),
        with_("training", lr=0.3),
        with_("data", split_seed=1),
        with_("data", augmentation={"flip": 0.0}),
    ):
        assert key(base) != first


def test_a_study_extends_another(tmp_path):
    write(tmp_path, TREE, "parent.yaml")
    child = {
        "extends": "parent.yaml",
        "arms": ["cosface"],
        "seeds": [5],
        "sweeps": {},
        "base": {"training": {"lr": 0.3}},
    }
    study = design.load(write(tmp_path, child, "child.yaml"))
    assert study.name == "child"
    assert list(study.arms) == ["cosface"]
    assert list(study.conditions) == ["clean", "noisy"]
    assert not study.sweeps
    config = design.grid(study, {})[0].config
    assert (config.training.lr, config.training.epochs, config.seed) == (0.3, 1, 5)
    with pytest.raises(UserError, match=r"no arm cosfac \(did you mean 'cosface'"):
        design.load(write(tmp_path, child | {"arms": ["cosfac"]}, "wrong.yaml"))
    with pytest.raises(UserError, match="extends"):
        design.load(write(tmp_path, {"extends": "loop.yaml"}, "loop.yaml"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"arms": {}}, "at least one arm"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [0, 1, 0]}, "seeds must name each once, and 0 stands twice"),
        (
            {"sweeps": {"s": {"arm": "cosface", "key": "head.s", "values": [30, 64, 30.0]}}},
            "sweeps.s.values must name each once",
        ),
        ({"sweeps": {"s": {"key": "head.s", "values": [1]}}}, "sweeps.s.arm must be given in /"),
        ({"baseline": "arcface"}, "names the arm arcface"),
        ({"armz": {}}, "armz"),
        ({"seeds": ["x"]}, "seeds"),
        ({"conditions": {"clean": {"data.label_noize.share": 1}}}, "label_noize"),
        ({"sweeps": {"s": {"arm": "cosface", "key": "head.q", "values": [1]}}}, "q"),
        ({"base": BASE | {"data": {"validation_people": 4}}}, "test_people"),
        ({"base": BASE | {"data": {"validation_people": 0, "test_people": 4}}}, "judged on"),
        ({"base": BASE | {"validation": {}}}, "must not choose"),
        ({"selection": {"far": 0.01}}, r"selection.far = 0.01.* among .*\(0.1, 0.001\)"),
        ({"conditions": {"clean": {}, "more": {"data.train": "x"}}}, "data.train under base alone"),
        (
            {"arms": {"cosface": {"settings": {"head": {"name": "cosface"}}, "only": ["cleen"]}}},
            r"only in cleen \(did you mean 'clean'",
        ),
        (
            {
                "arms": {
                    "cosface": {
                        "settings": {"head": {"name": "cosface"}},
                        "trials": [{"head": {"m": 0.1}}],
                    }
                }
            },
            "would replace all of head; name single settings, as in head.m",
        ),
        (
            {
                "arms": TREE["arms"]
                | {"arcface": {"settings": {"head": {"name": "arcface"}}, "trials": [{"seed": 1}]}}
            },
            "tuned alike",
        ),
    ],
)
def test_a_mistake_is_told_before_anything_runs(tmp_path, sections, message):
    with pytest.raises(UserError, match=message):
        design.load(write(tmp_path, changed(**sections)))


@pytest.mark.parametrize("text", ["", "seeds: [0]"])
def test_a_study_without_arms_is_told_what_it_needs(tmp_path, text):
    (tmp_path / "study.yaml").write_text(text)
    with pytest.raises(UserError, match="has no arms, which are what a study compares: give them"):
        design.load(tmp_path / "study.yaml")


def test_the_studies_of_the_project_are_valid():
    folder = Path(__file__).parents[2] / "configs" / "study"
    studies = {path.stem: design.load(path) for path in sorted(folder.glob("*.yaml"))}
    assert {"losses", "noise", "principles", "people"} <= set(studies)
    # What they share is run once: where they judge on the same people, they have the arms as the
    # study of losses tuned them.
    tuned = {cell.key for cell in design.trials(studies["losses"])}
    for study in studies.values():
        if study.name in UNFINISHED:  # of other people, with trials of their own
            continue
        keys = {cell.key for cell in design.trials(study)}
        everybody = study.base["data"]["held_out_max_images"] is None
        assert not keys & tuned if everybody else keys <= tuned


def leaves(tree: dict, before: str = "") -> set[str]:
    """The names of nested settings, ``section.key``."""
    names = set()
    for key, value in tree.items():
        nested = isinstance(value, dict)
        names |= leaves(value, f"{before}{key}.") if nested else {f"{before}{key}"}
    return names


def without_effect() -> set[str]:
    sections = design.WITHOUT_EFFECT.items()
    return {f"{section}.{name}".lstrip(".") for section, names in sections for name in names}


def test_the_published_cells_are_those_of_the_studies(tmp_path):
    with tarfile.open(ROOT / "reports" / "cells.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    keys, published = set(), set()
    for path in STUDIES:
        study = design.load(path)
        chosen, best = runner.best_trials(study, partial(runner.read, tmp_path))
        finals = design.finalists(study, {arm: best.get(arm, -1) for arm in study.arms})
        grid = design.grid(study.only(chosen), chosen, finals)
        asked = {cell.key for cell in [*design.trials(study), *grid]}
        published |= asked if study.name not in UNFINISHED else set()
        keys |= asked
    there = {path.parent.name for path in tmp_path.glob("*/cell.json")}
    assert len(there) == 556
    assert published <= there <= keys


def test_no_default_of_the_package_decides_a_cell(monkeypatch):
    """So a changed default gives no published cell another key, and no study two defaults."""
    trees = []

    def from_dict(tree, where):
        trees.append(tree)
        return build(tree, where)

    build = configuration.from_dict
    monkeypatch.setattr(configuration, "from_dict", from_dict)
    design.load(ROOT / "configs" / "study" / "losses.yaml")
    assert trees
    settings = leaves(configuration.to_dict(configuration.RunConfig()))
    decided = settings - without_effect() - {"data.augmentation.size"}
    for tree in trees:
        assert decided <= leaves(tree), "add the new setting to study/defaults.json"


def test_only_the_best_of_each_group_run_on(tmp_path):
    arms = {
        name: {"settings": {"head": {"name": "cosface", "s": 10 + k}}, "trials": [{"head.m": 0.1}]}
        for k, name in enumerate("abcd")
    }
    finals = [{"arms": ["a"]}, {"arms": ["b", "c", "d"], "best": 2}]
    tree = {**TREE, "baseline": "a", "arms": arms, "finals": finals, "sweeps": {}}
    study = design.load(write(tmp_path, tree))
    # A group is decided when all of its arms are tuned.
    assert design.finalists(study, {"b": 0.3, "d": 0.1}) == []
    assert design.finalists(study, {"a": 0.2, "b": 0.3, "d": 0.1}) == ["a"]
    best = design.finalists(study, {"a": 0.2, "b": 0.3, "c": 0.1, "d": 0.2})
    assert best == ["a", "b", "d"]
    cells = design.grid(study, {name: {"head.m": 0.1} for name in arms}, best)
    counts = {
        name: sum(cell.arm == name and cell.role == "grid" for cell in cells) for name in arms
    }
    assert counts == {"a": 4, "b": 4, "c": 1, "d": 4}
    arms["a"].pop("trials")
    study = design.load(write(tmp_path, tree))  # nothing is to be decided about it
    assert design.finalists(study, {"a": -1.0}) == ["a"]
    arms["b"].pop("trials")
    with pytest.raises(UserError, match="finals are decided by trials, and b has none"):
        design.load(write(tmp_path, tree))
