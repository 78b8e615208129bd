"""A trained network as one file for others: ONNX, torch.export, arcface_torch's weights."""

from __future__ import annotations

import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional as F

from sphereface2 import console, onnx_runtime
from sphereface2.align.template import SIZE, TEMPLATE
from sphereface2.backbones import Backbone, Preprocessing, bundle, foreign
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.data import synthetic
from sphereface2.data.opening import open_source
from sphereface2.data.source import Source
from sphereface2.errors import UserError, check_count, did_you_mean
from sphereface2.extras import require
from sphereface2.files import atomic_write, check_folder, digest, takes_paths, writing
from sphereface2.images import decode
from sphereface2.recognition.onnx_graphs import described, description, quantised, share

SUFFIXES = {"onnx": ".onnx", "insightface": ".onnx", "torch_export": ".pt2", "arcface_torch": ".pt"}
EXTRA_FILE = "sphereface2.json"
"""In a ``torch_export`` archive, what `backbones.onnx.METADATA_KEY` is in an ONNX file."""

OPSET = 20
PARITY = 0.99999
"""Least cosine between an embedding by the float32 file and by PyTorch."""

PARITY_INT8 = 0.98
"""Least mean cosine between the embeddings by an int8 file and by PyTorch."""

_BATCHES = (1, 2, 7)
_LIMIT = 2**31 - 2**24  # a protocol buffer holds 2 GiB, the graph itself included


@dataclass(frozen=True)
class Exported:
    """A file that `export` wrote.

    Attributes:
        path: the file.
        bytes: its size.
        cosine: of an embedding by the file and by PyTorch, mean over the checked images.
        cosine_min: the least of them.
        description: what the file says about itself, JSON-able.
    """

    path: Path
    bytes: int
    cosine: float
    cosine_min: float
    description: dict[str, Any]


@takes_paths
def export(
    checkpoint: Path,
    /,
    *,
    to: str,
    int8: bool = False,
    calibration: Path | None = None,
    share_weights: bool = False,
    images: int = 512,
    seed: int = 0,
    out: Path | None = None,
) -> Exported:
    """Write a model as one file for other programs, and check it against PyTorch.

    An ONNX file or torch.export archive takes normalised float32 images (batch, 3, h, w),
    batch ≥ 1, and gives embeddings (batch, embedding_dim), not L2-normalised, as the network does.
    It describes itself in a JSON object: under the metadata key ``sphereface2`` of an ONNX file, in
    the extra file ``sphereface2.json`` of a ``torch_export`` archive. For ``insightface`` it is an
    ONNX file of square images as the package insightface crops and normalises them. For
    ``arcface_torch`` it is a state dict alone, of an IResNet or MobileFaceNet under that project's
    names and for its preprocessing.

    Args:
        checkpoint: A run, a model folder or its weights.
        to: "onnx", "insightface", "torch_export" or "arcface_torch".
        int8: Quantise weights and activations to 8 bits (ONNX only).
        calibration: Training set on which the ranges of activations are measured; needed for
            `--int8`.
        share_weights: Write an ONNX graph without weights, which reads them from the model's
            `model.safetensors` beside it, in 16 or 32 bits.
        images: Number of its images to measure on, drawn without replacement.
        seed: Seed of that draw.
        out: File to write; default: `model.onnx`, `model.int8.onnx`, `model.insightface.onnx`,
            `model.pt2` or `model.pt` beside the checkpoint. An existing file is replaced once the
            new one has been checked.

    Raises:
        UserError: a wrong option, a missing package, a file that cannot be written, or a result
            that differs from PyTorch; no file is written then.
    """
    _check_options(to, int8, calibration, share_weights)
    check_count("--images", images, 1)
    checkpoint = _checkpoint(checkpoint)
    path = _target(checkpoint, out, to, int8)
    check_folder(path.parent)
    folder = bundle.resolve(checkpoint).resolve() if share_weights else None
    if folder is not None and path.parent.resolve() != folder:
        raise UserError(f"with --share-weights the file must lie beside its weights, in {folder}")
    source = open_source(calibration) if calibration is not None else None
    if SUFFIXES[to] == ".onnx":
        onnx_runtime.load()  # before onnxscript, which imports it where it is installed
        require("exports to ONNX", "onnx", "onnxscript")
    net = _network(checkpoint, to)
    fingerprint = bundle.fingerprint(net)
    if to == "insightface":
        net = AsInsightface(net)
    with Console(stderr=True).status(f"exporting to {to}"):
        facts = description(
            fingerprint=fingerprint,
            checkpoint_fingerprint=fingerprint,
            precision="int8" if int8 else "float32",
            backbone=net.config,
            embedding_dim=net.embedding_dim,
            preprocessing=net.preprocessing.to_dict(),
            aligner={"size": SIZE, "template": TEMPLATE.tolist()},
            metadata=net.metadata,
        )
        faces = _faces(net, source, images, seed)
        checked = faces[-sum(_BATCHES) :]
        measured = faces[: -sum(_BATCHES)]
        if source is not None:
            drawn = {"images": len(measured), "seed": seed}
            facts["calibration"] = {"set_fingerprint": source.fingerprint(), **drawn}
        content = _content(net, to, facts, measured, folder)
        cosines = _cosines(net, _runner(content, to, folder, net), checked)
    least, mean = float(cosines.min()), float(cosines.mean())
    bad = mean < PARITY_INT8 if int8 else least < PARITY
    if bad or not np.isfinite(mean):
        raise UserError(
            f"the exported network differs from PyTorch: cosine {mean:.6f} on average, "
            f"{least:.6f} at least; nothing was written"
        )
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    result = Exported(path, len(content), mean, least, facts)
    _print(result, to)
    return result


