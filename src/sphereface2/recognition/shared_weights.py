"""An ONNX graph that reads its weights from the model's ``model.safetensors`` beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sphereface2.backbones.bundle import WEIGHTS

_TYPES = {"F16": "FLOAT16", "BF16": "BFLOAT16", "F32": "FLOAT"}
_PASSED = ("Expand", "CastLike", "Cast", "Identity")


def share(model: Any, folder: Path) -> Any:
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
    for field, items in ((graph.node, [*casts, *graph.node]), (graph.initializer, kept)):
        del field[:]
        field.extend(items)
    return model


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
