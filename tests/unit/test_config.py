"""The configuration: overrides, types, and errors that name the nearest setting."""

from pathlib import Path

import pytest

from sphereface2.errors import UserError
from sphereface2.training import config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def test_overrides_win_over_the_file_and_are_typed(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("training:\n  lr: 0.3\n  weight_decay: 5e-4\nhead:\n  name: cosface\n")
    loaded = config.load(path, ["--training.lr=0.2", "--training.clip-norm", "null", "--seed", "7"])
    assert loaded.training.lr == 0.2
    assert loaded.training.weight_decay == 5e-4  # YAML 1.1 alone would call this text
    assert loaded.training.clip_norm is None
    assert loaded.seed == 7
    assert loaded.head == {"name": "cosface"}


def test_dump_reads_back_as_the_same_configuration(tmp_path: Path) -> None:
    wanted = config.load(None, ["--head.name", "sphereface2", "--head.r", "64", "--name", "x"])
    path = tmp_path / "config.yaml"
    path.write_text(config.dump(wanted))
    assert config.load(path) == wanted


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config.load(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.epoch=3", "did you mean 'epochs'"),
        ("--trainig.epochs=3", "did you mean 'training'"),
        ("--data.augmentation.flipp=1", "did you mean 'flip'"),
        ("--head.margn=0.4", "margin_type"),
        ("--head.name=sphereface3", "sphereface2"),
        ("--backbone.name=sfnet21", "sfnet20"),
        ("--backbone.widht=0.5", "width"),
        ("--training.epochs=three", "training.epochs"),
        ("--training.epochs=-1", "above 0"),
        ("--training.optimizer=adam", "optimizer"),
        ("--head.m=-1", "m"),
        ("--data.people_per_batch=8", "images_per_person"),
        ("--data.augmentation.size=96", "contradicts"),
        ("training.epochs=3", "--key value"),
        ("--training.epochs", "needs a value"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config.load(None, [override])
    assert "\n" not in str(caught.value)