def trace(net: Backbone) -> torch.export.ExportedProgram:
    """The network, in evaluation mode, as a graph for any batch size from 1."""
    example = torch.zeros(2, 3, *net.input_size)
    # Without an end torch 2.7 cannot prove of a transformer's batch that it is not 2⁶³ - 1.
    batch = torch.export.Dim("batch", min=1, max=2**31 - 1)
    with torch.no_grad():
        program = torch.export.export(net.eval(), (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


# --- what to export, and where --------------------------------------------------------------------


def _check_options(to: str, int8: bool, calibration: Path | None, share_weights: bool) -> None:
    if to not in SUFFIXES:
        raise UserError(
            f"cannot export to {to!r}{did_you_mean(to, SUFFIXES)}; there are {', '.join(SUFFIXES)}"
        )
    if int8 and SUFFIXES[to] != ".onnx":
        raise UserError("int8 is for ONNX: give --to onnx or insightface with --int8")
    if int8 and calibration is None:
        raise UserError("int8 needs training faces to calibrate on: give --calibration SET")
    if calibration is not None and not int8:
        raise UserError("--calibration belongs to --int8")
    if share_weights and (to != "onnx" or int8):
        raise UserError("--share-weights is for ONNX and not for int8: leave one of them out")


def _checkpoint(given: Path) -> Path:
    """A model to export, which is no export itself."""
    checkpoint = bundle.run_of(given)
    if checkpoint.suffix in (".onnx", ".pt2") or (
        checkpoint.exists() and bundle.resolve(checkpoint).suffix == ".onnx"
    ):
        raise UserError(f"{checkpoint} is exported already: give the checkpoint it came from")
    return checkpoint


def _network(checkpoint: Path, to: str) -> Backbone:
    """The model's network, small enough for the format."""
    net = bundle.load(checkpoint)
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    if SUFFIXES[to] == ".onnx" and size > _LIMIT:
        raise UserError(
            f"the network has {size / 2**30:.1f} GiB of weights and one ONNX file holds less than "
            "2: give --to torch_export"
        )
    return net


def _target(checkpoint: Path, out: str | Path | None, to: str, int8: bool) -> Path:
    suffix = SUFFIXES[to]
    if out is None:
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        kind = ".insightface" if to == "insightface" else ""
        return folder / f"model{kind}{'.int8' if int8 else ''}{suffix}"
    path = Path(out)
    if path.suffix != suffix:
        raise UserError(f"{path} must end in {suffix}")
    if path.is_dir():
        raise UserError(f"{path} is a folder: give --out a file")
    return path


# --- faces to calibrate on and to check with ------------------------------------------------------


def _faces(net: Backbone, source: Source | None, images: int, seed: int) -> list[Tensor]:
    """Faces to check with, and before them up to ``images`` of a set to calibrate on."""
    wanted = sum(_BATCHES)
    if source is None:
        rng = np.random.default_rng(0)
        draw = synthetic.Identity.draw
        return [_input(net, synthetic.render(draw(rng), rng)) for _ in range(wanted)]
    order = np.random.default_rng(seed).permutation(len(source))
    found: list[Tensor] = []
    for index in order:
        if len(found) == images + wanted:
            break
        with suppress(OSError, UserError):
            found.append(_input(net, decode(source.read(int(index)))))
    if len(found) <= wanted:
        raise UserError(
            f"the calibration set has {len(found)} readable images; it needs more than {wanted}, "
            "better some hundreds"
        )
    return found


def _input(net: Backbone, image: np.ndarray) -> Tensor:
    """uint8 RGB (H, W, 3) to the network's input (1, 3, h, w)."""
    return net.preprocessing(torch.tensor(image).permute(2, 0, 1)[None].contiguous())


# --- the formats ----------------------------------------------------------------------------------


class AsInsightface(Backbone):
    """The same embeddings of square RGB images, normalised as (x - 127.5) / 127.5.

    insightface makes crops as large as the ONNX file's input, for sides that are multiples of 112.
    Another size, scale or order of colours that the network was trained with is therefore part of
    this one: a 1×1 convolution, and for the size two matrices, which every runtime multiplies with
    equally. They resize as `Preprocessing` does.

    Args:
        network: with its `preprocessing`. Crops get the least side that is no smaller.
    """

    colours: Tensor
    shift: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, network: Backbone) -> None:
        height, width = network.input_size
        side = SIZE * -(-max(height, width) // SIZE)
        super().__init__(network.embedding_dim, side)
        self.network = network
        self.config, self.metadata = network.config, network.metadata
        self.preprocessing = Preprocessing((side, side), std=(127.5, 127.5, 127.5))
        inner, given = network.preprocessing, self.preprocessing
        std, colours = torch.tensor(inner.std), torch.eye(3) * given.std[0]
        colours = colours.flip(1) if inner.colour_order == "BGR" else colours
        bias = (given.mean[0] - torch.tensor(inner.mean)) / std
        self.register_buffer("colours", (colours / std[:, None])[:, :, None, None])
        self.register_buffer("shift", bias)
        self.register_buffer("rows", _resizing(side, height))
        self.register_buffer("columns", _resizing(side, width).T.contiguous())

    def embed(self, images: Tensor) -> Tensor:
        images = F.conv2d(images, self.colours, self.shift)
        if self.input_size != self.network.input_size:
            images = self.rows @ images @ self.columns
        return self.network(images)


def _resizing(before: int, after: int) -> Tensor:
    """(after, before): the matrix that resizes a column of pixels, bilinear and antialiased."""
    units = torch.eye(before)[None, None]
    size = (after, before)
    return F.interpolate(units, size, mode="bilinear", antialias=True, align_corners=False)[0, 0]


def _content(
    net: Backbone, to: str, facts: dict[str, Any], measured: list[Tensor], folder: Path | None
) -> bytes:
    """What the file will hold; ``facts`` learns what the format changes of them.

    Args:
        measured: inputs to measure the ranges of activations on, for int8; none else.
        folder: of the weights that the file shares.
    """
    if to == "torch_export":
        return _saved(torch.export.save, trace(net), extra_files={EXTRA_FILE: json.dumps(facts)})
    if to == "arcface_torch":
        facts["preprocessing"] = foreign.ARCFACE_TORCH.to_dict()
        return _saved(torch.save, foreign.as_arcface_torch(net))
    import onnx

    model = _onnx(trace(net), optimize=folder is None)
    if measured:
        model = quantised(model, [face.numpy() for face in measured])
        facts["fingerprint"] = digest(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(model)
    if folder is not None:
        share(model, folder)
    return described(model, facts)


def _saved(save: Callable[..., None], thing: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    save(thing, buffer, **options)
    return buffer.getvalue()


def _onnx(program: torch.export.ExportedProgram, *, optimize: bool = True) -> Any:
    """An onnx.ModelProto; batch normalisation after a convolution or linear layer is folded.

    Without ``optimize`` all parameters stay, under their names.
    """
    with _errors_alone("torch.onnx"):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["embeddings"],
            verbose=False,
            optimize=optimize,
        )
    model = exported.model_proto  # type: ignore[union-attr]
    graph = model.graph
    for item in [model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output]:
        del item.metadata_props[:]  # the tracer's notes
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == graph.input[0].type.tensor_type.shape.dim[0].dim_param:
                dimension.dim_param = "batch"
    _tell_kernels(graph)
    return model


def _tell_kernels(graph: Any) -> None:
    """The size of each convolution's kernel, which a file may leave out and OpenCV 4 asks for."""
    import onnx

    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer} | {
        value.name: [one.dim_value for one in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    for node in graph.node:
        named = {attribute.name for attribute in node.attribute}
        if node.op_type == "Conv" and "kernel_shape" not in named and node.input[1] in shapes:
            size = shapes[node.input[1]][2:]
            node.attribute.append(onnx.helper.make_attribute("kernel_shape", size))


@contextmanager
def _errors_alone(name: str) -> Iterator[None]:
    """Hear no warnings of a logger: torch's exporter has one for each operator of torchvision."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# --- the check ------------------------------------------------------------------------------------


def _runner(
    content: bytes, to: str, folder: Path | None, net: Backbone
) -> Callable[[Tensor], Tensor]:
    if SUFFIXES[to] == ".onnx":
        network = OnnxNetwork(content, folder=folder)
        return lambda images: torch.from_numpy(network(images.numpy()))
    if to == "arcface_torch":
        with tempfile.TemporaryDirectory() as place:
            file = Path(place) / "network.pt"
            file.write_bytes(content)
            seen = foreign.ARCFACE_TORCH
            found = foreign.load(file, to, mean=seen.mean, std=seen.std, colour=seen.colour_order)
        return lambda images: found.network(foreign.for_arcface_torch(net, images))
    return torch.export.load(io.BytesIO(content)).module()


@torch.no_grad()
def _cosines(
    net: Backbone, exported: Callable[[Tensor], Tensor], faces: list[Tensor]
) -> np.ndarray:
    """Cosine of each face's two embeddings, in batches of each size of `_BATCHES`."""
    found, rest = [], iter(faces)
    for size in _BATCHES:
        images = torch.cat(list(islice(rest, size)))
        found.append(F.cosine_similarity(net(images).double(), exported(images).double()))
    return torch.cat(found).numpy()


def _print(result: Exported, to: str) -> None:
    expected = result.description["preprocessing"]
    height, width = expected["size"]
    seen = "normalised"
    if to in ("arcface_torch", "insightface"):  # whose users do not ask the file
        seen = f"{expected['colour_order']}, " + ", ".join(
            f"{name} {expected[name][0]:g}" for name in ("mean", "std")
        )
    sizes = f"{', '.join(map(str, _BATCHES[:-1]))} and {_BATCHES[-1]}"
    console.show(
        f"{result.path}: {result.bytes / 1e6:.2f} MB, {result.description['precision']}",
        f"  images      (batch, 3, {height}, {width}) float32, {seen}",
        f"  embeddings  (batch, {result.description['embedding_dim']}) float32",
        f"  agreement   cosine with PyTorch {result.cosine:.7f} on average, "
        f"{result.cosine_min:.7f} at least, in batches of {sizes}",
    )
