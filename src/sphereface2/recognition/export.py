"""A trained network as one file for other runtimes: ONNX, ONNX in 8 bits, or torch.export."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from sphereface2 import console, onnx_runtime
from sphereface2.align.template import SIZE, TEMPLATE
from sphereface2.backbones import Backbone, bundle
from sphereface2.backbones.onnx import FORMAT, FORMAT_VERSION, METADATA_KEY, OnnxNetwork
from sphereface2.data import synthetic
from sphereface2.data.opening import open_source
from sphereface2.data.source import Source
from sphereface2.errors import UserError, did_you_mean
from sphereface2.extras import require
from sphereface2.files import atomic_write, digest, writing
from sphereface2.images import decode
from sphereface2.recognition.shared_weights import share
from sphereface2.version import __version__

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
EXTRA_FILE = "sphereface2.json"
"""In a ``torch_export`` archive, what `METADATA_KEY` is in an ONNX file."""

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
    """Write a model as one ONNX file or torch.export archive, and check it against PyTorch.

    The file takes normalised float32 images (batch, 3, h, w), batch ≥ 1, and gives embeddings
    (batch, embedding_dim), not L2-normalised, as the network does. It describes itself in a JSON
    object: under the metadata key ``sphereface2`` of an ONNX file, in the extra file
    ``sphereface2.json`` of a ``torch_export`` archive.

    Args:
        checkpoint: A run, a model folder or its weights.
        to: "onnx" or "torch_export".
        int8: Quantise weights and activations to 8 bits (ONNX only).
        calibration: Training set on which the ranges of activations are measured; needed for
            `--int8`.
        share_weights: Write an ONNX graph without weights, which reads them from the model's
            `model.safetensors` beside it, in 16 or 32 bits.
        images: Number of its images to measure on, drawn without replacement.
        seed: Seed of that draw.
        out: File to write; default: `model.onnx`, `model.int8.onnx` or `model.pt2` beside the
            checkpoint. An existing file is replaced once the new one has been checked.

    Raises:
        UserError: a wrong option, a missing package, a file that cannot be written, or a result
            that differs from PyTorch; no file is written then.
    """
    if to not in SUFFIXES:
        raise UserError(
            f"cannot export to {to!r}{did_you_mean(to, SUFFIXES)}; there are {', '.join(SUFFIXES)}"
        )
    if int8 and to != "onnx":
        raise UserError("int8 is for ONNX: give --to onnx with --int8")
    if int8 and calibration is None:
        raise UserError("int8 needs training faces to calibrate on: give --calibration SET")
    if calibration is not None and not int8:
        raise UserError("--calibration belongs to --int8")
    if share_weights and (to != "onnx" or int8):
        raise UserError("--share-weights is for ONNX and not for int8: leave one of them out")
    if images < 1:
        raise UserError(f"the number of calibration images must be at least 1, not {images}")
    checkpoint = bundle.run_of(checkpoint)
    if checkpoint.suffix in SUFFIXES.values() or (
        checkpoint.exists() and bundle.resolve(checkpoint).suffix == ".onnx"
    ):
        raise UserError(f"{checkpoint} is exported already: give the checkpoint it came from")
    path = _target(checkpoint, out, SUFFIXES[to], int8)
    folder = bundle.resolve(checkpoint).resolve() if share_weights else None
    if folder is not None and path.parent.resolve() != folder:
        raise UserError(f"with --share-weights the file must lie beside its weights, in {folder}")
    source = open_source(calibration) if calibration is not None else None
    if to == "onnx":
        _require_onnx()
        import onnx
    net = bundle.load(checkpoint)
    if to == "onnx" and (size := _bytes(net)) > _LIMIT:
        raise UserError(
            f"the network has {size / 2**30:.1f} GiB of weights and one ONNX file holds less than "
            "2: give --to torch_export"
        )
    fingerprint = bundle.fingerprint(net)
    with Console(stderr=True).status(f"exporting to {to}"):
        description: dict[str, Any] = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "fingerprint": fingerprint,
            "checkpoint_fingerprint": fingerprint,
            "precision": "int8" if int8 else "float32",
            "backbone": net.config,
            "embedding_dim": net.embedding_dim,
            "preprocessing": net.preprocessing.to_dict(),
            "aligner": {"size": SIZE, "template": TEMPLATE.tolist()},
            "metadata": net.metadata,
        }
        faces = _synthetic_faces(net) if source is None else _faces(net, source, images, seed)
        program = trace(net)
        if to == "torch_export":
            content = _archive(program, description)
        else:
            model = _onnx(program, optimize=folder is None)
            if source is not None:
                model = _quantised(model, faces[: -sum(_BATCHES)])
                description["fingerprint"] = digest(model.SerializeToString(deterministic=True))
                description["calibration"] = {
                    "set_fingerprint": source.fingerprint(),
                    "images": len(faces) - sum(_BATCHES),
                    "seed": seed,
                }
            onnx.checker.check_model(model)
            if folder is not None:
                model = share(model, folder)
            content = described(model, description)
        cosines = _cosines(net, _runner(content, to, folder), faces[-sum(_BATCHES) :])
    least, mean = float(cosines.min()), float(cosines.mean())
    bad = mean < PARITY_INT8 if int8 else least < PARITY
    if bad or not np.isfinite(mean):
        raise UserError(
            f"the exported network differs from PyTorch: cosine {mean:.6f} on average, "
            f"{least:.6f} at least; nothing was written"
        )
    with writing(path):
        atomic_write(path, content)
    result = Exported(path, len(content), mean, least, description)
    _print(result)
    return result


def trace(net: Backbone) -> torch.export.ExportedProgram:
    """The network, in evaluation mode, as a graph for any batch size from 1."""
    example = torch.zeros(2, 3, *net.input_size)
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(net.eval(), (example,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def _target(checkpoint: Path, out: str | Path | None, suffix: str, int8: bool) -> Path:
    if out is None:
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        return folder / f"model{'.int8' if int8 else ''}{suffix}"
    path = Path(out)
    if path.suffix != suffix:
        raise UserError(f"{path} must end in {suffix}")
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"{path} cannot be written: {path.parent} must be a folder, and the path itself not one"
        )
    return path


def _require_onnx() -> None:
    onnx_runtime.load()  # before onnxscript, which imports it where it is installed
    require("exports to ONNX", "onnx", "onnxscript")


def _bytes(net: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in net.state_dict().values())


# --- faces to calibrate on and to check with ------------------------------------------------------


def _synthetic_faces(net: Backbone) -> list[Tensor]:
    rng = np.random.default_rng(0)
    identity = synthetic.Identity
    drawn = [synthetic.render(identity.draw(rng), rng) for _ in range(sum(_BATCHES))]
    return [_input(net, image) for image in drawn]


def _faces(net: Backbone, source: Source, images: int, seed: int) -> list[Tensor]:
    """Up to ``images`` faces to calibrate on and `sum(_BATCHES)` others to check with."""
    order = np.random.default_rng(seed).permutation(len(source))
    wanted = images + sum(_BATCHES)
    found = list(islice(_readable(net, source, order), wanted))
    if len(found) <= sum(_BATCHES):
        raise UserError(
            f"the calibration set has {len(found)} readable images; "
            f"it needs more than {sum(_BATCHES)}, better some hundreds"
        )
    return found


def _readable(net: Backbone, source: Source, order: np.ndarray) -> Iterator[Tensor]:
    for index in order:
        try:
            image = decode(source.read(int(index)))
        except (OSError, UserError):
            continue
        yield _input(net, image)


def _input(net: Backbone, image: np.ndarray) -> Tensor:
    """uint8 RGB (H, W, 3) to the network's input (1, 3, h, w)."""
    return net.preprocessing(torch.tensor(image).permute(2, 0, 1)[None].contiguous())


