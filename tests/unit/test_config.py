"""The configuration: overrides, types, and errors that name the nearest setting."""

from pathlib import Path

import pytest

from sphereface2.errors import UserError
from sphereface2.training import command, config, sections

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


def test_another_head_does_not_get_what_a_file_has_for_its_own(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("head: {name: sphereface2, lam: 0.8, m: 0.3, streaming: true}\n")
    assert config.load(path, ["--head.s", "9", "--head.name", "cosface"]).head == {
        "name": "cosface",
        "s": 9,
        "streaming": True,
    }
    same = config.load(path, ["--head.name", "sphereface2", "--head.m", "0.2"]).head
    assert (same["lam"], same["m"]) == (0.8, 0.2)


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
        ("--training.epochs=yes", "epochs must be a number, got true in the command line"),
        ("--data.augmentation.erase_area=[0, true]", "erase_area.1 must be a number, got true"),
        ("--data.workers=off", "workers must be a number, got false"),
        ("--training.lr_factors.name=on", "lr_factors.name must be a number, got true"),
        ("--training.lr=1:30", "lr must be a valid number, .* got '1:30'"),
        ("--head.m=1:30", "m must be a number ≥ 0, got '1:30'"),
        ("--training.epochs=-1", "epochs must be greater than 0, got -1 in the command line"),
        ("--training.optimizer=adam", "optimizer"),
        ("--head.m=-1", "m"),
        ("--data.people_per_batch=8", "images_per_person"),
        ("--data.augmentation.size=96", "must be backbone.input_size, 112, got 96"),
        ("--training.epochs=.nan", r"training.epochs must be a finite number, got \.nan"),
        ("--training.epochs=.inf", "training.epochs must be a finite number"),
        ("--training.lr=nan", "training.lr must be a finite number"),
        ("--training.max_loss_ratio=.nan", "max_loss_ratio must be a finite number"),
        ("--training.clip_norm=.inf", "clip_norm must be a finite number"),
        ("--data.augmentation.rotation=.nan", "rotation must be a finite number"),
        ("--validation.fars=[0.1, .nan]", r"validation.fars.1 must be a finite number"),
        ("--head.m=.nan", r"head\.m must be a number ≥ 0, got nan"),
        ("--backbone.width=.inf", r"backbone\.width must be a number > 0, got inf"),
        ("--backbone.residual_scale=.nan", "residual_scale must be a number"),
        ("--seed=-1", "seed must be greater than or equal to 0, got -1"),
        ("--seed=99999999999", "seed must be less than 4294967296"),
        ("--data.split_seed=-1", "data.split_seed must be greater than or equal to 0"),
        ("--training.threads=100000", "threads must be less than or equal to 1024, got 100000"),
        ("--training.accumulate=0", "accumulate must be greater than or equal to 1, got 0"),
        ("--training.milestones=[0.5, 2]", "milestones.1 must be less than or equal to 1, got 2"),
        ("--name=null", "name must be text, got null in the command line"),
        ("--name=", "name must be text, got null"),
        ("--name=../run", "name must not contain '/', got ../run"),
        ("--output=a\0b", r"output must not contain '\\x00', got"),
        ("--backbone.name=null", "backbone.name must be the name of a backbone, got None"),
        ("--head.name=[a, b]", r"no head '\[a, b\]'"),
        # A process group is for programs; a configuration says `sharded`.
        ("--head.process_group=null", "no parameter 'process_group'; .*chunk_size, sharded, neg"),
        ("--head.sharded=perhaps", "head.sharded must be true or false, got perhaps"),
        ("--head.streaming=perhaps", "head.streaming must be true or false, got 'perhaps'"),
        ("--backbone.batch_norm=perhaps", r"batch_norm must be true or false, got 'perhaps'"),
        ("--backbone.input_size=null", r"backbone.input_size must be a positive integer or a"),
        ("--backbone.width=1e9", "backbone is too large for any machine"),
        ("--training.lr=1e39", "training.lr must be less than or equal to 10+, got 1.0e"),
        ("--training.lr=1e20 --training.head_lr_multiplier=1e20", "must be ≤ 1e38, got 1e"),
        ("--data=3", "data must be a section of settings, got 3"),
        ("--head=3", "head must be a section of settings, got 3"),
        (
            "--head.sharded=true --training.autocast=fp16",
            "sharded must be false with .*fp16",
        ),
        ("--validation.fars=far", r"fars.0 must be a valid number, .*got far"),
        ("--training.nesterov=true --training.momentum=0", "momentum above 0"),
        ("--teacher.weight=0 --teacher.labels=0", "are all 0, so that nothing would be learned"),
        ("training.epochs=3", "--key value"),
        ("--training.epochs", "needs a value"),
    ],
)
def test_mistakes_are_one_sentence_that_names_the_remedy(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        config.load(None, [override] if " --" not in override else override.split())
    assert "\n" not in str(caught.value)
    assert "<class" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"), [("010", 10), ("0o10", 8), ("0x1F", 31), ("5e-4", 5e-4), (".5", 0.5)]
)
def test_numbers_are_those_of_yaml_1_2(text: str, number: float, tmp_path: Path) -> None:
    path = write(tmp_path, f"training: {{epochs: {text}}}\nhead: {{name: cosface, s: {text}}}\n")
    loaded = config.load(path)
    assert (loaded.training.epochs, loaded.head["s"]) == (number, number)


