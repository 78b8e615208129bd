"""The command line: parses, calls one function, prints."""

from __future__ import annotations

import math
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
gallery_app = typer.Typer(
    help="Enrol people, search for faces among them, with unknowns.", no_args_is_help=True
)
app.add_typer(gallery_app, name="gallery")
keys_app = typer.Typer(help="API keys of the service.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
study_app = typer.Typer(
    help="Compare losses and settings over seeds and data conditions.", no_args_is_help=True
)
app.add_typer(study_app, name="study")

# Options that several commands take.
_PAIRS = Annotated[
    list[Path] | None, typer.Option(help=".bin, pairs.txt or pair list; repeatable.")
]
_IMAGES = Annotated[Path | None, typer.Option(help="Image folder of a pairs.txt.")]
_NAMES = Annotated[Path | None, typer.Option(help="pairs.txt that names the people of a .bin.")]
_ALIGNED = Annotated[
    bool, typer.Option("--aligned", help="The pictures are aligned crops already.")
]
_FLIP = Annotated[bool, typer.Option(help="Add the mirror image's embedding.")]
_BATCH_SIZE = Annotated[int, typer.Option(help="Images a forward pass.", min=1)]
_DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, mps; default: the best.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
_CELLS = Annotated[Path, typer.Option(help="Folder of the studies' runs, one a cell.")]
_GALLERY = Annotated[str, typer.Argument(help="A folder, or http://host:19530 of a Milvus server.")]


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter("it must be a finite number")
    return value


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
    pairs: _PAIRS = None,
    images: _IMAGES = None,
    names: _NAMES = None,
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
    flip: _FLIP = True,
    batch_size: _BATCH_SIZE = 128,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    plots: Annotated[Path | None, typer.Option(help="Folder for ROC and histogram PNGs.")] = None,
    device: _DEVICE = None,
    as_json: _JSON = False,
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
    pairs: _PAIRS = None,
    images: _IMAGES = None,
    names: _NAMES = None,
    all_pairs: Annotated[
        list[Path] | None,
        typer.Option(help="Use every pair of this folder, list or RecordIO; repeatable."),
    ] = None,
    far: Annotated[
        list[float] | None,
        typer.Option(help="FAR of a threshold; repeatable, the first is the default; 1e-2."),
    ] = None,
    method: Annotated[str, typer.Option(help="logistic or isotonic.")] = "logistic",
    batch_size: _BATCH_SIZE = 128,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    device: _DEVICE = None,
    as_json: _JSON = False,
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
    aligned: _ALIGNED = False,
    threshold: Annotated[
        float | None, typer.Option(help="Decide at this similarity instead.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="PNG to write: both images, landmarks, decision.")
    ] = None,
    device: _DEVICE = None,
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
        threshold=threshold,
        plot=plot,
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
    flip: _FLIP = True,
    device: _DEVICE = None,
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


@gallery_app.command("add")
def gallery_add(
    gallery: _GALLERY,
    person: Annotated[str | None, typer.Argument(help="Whom the pictures show.")] = None,
    pictures: Annotated[list[Path] | None, typer.Argument(help="Their pictures.")] = None,
    model: Annotated[str | None, typer.Option(help="A run, a model folder or a hub id.")] = None,
    folder: Annotated[
        Path | None, typer.Option(help="Enrol everybody in this folder: person/picture.")
    ] = None,
    features: Annotated[
        Path | None, typer.Option(help="Enrol everybody in this table of `sphereface2 embed`.")
    ] = None,
    aligned: _ALIGNED = False,
    metadata: Annotated[
        str | None, typer.Option(help='JSON object to keep with the person: {"since": 2024}.')
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="The person's older pictures go.")
    ] = False,
    index: Annotated[
        str | None, typer.Option(help="Of a new gallery: flat (exact, the default), ivf or hnsw.")
    ] = None,
    device: _DEVICE = None,
) -> None:
    """Enrol a person's pictures, a folder of people or a table of embeddings."""
    from sphereface2.recognition.enrol import add

    add(
        gallery,
        person,
        pictures or [],
        folder=folder,
        features=features,
        model=model,
        aligned=aligned,
        metadata=metadata,
        replace=replace,
        index=index,
        device=device,
    )


@gallery_app.command("search")
def gallery_search(
    gallery: _GALLERY,
    pictures: Annotated[list[Path], typer.Argument(help="Faces to look for.")],
    model: Annotated[str, typer.Option(help="A run, a model folder or a hub id.")],
    k: Annotated[int, typer.Option("-k", "--k", help="People to name a picture.", min=1)] = 5,
    fusion: Annotated[
        str, typer.Option(help="A person's score: of the best picture (max) or of their mean.")
    ] = "max",
    far: Annotated[
        float | None, typer.Option(help="Unknown below the calibrated threshold for this FAR.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Unknown below this similarity, instead of --far.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Look past an approximate index.")] = False,
    aligned: _ALIGNED = False,
    device: _DEVICE = None,
    as_json: _JSON = False,
) -> None:
    """Tell whom pictures show, or that they show nobody enrolled."""
    from sphereface2.recognition.enrol import search

    search(
        gallery,
        pictures,
        model=model,
        k=k,
        fusion=fusion,
        far=far,
        threshold=threshold,
        exact=exact,
        aligned=aligned,
        device=device,
        as_json=as_json,
    )


@gallery_app.command("set")
def gallery_set(
    gallery: _GALLERY,
    person: Annotated[str, typer.Argument(help="Who is there.")],
    metadata: Annotated[
        str, typer.Option(help='JSON object to keep with them instead: {"since": 2024}.')
    ],
) -> None:
    """Change a person's metadata; the pictures stay."""
    from sphereface2.recognition.enrol import set_metadata

    set_metadata(gallery, person, metadata)


@gallery_app.command("remove")
def gallery_remove(
    gallery: _GALLERY,
    person: Annotated[str, typer.Argument(help="Whom to remove.")],
    keep_bytes: Annotated[
        bool, typer.Option("--keep-bytes", help="Leave the rewriting of the files for later.")
    ] = False,
) -> None:
    """Remove a person and every trace of their embeddings from the files."""
    from sphereface2.recognition.enrol import remove

    remove(gallery, person, keep_bytes=keep_bytes)


@gallery_app.command("list")
def gallery_list(
    gallery: _GALLERY,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Name everybody in a gallery."""
    from sphereface2.recognition.enrol import list_people

    list_people(gallery, as_json=as_json)


@gallery_app.command("stats")
def gallery_stats(
    gallery: _GALLERY,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Count people and pictures; name the model."""
    from sphereface2.recognition.enrol import stats

    stats(gallery, as_json=as_json)


@gallery_app.command("compact")
def gallery_compact(gallery: _GALLERY) -> None:
    """Rewrite the files without what was removed or replaced."""
    from sphereface2.recognition.enrol import compact

    compact(gallery)


@gallery_app.command("reembed")
def gallery_reembed(
    gallery: _GALLERY,
    model: Annotated[str, typer.Option(help="The new model: a run, a model folder or a hub id.")],
    drop_missing: Annotated[
        bool, typer.Option("--drop-missing", help="Leave out pictures whose files are gone.")
    ] = False,
    device: _DEVICE = None,
) -> None:
    """Move a gallery to another model, from the files people were enrolled from."""
    from sphereface2.recognition.enrol import reembed

    reembed(gallery, model=model, drop_missing=drop_missing, device=device)


@app.command()
def align(
    source: Annotated[Path, typer.Argument(help="Folder of pictures.")],
    target: Annotated[Path, typer.Argument(help="Folder for the crops.")],
    all_faces: Annotated[
        bool, typer.Option("--all-faces", help="Every face, not only the main one.")
    ] = False,
    landmarks: Annotated[
        Path | None, typer.Option(help="File of 'path x1 y1 … x5 y5' lines: crop by these.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes; default: one a core.", min=1)
    ] = None,
    size: Annotated[int, typer.Option(help="Side of the crops in pixels.")] = 112,
    png: Annotated[bool, typer.Option("--png", help="Write PNG instead of JPEG.")] = False,
    min_score: Annotated[float, typer.Option(help="Confidence from which a face counts.")] = 0.9,
    max_pixels: Annotated[
        int, typer.Option(help="Refuse pictures with more pixels.", min=1)
    ] = 100_000_000,
) -> None:
    """Find faces in photographs and crop them for training and embedding."""
    from sphereface2.align.folder import align as run

    run(
        source,
        target,
        all_faces=all_faces,
        landmarks=landmarks,
        workers=workers,
        size=size,
        png=png,
        min_score=min_score,
        max_pixels=max_pixels,
    )


@app.command()
def serve(
    checkpoint: Annotated[str, typer.Argument(help="A run, a model folder or a name on the hub.")],
    gallery: Annotated[str, typer.Option(help="Gallery folder, or a Milvus server's address.")],
    gallery_token: Annotated[
        str, typer.Option(envvar="SPHEREFACE2_GALLERY_TOKEN", help="Login of the Milvus server.")
    ] = "",
    host: Annotated[str, typer.Option(help="Address to bind.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0: a free one.", min=0, max=65535)] = 8000,
    keys: Annotated[
        Path | None, typer.Option(help="Key file; needed unless bound to loopback.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name that requests may use; repeatable.")
    ] = None,
    keep_crops: Annotated[
        Path | None, typer.Option(help="Folder for enrolled people's crops; default: none kept.")
    ] = None,
    audit: Annotated[Path | None, typer.Option(help="Audit log; default: standard output.")] = None,
    far: Annotated[
        float | None, typer.Option(help="False accept rate to decide at; default: the model's.")
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Faces in a forward pass.", min=1)] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(help="Longest wait of a face for company.", min=0, callback=_finite)
    ] = 5.0,
    max_queue: Annotated[int, typer.Option(help="Pictures in work; beyond: 503.", min=1)] = 128,
    max_body_mb: Annotated[
        float, typer.Option(help="Size of a request.", min=0.001, callback=_finite)
    ] = 20.0,
    max_megapixels: Annotated[
        # Pillow refuses more than 178 whatever it is told.
        float, typer.Option(help="Size of a picture.", min=0.001, max=178, callback=_finite)
    ] = 50.0,
    rate: Annotated[
        float, typer.Option(help="Requests/s of a client; 0: any.", min=0, callback=_finite)
    ] = 50.0,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, for HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="The certificate's key.")] = None,
    drain_seconds: Annotated[
        float,
        typer.Option(help="After SIGTERM: unready, but still serving.", min=0, callback=_finite),
    ] = 5.0,
    device: _DEVICE = None,
) -> None:
    """Serve a model and a gallery: REST API and web page."""
    from sphereface2.recognition.service import serve as run

    run(
        checkpoint,
        gallery,
        host=host,
        port=port,
        keys=keys,
        allow_hosts=allow_host or [],
        keep_crops=keep_crops,
        audit=audit,
        tls_cert=tls_cert,
        tls_key=tls_key,
        drain_seconds=drain_seconds,
        device=device,
        gallery_token=gallery_token,
        far=far,
        max_batch=max_batch,
        max_wait=max_wait_ms / 1000,
        max_queue=max_queue,
        max_body=int(max_body_mb * 1e6),
        max_pixels=int(max_megapixels * 1e6),
        rate=rate,
        burst=2 * rate,
    )


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Who will use it.")],
    file: Annotated[Path, typer.Option(help="Key file, made if it is missing.")],
) -> None:
    """Make a key and print it; the file holds its hash alone."""
    from sphereface2.recognition.service import keys

    typer.echo(keys.add(name, file))