# --- the formats ----------------------------------------------------------------------------------


def _archive(program: torch.export.ExportedProgram, description: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={EXTRA_FILE: json.dumps(description)})
    return buffer.getvalue()


def _onnx(program: torch.export.ExportedProgram, *, optimize: bool = True) -> Any:
    """An onnx.ModelProto; batch normalisation after a convolution or linear layer is folded.

    Without ``optimize`` all parameters stay, under their names.
    """
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
    return model


def described(model: Any, description: dict[str, Any]) -> bytes:
    """The file of an onnx.ModelProto that says about itself what `description` does."""
    import onnx

    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(description)})
    model.producer_name, model.producer_version = "sphereface2", __version__
    return model.SerializeToString()


def _quantised(model: Any, faces: list[Tensor]) -> Any:
    """The model in 8 bits, with activation ranges (minimum and maximum) measured on ``faces``.

    Activations are uint8, weights int8, one scale an output channel. Weights use 7 of their 8
    bits: x86 processors without VNNI saturate sums of 8-bit products, and a file must give the
    same embeddings everywhere. The embedding itself stays float.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = (faces[i : i + 32] for i in range(0, len(faces), 32))

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[override]
            batch = next(self.batches, None)
            return None if batch is None else {"images": torch.cat(batch).numpy()}

    _integer_friendly(model)
    # Otherwise the quantiser warns that its preparation, which is folding, was left out.
    add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "quantised.onnx"
        quantize_static(
            model,
            result,
            Reader(),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm"]},
        )
        return onnx.load(result)


def _integer_friendly(model: Any) -> None:
    """Write as convolutions what has no integer kernel and would go back to float each time.

    Batch normalisation that could not be folded (before a padded convolution) is a 1×1 depthwise
    convolution, and PReLU with a slope a channel is a·x + (1 − a)·max(x, 0). The same function, and
    twice the speed of an IResNet in 8 bits.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    constants = {item.name: item for item in graph.initializer}

    def constant(name: str) -> np.ndarray:
        return numpy_helper.to_array(constants[name]).astype(np.float64)

    def depthwise(x: str, weight: np.ndarray, bias: np.ndarray | None, y: str) -> Any:
        inputs = [x]
        for suffix, values in (("weight", weight.reshape(-1, 1, 1, 1)), ("bias", bias)):
            if values is not None:
                inputs.append(f"{y}.{suffix}")
                graph.initializer.append(
                    numpy_helper.from_array(values.astype(np.float32), inputs[-1])
                )
        return helper.make_node(
            "Conv", inputs, [y], f"{y}.conv", group=len(weight), kernel_shape=[1, 1]
        )

    def is_image(name: str) -> bool:
        return ranks.get(name) == 4

    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in graph.value_info}
    nodes = []
    for node in graph.node:
        x, y = node.input[0] if node.input else "", node.output[0]
        known = all(name in constants for name in node.input[1:])
        if node.op_type == "BatchNormalization" and known and is_image(x):
            scale, shift, mean, variance = (constant(name) for name in node.input[1:])
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
            factor = scale / np.sqrt(variance + epsilon)
            nodes.append(depthwise(x, factor, shift - mean * factor, y))
        elif node.op_type == "PRelu" and known and is_image(x) and constant(node.input[1]).size > 1:
            slope = constant(node.input[1]).reshape(-1)
            nodes += [
                depthwise(x, slope, None, f"{y}.linear"),
                helper.make_node("Relu", [x], [f"{y}.relu"], f"{y}.relu"),
                depthwise(f"{y}.relu", 1 - slope, None, f"{y}.positive"),
                helper.make_node("Add", [f"{y}.linear", f"{y}.positive"], [y], f"{y}.add"),
            ]
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [item for item in graph.initializer if item.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


# --- the check ------------------------------------------------------------------------------------


def _runner(content: bytes, to: str, folder: Path | None) -> Callable[[Tensor], Tensor]:
    if to == "onnx":
        network = OnnxNetwork(content, folder=folder)
        return lambda images: torch.from_numpy(network(images.numpy()))
    return torch.export.load(io.BytesIO(content)).module()


@torch.no_grad()
def _cosines(
    net: Backbone, exported: Callable[[Tensor], Tensor], faces: list[Tensor]
) -> np.ndarray:
    """Cosine of each face's two embeddings, in batches of each size of `_BATCHES`."""
    found, rest = [], iter(faces)
    for size in _BATCHES:
        images = torch.cat(list(islice(rest, size)))
        found.append(cosine_similarity(net(images).double(), exported(images).double()))
    return torch.cat(found).numpy()


def _print(result: Exported) -> None:
    height, width = result.description["preprocessing"]["size"]
    sizes = f"{', '.join(map(str, _BATCHES[:-1]))} and {_BATCHES[-1]}"
    console.show(
        f"{result.path}: {result.bytes / 1e6:.2f} MB, {result.description['precision']}",
        f"  images      (batch, 3, {height}, {width}) float32, normalised",
        f"  embeddings  (batch, {result.description['embedding_dim']}) float32",
        f"  agreement   cosine with PyTorch {result.cosine:.7f} on average, "
        f"{result.cosine_min:.7f} at least, in batches of {sizes}",
    )
