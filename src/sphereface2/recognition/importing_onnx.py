"""A foreign ONNX network as one that `backbones.onnx.OnnxNetwork` runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sphereface2 import onnx_runtime
from sphereface2.backbones.onnx import METADATA_KEY, OnnxNetwork
from sphereface2.backbones.preprocessing import Preprocessing
from sphereface2.errors import UserError
from sphereface2.extras import require
from sphereface2.files import digest
from sphereface2.recognition.onnx_graphs import described, description, refill

IMAGES, EMBEDDINGS = "images", "embeddings"
SHORTEST = 16
"""Outputs of fewer numbers, such as the norm that AdaFace gives besides, are no embeddings."""


def adapted(
    file: Path,
    *,
    size: tuple[int, int] | None = None,
    output: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    colour: str | None = None,
) -> bytes:
    """The file's network with images (batch, 3, h, w) as its input and its embeddings (batch, d).

    A transposition is added where the graph takes (batch, h, w, 3), and a flattening where the
    embedding has more dimensions. A fixed batch becomes free if the embeddings stay the same;
    otherwise it stays 1, and the images are embedded one by one. A file that `export` wrote says
    itself how it sees images, and stays as it is.

    Args:
        file: an ONNX file.
        size: (height, width), where the graph leaves them open.
        output: name of the embedding, where there are several.
        mean, std, colour: of `Preprocessing`; default: 127.5, 127.5 and RGB.

    Raises:
        UserError: no such graph, a missing package, or the file says something else of its images.
    """
    require("imports of ONNX files", "onnx")
    import onnx

    if not file.is_file():
        raise UserError(f"{file} does not exist or is no file")
    given = {"size": size, "mean": mean, "std": std, "colour": colour, "output": output}
    try:
        model = onnx.load(file)
        if any(item.key == METADATA_KEY for item in model.metadata_props):
            content = model.SerializeToString()
            _check_stated(OnnxNetwork(content), given, file)
            return content
        onnx_runtime.session(model.SerializeToString())
    except UserError:
        raise
    except Exception as error:  # of protobuf and of ONNX Runtime, which share no base but this
        raise UserError(f"{file} is damaged or not an ONNX file") from error
    mean, std, colour = mean or (127.5,) * 3, std or (127.5,) * 3, colour or "RGB"
    sides, batch, channels_last = _input(model, size, file)
    rng = np.random.default_rng(0)
    probes = rng.uniform(-1, 1, (batch or 2, 3, *sides)).astype(np.float32)
    images = probes.transpose(0, 2, 3, 1) if channels_last else probes
    name, found = _embedding(_run(model, images), output, len(probes), file)
    alone = onnx.ModelProto.FromString(model.SerializeToString())
    _rewire(alone, sides, channels_last, name, found, batch)
    if batch:
        free = onnx.ModelProto.FromString(model.SerializeToString())
        _free_batch(free, batch)
        _rewire(free, sides, channels_last, name, found, None)
        if _same(free, alone, probes):
            alone = free
        elif batch > 1:
            raise UserError(
                f"{file} embeds {batch} images at a time and its graph does not allow another "
                "number: export it with a batch of 1 or a free one"
            )
    content = alone.SerializeToString(deterministic=True)
    facts = description(
        fingerprint=digest(content, repr((mean, std, colour))),
        precision="float32",
        embedding_dim=found.size // len(probes),
        preprocessing=Preprocessing(sides, mean, std, colour).to_dict(),  # type: ignore[arg-type]
        metadata={"imported": {"from": "onnx", "file": file.name}},
    )
    return described(alone, facts)


def _check_stated(network: OnnxNetwork, given: dict[str, Any], file: Path) -> None:
    """Refuse options that contradict what a file that `export` wrote says about itself."""
    seen = network.preprocessing
    stated = {"size": seen.size, "mean": seen.mean, "std": seen.std, "colour": seen.colour_order}
    for name, value in {**stated, "output": EMBEDDINGS}.items():
        if given[name] not in (None, value):
            shown = value if isinstance(value, str) else " ".join(f"{one:g}" for one in value)
            raise UserError(
                f"{file} was written by `sphereface2 export` and says that its {name} is {shown}: "
                f"leave --{name} out"
            )


def _run(model: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    session = onnx_runtime.session(model.SerializeToString())
    images = np.ascontiguousarray(images)
    names = [place.name for place in session.get_outputs()]
    return dict(zip(names, session.run(None, {_inputs(model)[0].name: images}), strict=True))


def _inputs(model: Any) -> list[Any]:
    constants = {item.name for item in model.graph.initializer}
    return [place for place in model.graph.input if place.name not in constants]


def _input(
    model: Any, size: tuple[int, int] | None, file: Path
) -> tuple[tuple[int, int], int | None, bool]:
    """(height, width), the fixed batch or None, and whether channels come last."""
    import onnx

    places = _inputs(model)
    kind = places[0].type.tensor_type if places else None
    shape = [place.dim_value or None for place in kind.shape.dim] if kind else []
    if kind is None or len(places) != 1 or len(shape) != 4:
        raise UserError(f"{file} must have one input, images of 4 dimensions, has {len(places)}")
    if kind.elem_type != onnx.TensorProto.FLOAT:
        raise UserError(f"{file} must take float32 images; export it with that type")
    batch, *rest = shape
    if rest[0] != 3 and rest[2] != 3:
        raise UserError(f"{file} must take images of 3 channels, takes {shape}")
    channels_last = rest[0] != 3
    sides = rest[:2] if channels_last else rest[1:]
    if None in sides and size is None:
        raise UserError(f"{file} leaves the size of its images open: give --size")
    if size and any(side not in (None, given) for side, given in zip(sides, size, strict=True)):
        raise UserError(f"{file} takes images of {sides[0]} × {sides[1]}: leave --size out")
    height, width = size or (sides[0] or 0, sides[1] or 0)
    return (height, width), batch, channels_last


def _embedding(
    outputs: dict[str, np.ndarray], wanted: str | None, batch: int, file: Path
) -> tuple[str, np.ndarray]:
    likely = {
        name: value
        for name, value in outputs.items()
        if value.ndim > 1 and value.shape[0] == batch and value.size >= SHORTEST * batch
    }
    if wanted is not None and wanted not in likely:
        raise UserError(f"{file} has no embedding {wanted!r}: it has {', '.join(likely) or 'none'}")
    if wanted is None and len(likely) != 1:
        raise UserError(
            f"{file} has {len(likely)} outputs that may be the embedding "
            f"({', '.join(likely) or 'none'}): give --output NAME of one that is"
        )
    name = wanted or next(iter(likely))
    if likely[name].dtype != np.float32:
        raise UserError(f"{file} gives embeddings of {likely[name].dtype}, not float32")
    return name, likely[name]


def _rewire(
    model: Any,
    sides: tuple[int, int],
    channels_last: bool,
    name: str,
    found: np.ndarray,
    batch: int | None,
) -> None:
    """Make `IMAGES` the input and `EMBEDDINGS` the only output of the graph."""
    import onnx.compose
    from onnx import TensorProto, helper

    graph, count = model.graph, batch or "batch"
    taken = {value for node in graph.node for value in [*node.input, *node.output]}
    if taken & {IMAGES, EMBEDDINGS}:  # the graph's own values of these names get others
        onnx.compose.add_prefix_graph(graph, "own.", inplace=True)
        name = f"own.{name}"
    place = _inputs(model)[0]
    order = [0, 2, 3, 1] if channels_last else [0, 1, 2, 3]
    first = helper.make_node("Transpose", [IMAGES], [place.name], "sphereface2.images", perm=order)
    last = helper.make_node("Flatten", [name], [EMBEDDINGS], "sphereface2.embeddings", axis=1)
    refill(graph.node, [first, *graph.node, last])
    images = helper.make_tensor_value_info(IMAGES, TensorProto.FLOAT, [count, 3, *sides])
    refill(graph.input, [images, *(item for item in graph.input if item.name != place.name)])
    shape = [count, found.size // len(found)]
    embeddings = helper.make_tensor_value_info(EMBEDDINGS, TensorProto.FLOAT, shape)
    refill(graph.output, [embeddings])
    del graph.value_info[:]


def _free_batch(model: Any, batch: int) -> None:
    """Let each reshaping that states the batch keep whatever number there is."""
    from onnx import numpy_helper

    shapes = {node.input[1] for node in model.graph.node if node.op_type == "Reshape"}
    tensors = [item for item in model.graph.initializer if item.name in shapes]
    for node in model.graph.node:
        if node.op_type == "Constant" and node.output[0] in shapes:
            tensors += [attribute.t for attribute in node.attribute if attribute.name == "value"]
    for tensor in tensors:
        wanted = numpy_helper.to_array(tensor).copy()
        if wanted.ndim == 1 and wanted.size > 1 and wanted[0] == batch:
            wanted[0] = 0  # the input's
            tensor.CopyFrom(numpy_helper.from_array(wanted, tensor.name))


def _same(free: Any, fixed: Any, images: np.ndarray) -> bool:
    """Whether both graphs embed equally, the free one any number of images."""
    try:
        expected = _run(fixed, images)[EMBEDDINGS]
        several = np.concatenate([images, images[::-1, :, ::-1]])
        found = _run(free, several)[EMBEDDINGS]
        last = _run(fixed, several[len(images) :])[EMBEDDINGS]
    except Exception:  # of ONNX Runtime: the graph does not allow it
        return False
    return found.shape[0] == len(several) and bool(
        np.allclose(found, np.concatenate([expected, last]), rtol=1e-3, atol=1e-5)
    )
