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
    checkpoint: Annotated[
        Path, typer.Argument(help="A run, a checkpoint folder, its weights, or an .onnx file.")
    ],
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
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="lfw, agedb30, calfw, cplfw, cfp_ff, cfp_fp, combined, ijbb, ijbc or "
            "megaface; repeatable."
        ),
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Folder that holds the suites.")] = None,
    detector_weights: Annotated[
        bool, typer.Option("--detector-weights", help="IJB: weight images by detector score.")
    ] = False,
    flip: Annotated[bool, typer.Option(help="Add the mirror image's embedding.")] = True,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    plots: Annotated[Path | None, typer.Option(help="Folder for ROC and histogram PNGs.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Score a checkpoint on verification pairs, all pairs of a set, or the field's suites."""
    from sphereface2.evaluation.evaluate import evaluate as run

    run(
        checkpoint,
        pairs=pairs or [],
        images=images,
        names=names,
        all_pairs=all_pairs,
        suites=suite or [],
        root=root,
        detector_weights=detector_weights,
        flip=flip,
        batch_size=batch_size,
        seed=seed,
        plots=plots,
        device=device,
        as_json=as_json,
    )


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run, a checkpoint folder or its weights.")],
    to: Annotated[str, typer.Option(help="onnx or torch_export.")],
    int8: Annotated[bool, typer.Option("--int8", help="8-bit weights and activations.")] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Training set to measure int8's ranges on.")
    ] = None,
    images: Annotated[int, typer.Option(help="Images of it to use.", min=1)] = 512,
    seed: Annotated[int, typer.Option(help="Seed of their choice.", min=0)] = 0,
    out: Annotated[Path | None, typer.Option(help="File; default: beside the checkpoint.")] = None,
) -> None:
    """Write a checkpoint as one ONNX file or torch.export archive, checked against PyTorch."""
    from sphereface2.recognition.export import export as run

    run(
        checkpoint,
        to=to,
        int8=int8,
        calibration=calibration,
        images=images,
        seed=seed,
        out=out,
    )


@app.command()
def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A run or a model folder.")],
    pairs: Annotated[
        list[Path] | None, typer.Option(help=".bin, pairs.txt or pair list; repeatable.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder of a pairs.txt.")] = None,
    names: Annotated[
        Path | None, typer.Option(help="pairs.txt that names the people of a .bin.")
    ] = None,
    all_pairs: Annotated[
        list[Path] | None,
        typer.Option(help="Use every pair of this folder, list or RecordIO; repeatable."),
    ] = None,
    far: Annotated[
        list[float] | None,
        typer.Option(help="FAR of a threshold; repeatable, the first is the default; 1e-2."),
    ] = None,
    method: Annotated[str, typer.Option(help="logistic or isotonic.")] = "logistic",
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.", min=1)] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Fit similarity to probability and thresholds; write calibration.json beside the model."""
    from sphereface2.recognition.calibrate import calibrate as run

    run(
        checkpoint,
        pairs=pairs or [],
        images=images,
        names=names,
        all_pairs=all_pairs or [],
        fars=far or [1e-2],
        method=method,
        batch_size=batch_size,
        seed=seed,
        device=device,
        as_json=as_json,
    )


@app.command()
def verify(
    first: Annotated[Path, typer.Argument(help="A picture.")],
    second: Annotated[Path, typer.Argument(help="Another picture.")],
    model: Annotated[str, typer.Option(help="A run, a model folder or a hub id.")],
    far: Annotated[
        float | None, typer.Option(help="Decide at this FAR; default: the calibration's first.")
    ] = None,
    prior: Annotated[
        float, typer.Option(help="Share of matched pairs expected, for the probability.")
    ] = 0.5,
    aligned: Annotated[
        bool, typer.Option("--aligned", help="The pictures are aligned crops already.")
    ] = False,
    picture: Annotated[
        Path | None, typer.Option(help="PNG to write: both pictures, landmarks, verdict.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Tell whether two pictures show one person. Exit status 0 for either answer, 2 for errors."""
    from sphereface2.recognition.verify import verify as run

    run(
        first,
        second,
        model=model,
        far=far,
        prior=prior,
        aligned=aligned,
        picture=picture,
        device=device,
        as_json=as_json,
    )


@app.command()
def embed(
    checkpoint: Annotated[
        str, typer.Argument(help="A run, a model folder, or a hub's owner/name.")
    ],
    source: Annotated[
        Path, typer.Argument(metavar="IN", help="Folder, list, RecordIO or WebDataset.")
    ],
    out: Annotated[Path, typer.Option(help="Parquet file to make.")],
    aligned: Annotated[
        bool,
        typer.Option("--aligned/--align", help="The pictures are crops; or find their faces."),
    ] = False,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Pictures a forward pass.", min=1)] = 64,
    flip: Annotated[bool, typer.Option(help="Add the mirror image's embedding.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best.")] = None,
    engine: Annotated[str, typer.Option(help="local or ray.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; default: one of its own, here.")
    ] = None,
) -> None:
    """Write the embeddings of a set of pictures to a Parquet file; resumable."""
    from sphereface2.recognition.features import embed_set

    embed_set(
        checkpoint,
        source,
        out,
        aligned=aligned,
        dtype=dtype,
        batch_size=batch_size,
        flip=flip,
        device=device,
        engine=engine,
        ray_address=ray_address,
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
