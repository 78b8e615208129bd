"""``sphereface2 fit``: settings from a recipe, a file and the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import docstring_parser
from cyclopts import Parameter

from sphereface2.errors import UserError, did_you_mean
from sphereface2.training import config as configuration
from sphereface2.training import starting
from sphereface2.training.config import RunConfig
from sphereface2.training.fit import fit as train
from sphereface2.training.sections import recipes

OPTIONS = ("config", "teacher", "resume", "start-from", "run-folder", "ranks", "print-config")


def fit(
    *settings: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    config: str | None = None,
    teacher: Path | None = None,
    resume: Path | None = None,
    start_from: str | None = None,
    run_folder: Path | None = None,
    ranks: str | None = None,
    print_config: bool = False,
) -> None:
    """Train a network and report its accuracy.

    Any setting of the list below can be given as `--section.key VALUE`; it then counts more than
    the configuration's. Examples:

    - `sphereface2 fit --config small --data.train faces/`: a small network on a folder that holds
      a folder of aligned images for each person.
    - `sphereface2 fit --config small --head.name cosface --training.epochs 20`: another loss, and
      longer.
    - `sphereface2 fit --config small --teacher runs/large`: a small network that follows a large
      one's embeddings.
    - `sphereface2 fit --start-from runs/NAME --data.train faces/`: fine-tune its network on other
      people.
    - `sphereface2 fit --resume runs/small-20250101-120000`: go on with an interrupted run.

    Args:
        config: Name of a recipe, or a YAML file of settings; for fine-tuning, by default the recipe
            finetune.
        teacher: Model or table of embeddings that the network's embeddings follow; short for
            `--teacher.path`.
        resume: Run folder to continue from its last checkpoint, with its own settings.
        start_from: Run, model folder or hub id whose network a new run starts from: fine-tuning,
            with other people; short for `--training.start_from`.
        run_folder: Folder of the run: it is started there, or continued if it has a checkpoint.
        ranks: Number of processes on this machine, or "auto": one per GPU or CPU core,
            of 32 images a batch at least.
        print_config: Print all settings as YAML and exit, instead of training.
    """
    overrides = list(settings)
    if teacher is not None:
        overrides += ["--teacher.path", str(teacher)]
    _check_names(overrides)
    if not (overrides or any([config, resume, start_from, run_folder])):
        raise UserError(
            "fit needs a configuration or data: give --config NAME (a recipe: "
            f"{', '.join(recipes())}; or a YAML file) and --data.train PATH (images to train on); "
            "`sphereface2 fit --help` lists all settings"
        )
    if start_from is not None:
        if resume is not None:
            raise UserError(
                "--resume goes on with a run and --start-from starts a new one from its network: "
                "give one of them"
            )
        overrides += ["--training.start_from", start_from]
    path = None if config is None else find(config)
    if print_config:
        if resume is not None:
            shown = configuration.load(resume / "config.yaml", overrides)
        else:
            shown = starting.settings(path, overrides)
        print(configuration.dump(shown), end="")
        return
    train(path, resume=resume, run=run_folder, ranks=ranks, overrides=overrides)


def settings_help() -> str:
    """Markdown that lists every setting with its default and meaning."""
    lines = ["**Settings, with their defaults**", ""]
    for key, default, meaning in settings_of(RunConfig):
        value = "null" if default is None else default
        lines.append(f"- `--{key} {value}` {meaning}".rstrip())
    return "\n".join(lines)


def settings_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Key, default and meaning of each field of nested dataclasses."""
    described = docstring_parser.parse_from_object(cls)
    meanings = {param.arg_name: param.description for param in described.params}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            yield from settings_of(hints[field.name], f"{prefix}{field.name}.")  # type: ignore[arg-type]
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield f"{prefix}{field.name}", default, " ".join((meanings.get(field.name) or "").split())


def find(config: str) -> Path:
    """The file of a configuration given by its path or as the name of a recipe."""
    path, known = Path(config), recipes()
    # A folder named as a recipe, such as a set that is called small, hides none.
    if path.exists() and not path.is_dir():
        return path
    if config not in known:
        own = path / "config.yaml"
        hint = f"; the configuration of that run is {own}" if own.is_file() else ""
        raise UserError(
            f"there is no file and no recipe {config!r}{did_you_mean(config, known)}{hint}; "
            f"recipes: {', '.join(known)}"
        )
    return known[config]


def _check_names(overrides: list[str]) -> None:
    """Refuse options that are neither the command's nor a setting, with the nearest of both."""
    known = [key for key, _, _ in settings_of(RunConfig)]
    sections = {key.partition(".")[0] for key in known}
    for word in overrides:
        name = word[2:].partition("=")[0]
        if not word.startswith("--") or name.replace("-", "_").partition(".")[0] in sections:
            continue
        ends = [key for key in known if key.endswith(f".{name.replace('-', '_')}")]
        known += [*OPTIONS]
        options = [f"--{one}" for one in known]
        near = f" (did you mean '--{ends[0]}'?)" if ends else did_you_mean(f"--{name}", options)
        raise UserError(f"unknown option --{name}{near}; `sphereface2 fit --help` lists all")