@keys_app.command("list")
def keys_list(file: Annotated[Path, typer.Option(help="Key file.")]) -> None:
    """List ids, names and when they were made."""
    from sphereface2.recognition.service import keys

    for key in keys.read(file):
        typer.echo(f"{key.id}  {key.created}  {key.name}")


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(help="The key's name or id.")],
    file: Annotated[Path, typer.Option(help="Key file.")],
) -> None:
    """Remove a key; a running server refuses it at once."""
    from sphereface2.recognition.service import keys

    keys.remove(name, file)


@data_app.command("info")
def data_info(
    path: Annotated[Path, typer.Argument(help="Folder, list, .rec, .tar(s) or .bin.")],
    as_json: _JSON = False,
) -> None:
    """Count images, people, unreadable files and duplicates."""
    from sphereface2.data.info import info

    info(path, as_json=as_json)


@data_app.command("convert")
def data_convert(
    source: Annotated[Path, typer.Argument(help="Folder, list, RecordIO, WebDataset; or pairs.")],
    target: Annotated[Path, typer.Argument(help="Folder (bin: file) to create.")],
    to: Annotated[
        str, typer.Option(help="folder, list, recordio or webdataset; bin for a verification set.")
    ],
    encode: Annotated[
        str | None, typer.Option(help="Encode anew as webp, jpg or png; default: bytes as is.")
    ] = None,
    quality: Annotated[int, typer.Option(help="Quality of WebP and JPEG, 1 to 100.")] = 75,
    size: Annotated[
        int | None,
        typer.Option(help="Scale the longest side down to this many pixels; implies WebP."),
    ] = None,
) -> None:
    """Convert a data set between formats, or make a smaller copy of it."""
    from sphereface2.data.convert import Encoding, convert

    anew = encode is not None or size is not None
    encoding = Encoding(encode or "webp", quality, size) if anew else None
    convert(source, target, to=to, encoding=encoding)


