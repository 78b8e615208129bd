"""Weights that other projects publish, under the names of this package's networks.

Four projects write three networks: IResNets (``arcface_torch``, OpenSphere, and under other names
AdaFace and CVLface), ``arcface_torch``'s MobileFaceNet and OpenSphere's SFNets. A family below says
by which parameter it is known and how its parameters are renamed; what a network is built with
(depth, width, embedding, side of its images) is read off the shapes.
"""

from __future__ import annotations

import math
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sphereface2.backbones import bundle, iresnet, sfnet
from sphereface2.backbones.base import Backbone
from sphereface2.backbones.preprocessing import Preprocessing
from sphereface2.backbones.registry import build
from sphereface2.errors import UserError

Weights = dict[str, Tensor]
Conversion = tuple[str, dict[str, Any], Weights]
"""A backbone's name, its options, and its weights by its own names."""

_HEADS = re.compile(r"head|loss|margin|kernel|classif|softmax|criterion|arcface|cosface", re.I)
# Frameworks leave objects of theirs in a checkpoint; their places are filled by empty stand-ins.
_FRAMEWORKS = (
    *("argparse.", "lightning", "pytorch_lightning.", "omegaconf.", "easydict.", "yacs."),
    *("numpy.", "pathlib.", "collections.", "typing.", "torch.optim."),
)


@dataclass(frozen=True)
class Family:
    """Networks of one naming of parameters.

    Attributes:
        anchor: a parameter that every one of them has, and no other family.
        roots: first parts of the names of all its parameters.
        convert: its weights to a `Conversion`.
    """

    anchor: str
    roots: frozenset[str]
    convert: Callable[[Weights], Conversion]


@dataclass(frozen=True)
class Found:
    """A network in a checkpoint.

    Attributes:
        network: in evaluation mode.
        ignored: names of what else the checkpoint holds, with the number of tensors.
    """

    network: Backbone
    ignored: dict[str, int]


def load(
    file: Path,
    layout: str,
    *,
    mean: tuple[float, ...] = (127.5,) * 3,
    std: tuple[float, ...] = (127.5,) * 3,
    colour: str,
) -> Found:
    """Read a checkpoint of another project as one of this package's networks.

    Nothing in the file is executed. Prefixes (of DistributedDataParallel, Lightning, CVLface) are
    found by the network's own names; the head and the optimiser are left out.

    Args:
        file: ``.pth``, ``.pt``, ``.ckpt`` or ``.safetensors``.
        layout: a key of `LAYOUTS`.
        mean, std: of the pixels, in 0..255 units and the order of ``colour``.
        colour: "RGB" or "BGR".

    Raises:
        UserError: an unreadable file, one that would run code, or another network.
    """
    if file.suffix == ".onnx":
        raise UserError(f"{file} is an ONNX file, not a checkpoint of PyTorch: give --from onnx")
    tensors = dict(_flat(_read(file)))
    families = LAYOUTS[layout]
    for family in families:
        prefixes = [
            name.removesuffix(family.anchor)
            for name in tensors
            if name == family.anchor or name.endswith(f".{family.anchor}")
        ]
        if prefixes:
            break
    else:
        others = [
            other
            for other, known in LAYOUTS.items()
            if any(name.endswith(one.anchor) for one in known for name in tensors)
        ]
        hint = f": it looks like {' or '.join(others)}" if others else ""
        raise UserError(f"{file} holds no network of {layout}{hint}; give --from accordingly")
    if len(prefixes) > 1:
        raise UserError(
            f"{file} holds {len(prefixes)} networks ({', '.join(map(repr, prefixes))}): save the "
            "one that is wanted to a file of its own"
        )
    weights, ignored = _parted(tensors, prefixes[0], family, file)
    name, options, weights = family.convert(weights)
    try:
        with torch.random.fork_rng(devices=[]):
            network = build(name, **options, mean=mean, std=std, colour_order=colour)
    except UserError as error:
        raise UserError(f"{file} holds a network that cannot be built: {error}") from error
    wanted = network.state_dict()
    for key, value in wanted.items():  # which checkpoints of old lack
        if key.endswith("num_batches_tracked"):
            weights.setdefault(key, torch.zeros_like(value))
    bundle.check_weights(weights, wanted, file, name)
    network.load_state_dict({key: weights[key].to(wanted[key].dtype) for key in wanted})
    return Found(network.eval(), ignored)


