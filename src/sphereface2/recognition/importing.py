"""``sphereface2 import``: weights that other projects publish as a model of this package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from cyclopts import Parameter

from sphereface2 import console, onnx_runtime
from sphereface2.backbones import bundle
from sphereface2.backbones.onnx import METADATA_KEY, OnnxNetwork
from sphereface2.backbones.preprocessing import Preprocessing, as_size
from sphereface2.data import synthetic
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, check_choice
from sphereface2.extras import require
from sphereface2.files import atomic_folder, digest, read_yaml, writing
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.onnx_graphs import described, description, refill

PARALLEL = 0.999
"""Cosine from which on two embeddings count as one direction."""

IMAGES, EMBEDDINGS = "images", "embeddings"
SHORTEST = 16
"""Outputs of fewer numbers, such as the norm that AdaFace gives besides, are no embeddings."""

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
        sides = as_size(size[0] if len(size) == 1 else tuple(size), "--size") if size else None
        network = OnnxNetwork(adapted(file, size=sides, output=output, colour=colour, **options))
    else:
        from sphereface2.backbones import foreign

        found = foreign.load(file, from_, colour=colour or _colour(file, from_), **options)
        network, ignored = found.network, found.ignored
        with file.open("rb") as content:
            sha256 = hashlib.file_digest(content, "sha256").hexdigest()
        network.metadata = {"imported": {"from": from_, "file": file.name, "sha256": sha256}}
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
    """Cosines between embeddings of four unlike images; UserError if two have one direction."""
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


# -- a foreign ONNX network as one that `backbones.onnx.OnnxNetwork` runs --------------------------


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
    itself how it sees images, and stays as it is. Options are those of `import_weights`, ``size``
    (height, width).
    """
    require("imports of ONNX files", "onnx")
    onnx_runtime.load()
    import onnx

    if not file.is_file():
        raise UserError(f"{file} does not exist or is no file: give an .onnx file")
    given = {"size": size, "mean": mean, "std": std, "colour": colour, "output": output}
    try:
        model = onnx.load(file)
        content = model.SerializeToString()
        onnx_runtime.session(content)
    except Exception as error:  # of protobuf and of ONNX Runtime, which share no base but this
        raise UserError(f"{file} is damaged or not an ONNX file") from error
    if any(item.key == METADATA_KEY for item in model.metadata_props):
        _check_stated(OnnxNetwork(content), given, file)
        return content
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