@study_app.command("run")
def study_run(
    study: Annotated[Path, typer.Argument(help="YAML of the study, as in configs/study/.")],
    cells: _CELLS = Path("runs/study"),
    jobs: Annotated[int, typer.Option(help="Runs at a time, sharing the CPU's cores.")] = 1,
) -> None:
    """Train what is missing of a study; finished runs are kept, interrupted ones go on."""
    from sphereface2.study.runner import run_study

    run_study(study, cells=cells, jobs=jobs)


@study_app.command("report")
def study_report(
    studies: Annotated[list[Path], typer.Argument(metavar="STUDY...", help="YAML of studies.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")],
    cells: _CELLS = Path("runs/study"),
) -> None:
    """Tell of the finished runs: tables with intervals, pictures; Markdown and HTML."""
    from sphereface2.study.report import write_reports

    for page in write_reports(studies, cells=cells, out=out):
        typer.echo(page)


def main() -> None:
    """Entry point: a UserError ends in one sentence on stderr and exit status 2.

    So does what the system refuses and no command foresaw: a full disk, a missing permission.
    """
    try:
        app()
    except UserError as error:
        told = str(error)
    except OSError as error:
        file = error.filename2 or error.filename  # of a renaming the name that was wanted
        told = f"{file}: {error.strerror}" if file is not None else str(error)
    else:
        return
    typer.echo(f"error: {told}", err=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