def _parted(
    tensors: Weights, prefix: str, family: Family, file: Path
) -> tuple[Weights, dict[str, int]]:
    """The network's tensors, and how many others there are by the part that they belong to."""
    weights: Weights = {}
    ignored: dict[str, int] = {}
    for name, tensor in tensors.items():
        own = name.removeprefix(prefix)
        root = own.split(".")[0]
        if name.startswith(prefix) and root in family.roots:
            weights[own] = tensor
            continue
        if name.startswith(prefix) and not _HEADS.search(own):
            raise UserError(f"{file} holds another network: it has an unknown tensor {name!r}")
        parent = prefix[: prefix.rstrip(".").rfind(".") + 1]  # of Lightning's state_dict.model.
        part = name.removeprefix(parent).split(".")[0]
        ignored[part] = ignored.get(part, 0) + 1
    return weights, ignored


# -- reading -------------------------------------------------------------------------------------


def _read(file: Path) -> Any:
    """The content of a checkpoint; what is not data has an empty stand-in or is refused."""
    if not file.is_file():
        raise UserError(f"{file} does not exist or is no file: give a file of weights")
    if file.suffix == ".safetensors":
        import safetensors.torch
        from safetensors import SafetensorError

        try:
            return safetensors.torch.load_file(file)
        except (SafetensorError, ValueError) as error:
            raise UserError(f"{file} is damaged or not a safetensors file: {error}") from error
    with ExitStack() as standing_in:
        try:
            named = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except Exception:  # the old format, of one pickle, or no checkpoint at all
            named = []
        if foreign := [name for name in named if not name.startswith(_FRAMEWORKS)]:
            raise _runs_code(file, ", ".join(foreign))
        standing_in.enter_context(torch.serialization.safe_globals([_stand_in(n) for n in named]))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of pickles' protocols
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            blamed = re.search(r"GLOBAL (\S+)", str(error))
            if blamed is None:
                raise UserError(f"{file} is damaged or no checkpoint of PyTorch") from error
            raise _runs_code(file, blamed[1]) from error
        except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
            raise UserError(f"{file} is damaged or no checkpoint of PyTorch") from error


def _runs_code(file: Path, names: str) -> UserError:
    return UserError(
        f"{file} is more than weights: loading it would call {names}; if you trust it, save its "
        "state dict alone to a new file"
    )


def _stand_in(name: str) -> type:
    """A class of that name; calling it gives a mapping (of numpy's, an object without content)."""
    module, _, own = name.rpartition(".")

    def new(cls: type, *_: object, **__: object) -> object:
        return object.__new__(cls) if module.startswith("numpy") else OrderedDict()

    nothing = {"__init__": lambda *_, **__: None, "__setstate__": lambda *_: None}
    made = type(own, (), {**nothing, "__new__": new, "__module__": module})
    made.__qualname__ = own
    return made