@pytest.mark.parametrize(
    ("word", "where"),
    [
        ("--validation.fars=[0.1, 2]", "fars.1 .* got 2 in the command line"),
        ("--training={epochs: 0}", "epochs .* got 0 in the command line"),
        ("--training.lr=0.1", r"seed .* got -1 in .*x\.yaml"),
    ],
)
def test_a_mistake_is_looked_for_where_it_was_made(word: str, where: str, tmp_path: Path) -> None:
    text = "seed: -1\n" if "lr" in word else "validation: {fars: [0.1]}\n"
    with pytest.raises(UserError, match=where):
        config.load(write(tmp_path, text), [word])


def write(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    path = folder / "x.yaml"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(
    "text", ["2024-05-01", "yes", "2024", "007", "1e5", "12:30", "off", "a: b"]
)
def test_a_text_setting_is_the_text_that_was_given(text: str, tmp_path: Path) -> None:
    words = ["--name", text, f"--data.train={text}", "--validation.names", text]
    loaded = config.load(None, [*words, "--validation.pairs", f"['{text}', {text.split(':')[0]}]"])
    assert loaded.name == loaded.data.train == loaded.validation.names == text
    assert loaded.validation.pairs == [text, text.split(":")[0]]
    if text != "a: b":  # which is a mapping in YAML
        path = write(tmp_path, f"name: {text}\ndata: {{train: {text}}}\n")
        assert config.load(path).name == config.load(path).data.train == text
    path = write(tmp_path, config.dump(loaded))
    assert config.load(path) == loaded


def test_choices_that_yaml_calls_booleans_and_sections_of_components() -> None:
    loaded = config.load(
        None, ["--training.autocast", "off", "--training.compile", "yes", "--head.m", "0"]
    )
    assert loaded.training.autocast == "off"
    assert loaded.training.compile is True
    assert loaded.head == {"name": "sphereface2", "m": 0}
    assert config.load(None, ["--validation.names=null"]).validation.names is None


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    loaded = config.load(None, ["--data.train", "~/faces", "--output=~/runs", "--name", "~x"])
    assert (loaded.data.train, loaded.output) == ("/home/ada/faces", "/home/ada/runs")
    assert loaded.name == "~x"
    assert config.load(None, ["--validation.pairs", "[auto, ~/lfw.bin]"]).validation.pairs == [
        "auto",
        "/home/ada/lfw.bin",
    ]


def test_files_in_other_encodings_and_bombs(tmp_path: Path) -> None:
    text = "name: Zoë\ntraining: {epochs: 3}\n"
    for encoding in ("utf-8", "utf-8-sig"):
        assert config.load(write(tmp_path, text, encoding)).name == "Zoë"
    for bad, message in (
        (text.encode("utf-16"), "UTF-16"),
        (b"name: \xff", "UTF-8"),
        (b"- a\n", "must be a mapping of settings"),
        (b"a: &a [*a]\n", "nested"),
        (b"seed: 1\nname: [1\n", "line 3"),
        (b"2024-01-01: 3\n", "unknown setting 2024-01-01"),
        (b"training: {epochs: 0}", r"epochs must be greater than 0, got 0 in .*x\.yaml"),
    ):
        (tmp_path / "x.yaml").write_bytes(bad)
        with pytest.raises(UserError, match=message) as caught:
            config.load(tmp_path / "x.yaml")
        assert "\n" not in str(caught.value)
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    with pytest.raises(UserError, match="aliases"):
        config.load(write(tmp_path, bomb))


def test_a_file_of_version_0_1_0_reads_as_before() -> None:
    stored = config.load(Path(__file__).parents[1] / "assets" / "config-0.1.0.yaml")
    assert stored.training.weight_decay == 5e-4
    assert stored.data.augmentation.erase_area == (0.02, 0.15)
    assert stored.head["m"] == 0.3
    assert stored.training.milestones == [0.5, 0.78, 0.94]


def test_a_folder_named_as_a_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").mkdir()  # as after `data convert faces small`
    monkeypatch.chdir(tmp_path)
    assert command.find("small") == sections.recipes()["small"]
