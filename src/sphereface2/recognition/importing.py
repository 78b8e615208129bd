"""``sphereface2 import``: weights that other projects publish as a model of this package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from sphereface2 import console
from sphereface2.backbones import bundle
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.backbones.preprocessing import as_size
from sphereface2.data import synthetic
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, check_choice
from sphereface2.files import atomic_folder, read_yaml, writing
from sphereface2.recognition.face_embedder import FaceEmbedder

PARALLEL = 0.999
"""Cosine from which on two embeddings count as one direction."""

_COLOURS = {"adaface": "BGR"}  # what the others publish sees RGB
_Numbers = Annotated[Sequence[float], Parameter(consume_multiple=True)]


def import_weights(
    file: Path,
    out: Path,
    /,
    *,
    from_: Literal["arcface_torch", "adaface", "cvlface", "opensphere", "onnx"],
    size: Annotated[Sequence[int], Parameter(consume_multiple=True)] = (),
    mean: _Numbers = (),
    std: _Numbers = (),
    colour: Literal["RGB", "BGR"] | None = None,
    output: str | None = None,
) -> Path:
    """Make a model folder of the weights of another project.

    Its network embeds as it does there. All commands take the folder. Nothing in `file` is
    executed; a head, which compares with the people of its training, is left out.

    Args:
        file: Checkpoint (`.pth`, `.pt`, `.ckpt`, `.safetensors`), or an `.onnx` file.
        out: Folder to write; it must not exist.
        from_: Project that wrote the file: IResNets and MobileFaceNet of arcface_torch, the IR
            networks of AdaFace and CVLface, SFNets and IResNets of OpenSphere; or onnx, any network
            with one image as its input.
        size: ONNX without a fixed size: side of the images, or height and width, in pixels.
        mean: Subtracted from the pixels, which are in 0..255: one number, or three; default: 127.5.
        std: Divides them afterwards: one number, or three; default: 127.5.
        colour: Order of the channels that the network sees; default: BGR for adaface, what a
            `.yaml` file beside that of cvlface says, RGB for the others. An `.onnx` file of
            `sphereface2 export` says all this itself.
        output: ONNX with several outputs: name of the embedding's.

    Raises:
        UserError: an unreadable file, one that would run code, another network, or embeddings that
            do not depend on the image; nothing is written then.
    """
    if out.exists():
        raise UserError(f"{out} exists already: give a new folder")
    options: dict[str, Any] = {
        name: _three(name, values) for name, values in (("mean", mean), ("std", std)) if values
    }
    if from_ != "onnx" and (size or output):
        raise UserError("--size and --output are for --from onnx: other files say it themselves")
    ignored: dict[str, int] = {}
    network: Any
    if from_ == "onnx":
        from sphereface2.recognition.importing_onnx import adapted

        sides = as_size(size[0] if len(size) == 1 else tuple(size), "--size") if size else None
        network = OnnxNetwork(adapted(file, size=sides, output=output, colour=colour, **options))
    else:
        from sphereface2.backbones import foreign

        found = foreign.load(file, from_, colour=colour or _colour(file, from_), **options)
        network, ignored = found.network, found.ignored
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        network.metadata = {"imported": {"from": from_, "file": file.name, "sha256": digest}}
    with Embedder(network, flip=False) as embedder:
        cosines = _probe(embedder, file)
    with writing(out):
        if isinstance(network, OnnxNetwork):
            out.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(out) as temporary:
                (temporary / bundle.ONNX).write_bytes(network.content)
        else:
            FaceEmbedder(network).save_pretrained(out)
    _show(out, network, ignored, cosines)
    return out


def _three(name: str, values: Sequence[float]) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise UserError(f"--{name} takes one number or three, got {len(values)}")
    return tuple(values) * (3 // len(values))


def _colour(file: Path, layout: str) -> str:
    beside = file.with_suffix(".yaml")
    if layout != "cvlface" or not beside.is_file():
        return _COLOURS.get(layout, "RGB")
    described = read_yaml(beside)
    colour = described.get("color_space") if isinstance(described, dict) else None
    check_choice(f"color_space of {beside}", colour, ("RGB", "BGR"))
    return str(colour)


def _probe(embedder: Embedder, file: Path) -> np.ndarray:
    """Cosines between embeddings of images that nothing but a mistake makes alike.

    Raises:
        UserError: embeddings of different images have one direction, or are not finite.
    """
    height, width = embedder.network.input_size
    rng = np.random.default_rng(0)
    face = synthetic.render(synthetic.Identity.draw(rng), rng)
    noise = rng.integers(256, size=(height, width, 3)).astype(np.uint8)
    ramp = np.linspace(0, 255, height)[:, None, None] * np.ones((1, width, 3))
    rows = embedder.embed([face, 255 - face, noise, ramp.astype(np.uint8)])
    cosines = np.array([float(first @ second) for first, second in combinations(rows, 2)])
    if not rows.any(axis=1).all():
        raise UserError(f"the network in {file} gives embeddings of 0: its weights are unusable")
    if cosines.max() > PARALLEL:
        raise UserError(
            f"the network in {file} gives different images embeddings of one direction (cosine "
            f"{cosines.max():.5f}): --mean, --std or --colour is not what it was trained with, or "
            "its weights are unusable"
        )
    return cosines


def _show(out: Path, network: Any, ignored: dict[str, int], cosines: np.ndarray) -> None:
    expected = network.preprocessing
    name = "ONNX" if isinstance(network, OnnxNetwork) else network.config["name"]
    pixels = "; ".join(
        f"{what} {', '.join(f'{one:g}' for one in dict.fromkeys(values))}"
        for what, values in (("mean", expected.mean), ("std", expected.std))
    )
    lines = [
        f"{out}: {name}, embeddings of {network.embedding_dim}",
        f"  images   {expected.size[0]} × {expected.size[1]}, {expected.colour_order}, {pixels}",
        f"  probe    cosine {cosines.min():.3f} to {cosines.max():.3f} between different images",
    ]
    if ignored:
        parts = ", ".join(f"{part} ({count})" for part, count in sorted(ignored.items()))
        lines.append(f"  left out tensors of {parts}")
    if isinstance(network, OnnxNetwork):
        lines.append("  training can start from checkpoints of torch only, not from this")
    console.show(*lines)
