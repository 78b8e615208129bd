"""The command line: parses, calls one function, prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sphereface2 import __version__
from sphereface2.errors import UserError

app = typer.Typer(
    name="sphereface2",
    help="Face recognition by binary classification: train, evaluate, convert.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Inspect and convert data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


def _version(value: bool) -> None:
    if value:
        typer.echo(f"sphereface2 {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def fit(
    ctx: typer.Context,
    config: Annotated[Path | None, typer.Option(help="YAML configuration of the run.")] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Continue the run in this folder from its last checkpoint.")
    ] = None,
    run_folder: Annotated[
        Path | None,
        typer.Option(help="The run's folder: started there, or continued if it has a checkpoint."),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(help="Processes on this machine: a number, or auto.")
    ] = None,
) -> None:
    """Train. Any setting can be given as --section.key VALUE."""
    from sphereface2.training.fit import fit as train

    train(config, resume=resume, run=run_folder, ranks=ranks, overrides=ctx.args)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint folder or its weights.")],
    pairs: Annotated[
        list[Path] | None, typer.Option(help=".bin, pairs.txt or pair list; repeatable.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of a pairs.txt.")] = None,
    names: Annotated[
        Path | None, typer.Option(help="pairs.txt that names the people of a .bin.")
    ] = None,
    all_pairs: Annotated[
        Path | None, typer.Option(help="Score every pair of this folder, list or RecordIO.")
    ] = None,
    flip: Annotated[bool, typer.Option(help="Add the mirror image's embedding.")] = True,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    plots: Annotated[Path | None, typer.Option(help="Folder for ROC and histogram PNGs.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Score a checkpoint on verification pairs or on all pairs of a set."""
    from sphereface2.evaluation.evaluate import evaluate as run

    run(
        checkpoint,
        pairs=pairs or [],
        images=images,
        names=names,
        all_pairs=all_pairs,
        flip=flip,
        batch_size=batch_size,
        seed=seed,
        plots=plots,
        device=device,
        as_json=as_json,
    )


@data_app.command("info")
def data_info(
    path: Annotated[Path, typer.Argument(help="Folder, list, .rec, .tar(s) or .bin.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Count images, people, unreadable files and duplicates."""
    from sphereface2.data.info import info

    info(path, as_json=as_json)


@data_app.command("convert")
def data_convert(
    source: Annotated[Path, typer.Argument(help="Folder, list, RecordIO or WebDataset.")],
    target: Annotated[Path, typer.Argument(help="Folder to create.")],
    to: Annotated[str, typer.Option(help="folder, list, recordio or webdataset.")],
) -> None:
    """Convert a data set between formats."""
    from sphereface2.data.convert import convert

    convert(source, target, to=to)


def main() -> None:
    """Entry point: a UserError ends in one sentence on stderr and exit status 2."""
    try:
        app()
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
