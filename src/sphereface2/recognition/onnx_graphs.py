"""ONNX graphs that describe themselves, in 8 bits, or with a model's own file of weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.backbones.bundle import WEIGHTS
from sphereface2.backbones.onnx import FORMAT, FORMAT_VERSION, METADATA_KEY
from sphereface2.version import __version__

_TYPES = {"F16": "FLOAT16", "BF16": "BFLOAT16", "F32": "FLOAT"}
_PASSED = ("Expand", "CastLike", "Cast", "Identity")


def description(**facts: Any) -> dict[str, Any]:
    """What an exported network says about itself, JSON-able: the format's facts and others."""
    versions = {"format_version": FORMAT_VERSION, "package_version": __version__}
    return {"format": FORMAT, **versions, **facts}


def described(model: Any, description: dict[str, Any]) -> bytes:
    """The file of an onnx.ModelProto that says about itself what `description` does."""
    import onnx

    onnx.helper.set_model_props(model, {METADATA_KEY: json.dumps(description)})
    model.producer_name, model.producer_version = "sphereface2", __version__
    return model.SerializeToString()


def refill(field: Any, items: Iterable[Any]) -> None:
    """Replace all items of a repeated field of a message."""
    items = list(items)
    del field[:]
    field.extend(items)


def quantised(model: Any, faces: list[np.ndarray]) -> Any:
    """The model in 8 bits, with activation ranges (minimum and maximum) measured on images.

    Activations are uint8, weights int8, one scale an output channel. Weights use 7 of their 8
    bits: x86 processors without VNNI saturate sums of 8-bit products, and a file must give the
    same embeddings everywhere. The embedding itself stays float.

    Args:
        model: onnx.ModelProto.
        faces: float32 (1, 3, h, w) each, normalised.
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
            return None if batch is None else {"images": np.concatenate(batch)}

    _integer_friendly(model)
    # Otherwise the quantiser warns that its preparation, which is folding, was left out.
    add_pre_process_metadata(model)
    with tempfile.TemporaryDirectory() as folder:
        # A file: onnxruntime 1.18 to 1.20 spoil a model in memory before they have read it.
        given, result = Path(folder) / "float.onnx", Path(folder) / "quantised.onnx"
        onnx.save(model, given)
        quantize_static(
            given,
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
    refill(graph.node, nodes)
    used = {name for node in nodes for name in node.input}
    refill(graph.initializer, [item for item in graph.initializer if item.name in used])


def share(model: Any, folder: Path) -> None:
    """Make the weights of a graph, exported without optimisation, those of a model folder.

    Weights stored in 16 bits are widened when the graph is loaded; it computes in float32.

    Args:
        model: onnx.ModelProto, whose initialisers carry the names of the parameters.
        folder: of the model.
    """
    from onnx import TensorProto, helper

    _tidy(model)
    graph = model.graph
    stored, start = _header(folder / WEIGHTS)
    kept, casts = [], []
    for item in graph.initializer:
        entry = stored.get(item.name)
        if entry is None or entry["dtype"] not in _TYPES:
            kept.append(item)
            continue
        narrow = entry["dtype"] != "F32"
        tensor = TensorProto(
            name=f"{item.name}.stored" if narrow else item.name,
            data_type=getattr(TensorProto, _TYPES[entry["dtype"]]),
            dims=entry["shape"],
            data_location=TensorProto.EXTERNAL,
        )
        first, last = entry["data_offsets"]
        place = {"location": WEIGHTS, "offset": start + first, "length": last - first}
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
        kept.append(tensor)
        if narrow:
            casts.append(helper.make_node("Cast", [tensor.name], [item.name], to=TensorProto.FLOAT))
    refill(graph.node, [*casts, *graph.node])
    refill(graph.initializer, kept)


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Where each tensor of a safetensors file lies, and where its data begin."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length)), 8 + length


def _tidy(model: Any) -> None:
    """Batch normalisation straight from its parameters, no bias of zeros: ONNX Runtime then folds.

    The exporter spells both out by nodes that compute constants.
    """
    from onnxscript.optimizer import remove_unused_nodes

    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    parameters = {item.name for item in graph.initializer}

    def origin(name: str) -> str:
        while name in makers and makers[name].op_type in _PASSED:
            name = makers[name].input[0]
        return name

    for node in graph.node:
        if node.op_type == "Conv" and len(node.input) > 2 and node.input[2] not in parameters:
            del node.input[2:]
        if node.op_type == "BatchNormalization":
            for place in range(1, 5):
                node.input[place] = origin(node.input[place])
    remove_unused_nodes(model)
    del model.graph.value_info[:]