def _flat(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested mappings by their dotted names."""
    if not isinstance(tree, dict):
        return
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            yield name, value
        else:
            yield from _flat(value, f"{name}.")


# -- families ------------------------------------------------------------------------------------


def _units(weights: Weights, known: dict[str, tuple[int, int, int, int]], blocks: int) -> str:
    """The network whose four stages have as many residual units as ``layer1`` to ``layer4``.

    ``blocks`` of a stage are no residual units.
    """
    counts = []
    for stage in range(1, 5):
        numbers = [int(k.split(".")[1]) for k in weights if k.startswith(f"layer{stage}.")]
        counts.append(max(numbers, default=blocks - 1) + 1 - blocks)
    for name, units in known.items():
        if units == tuple(counts):
            return name
    raise UserError(
        f"a network of {counts} residual units is not known; known are "
        f"{', '.join(f'{name} {list(units)}' for name, units in known.items())}"
    )


def _shape(weights: Weights, name: str, dimensions: int) -> tuple[int, ...]:
    found = weights.get(name)
    if found is None or found.ndim != dimensions:
        raise UserError(f"the network has no tensor {name!r} of {dimensions} dimensions")
    return tuple(found.shape)


def _sized(weights: Weights, first: str, channels: int) -> dict[str, Any]:
    """Width, length of the embedding and side of the images, from the first layer and ``fc``."""
    width = _shape(weights, first, 4)[0] / channels
    dimension, inputs = _shape(weights, "fc.weight", 2)
    side = math.isqrt(round(inputs / (512 * width)))
    options: dict[str, Any] = {"embedding_dim": dimension, "input_size": 16 * max(side, 1)}
    return options if width == 1 else {**options, "width": width}


def _iresnet(weights: Weights) -> Conversion:
    name = _units(weights, iresnet.UNITS, 0)
    return name, _sized(weights, "conv1.weight", 64), weights


def _mobilefacenet(weights: Weights) -> Conversion:
    width = _shape(weights, "layers.0.layers.0.weight", 4)[0] / 128
    side = _shape(weights, "features.layers.0.layers.0.weight", 4)[2]
    options = {
        "embedding_dim": _shape(weights, "features.layers.2.weight", 2)[0],
        "input_size": 16 * side,
    }
    return "mobilefacenet", options if width == 1 else {**options, "width": width}, weights


def _sfnet(weights: Weights) -> Conversion:
    def renamed(name: str) -> str:
        name = re.sub(r"^features\.", "norm.", name)
        name = re.sub(r"^layer(\d)\.", lambda found: f"stages.{int(found[1]) - 1}.", name)
        name = re.sub(r"^(stages\.\d\.0\.)(conv|bn)1\.", r"\1\2.", name)
        return re.sub(r"\.bn(\d?)\.", r".norm\1.", name)

    options = _sized(weights, "layer1.0.conv1.weight", 64)
    options |= {"activation": "relu", "batch_norm": "layer1.0.bn1.weight" in weights}
    name = _units(weights, sfnet.UNITS, 1)
    return name, options, {renamed(key): value for key, value in weights.items()}


_IR_UNIT = ("bn1", "conv1", "bn2", "prelu", "conv2", "bn3")
_IR_REST = {
    "input_layer.0": "conv1",
    "input_layer.1": "bn1",
    "input_layer.2": "prelu",
    "output_layer.0": "bn2",
    "output_layer.3": "fc",
    "output_layer.4": "features",
}


def _ir(weights: Weights) -> Conversion:
    """AdaFace's and CVLface's IR networks are IResNets but for two layers without weights.

    The shortcut of the first unit, which takes every other pixel, becomes a 1×1 convolution with
    the identity, and the last normalisation, which neither scales nor shifts, scales by 1.
    """
    if any("se_block" in key for key in weights):
        raise UserError("IR networks with squeeze-and-excitation blocks (IR-SE) are not known")
    places: list[str] = []  # layerL.U of body.N
    stage = unit = depth = 0
    while (key := f"body.{len(places)}.res_layer.1.weight") in weights:
        outputs, _, kernel, _ = _shape(weights, key, 4)
        if kernel != 3:
            raise UserError("IR networks of bottleneck units (IR-152, IR-200) are not known")
        stage, unit = (stage, unit + 1) if outputs == depth else (stage + 1, 0)
        depth = outputs
        places.append(f"layer{stage}.{unit}")
    renamed: Weights = {}
    for key, value in weights.items():
        module, _, own = key.rpartition(".")
        if found := re.fullmatch(r"body\.(\d+)\.(res|shortcut)_layer\.(\d)", module):
            place, part, number = int(found[1]), found[2], int(found[3])
            if place < len(places) and number < len(_IR_UNIT):
                inner = _IR_UNIT[number] if part == "res" else f"downsample.{number}"
                module = f"{places[place]}.{inner}"
        renamed[f"{_IR_REST.get(module, module)}.{own}"] = value
    channels = _shape(renamed, "conv1.weight", 4)[0]
    ones, zeros = torch.ones(channels), torch.zeros(channels)
    shortcut, norm = "layer1.0.downsample.0.weight", "layer1.0.downsample.1."
    if shortcut not in renamed:
        renamed[shortcut] = torch.eye(channels)[:, :, None, None]
        epsilon = torch.nn.BatchNorm2d(1).eps
        renamed |= {f"{norm}weight": ones * math.sqrt(1 + epsilon), f"{norm}bias": zeros}
        renamed |= {f"{norm}running_mean": zeros.clone(), f"{norm}running_var": ones.clone()}
    dimension = _shape(renamed, "fc.weight", 2)[0]
    renamed.setdefault("features.weight", torch.ones(dimension))
    renamed.setdefault("features.bias", torch.zeros(dimension))
    name, options, renamed = _iresnet(renamed)
    return name, {**options, "dropout": 0.4}, renamed


def _roots(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STAGES = "layer1 layer2 layer3 layer4 fc features"
_IRESNET = Family("layer1.0.prelu.weight", _roots(f"conv1 bn1 prelu bn2 {_STAGES}"), _iresnet)
_MOBILE = Family("conv_sep.layers.0.weight", _roots("layers conv_sep features"), _mobilefacenet)
_SFNET = Family("layer1.0.conv1.weight", _roots(_STAGES), _sfnet)
_IR = Family("input_layer.0.weight", _roots("input_layer body output_layer"), _ir)

LAYOUTS: dict[str, tuple[Family, ...]] = {
    "arcface_torch": (_IRESNET, _MOBILE),
    "adaface": (_IR,),
    "cvlface": (_IR, _IRESNET),
    "opensphere": (_IRESNET, _SFNET),
}
"""Projects, and the families of networks that they publish."""


# -- the way back --------------------------------------------------------------------------------

ARCFACE_TORCH = Preprocessing(std=(127.5, 127.5, 127.5))
"""What ``arcface_torch`` does to its images, whatever the weights."""


def as_arcface_torch(network: Backbone) -> Weights:
    """The network's weights as ``arcface_torch`` names, orders and scales them.

    Its code builds the networks of 112×112 images at full width alone and sees RGB as
    (x - 127.5) / 127.5. Another scale or order of colours goes into the first convolution; another
    mean cannot, because that convolution pads with zeros.

    Raises:
        UserError: it has no such network, or the mean is another.
    """
    name, expected = network.config["name"], network.preprocessing
    known = [*iresnet.UNITS, "mobilefacenet"]
    weights = {key: value.detach().cpu().clone() for key, value in network.state_dict().items()}
    shapes = {}
    if name in known:
        with torch.device("meta"), bundle.uninitialised():
            shapes = build(name, embedding_dim=network.embedding_dim).state_dict()
    if [(k, v.shape) for k, v in shapes.items()] != [(k, v.shape) for k, v in weights.items()]:
        raise UserError(
            f"arcface_torch has no such network as this {name}: it has {', '.join(known)} of width "
            "1 with prelu for images of 112 × 112"
        )
    if expected.mean != ARCFACE_TORCH.mean:
        raise UserError(
            "arcface_torch subtracts 127.5 from every pixel, and this network was trained with a "
            f"mean of {', '.join(f'{one:g}' for one in expected.mean)}"
        )
    first = next(iter(weights))  # a convolution without bias
    weights[first] = for_arcface_torch(network, weights[first], -1).contiguous()
    return weights


def for_arcface_torch(network: Backbone, x: Tensor, power: int = 1) -> Tensor:
    """Images (B, 3, h, w) as the network sees them to what ``arcface_torch`` sees.

    With ``power=-1``: filters of such images, so that the filtered images stay the same.
    """
    expected = network.preprocessing
    scale = (x.new_tensor(expected.std) / ARCFACE_TORCH.std[0]).pow(power).view(1, 3, 1, 1)
    scaled = x * scale
    return scaled.flip(1) if expected.colour_order == "BGR" else scaled
