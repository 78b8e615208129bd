"""A trained network on disk: ``model.safetensors`` and ``config.json``, and no code.

``config.json`` holds the format version, the backbone's name and options, its preprocessing and
free-form metadata; the weights are a plain safetensors file. Nothing in either is executed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sphereface2.backbones.preprocessing import Preprocessing
from sphereface2.errors import UserError
from sphereface2.files import atomic_write, digest, pointed
from sphereface2.version import __version__

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.overrides import TorchFunctionMode

    from sphereface2.backbones.base import Backbone

FORMAT = "sphereface2-network"
FORMAT_VERSION = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
ONNX = "model.onnx"


def save(net: nn.Module, directory: str | Path, *, extra: dict[str, Any] | None = None) -> None:
    """Write `net` (from `backbones.build`) into an existing directory.

    Each file is written under a temporary name, flushed to disk, then renamed, so that a reader
    never meets half a file.

    Args:
        net: the bare network, outside DistributedDataParallel or torch.compile wrappers.
        directory: existing folder.
        extra: JSON-able metadata; `load` gives it back as ``net.metadata``.
    """
    import safetensors.torch

    from sphereface2.backbones.base import Backbone

    if not isinstance(net, Backbone) or not hasattr(net, "config"):
        raise TypeError(
            f"only a network made by backbones.build can be saved, not {type(net).__name__}"
        )
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"cannot save the network: {directory} is not a folder")
    description = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "backbone": net.config,
        "preprocessing": net.preprocessing.to_dict(),
        "metadata": net.metadata if extra is None else extra,
    }
    # Before any file is touched, so that metadata that is not JSON leaves the old bundle whole.
    text = json.dumps(description, indent=2, allow_nan=False) + "\n"
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()
    }
    atomic_write(directory / WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    atomic_write(directory / CONFIG, text.encode())


def load(path: str | Path, device: str | torch.device = "cpu") -> Backbone:
    """Read a network back, in evaluation mode, with `.preprocessing` and `.metadata`.

    Args:
        path: a bundle folder, its ``model.safetensors``, or a run folder (then its best
            checkpoint, else its last).
        device: where the weights go.

    Raises:
        UserError: nothing there, a foreign or damaged file, weights that do not fit.
    """
    import safetensors.torch
    import torch
    from safetensors import SafetensorError

    from sphereface2.backbones.registry import available, build

    # Symbolic links are followed once: both files come from the same checkpoint even if training
    # moves the link on between the two reads.
    folder = resolve(path).resolve()
    config_file, weights_file = folder / CONFIG, folder / WEIGHTS
    description = _read_config(config_file)
    try:
        weights = safetensors.torch.load_file(weights_file)
    except FileNotFoundError as error:
        raise UserError(f"{weights_file} is missing beside {CONFIG}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{weights_file} is damaged or not a safetensors file: {error}") from error
    name = description["backbone"]["name"]
    # A file that asks for timm's weights would make `build` go to the network.
    kwargs = {k: v for k, v in description["backbone"]["kwargs"].items() if k != "pretrained"}
    try:
        net = None
        if name in available():
            # Shapes first, without memory: a config may claim a network of any size.
            with torch.device("meta"), uninitialised():
                net = build(name, **kwargs)
            check_weights(weights, net.state_dict(), weights_file, name)
            stored = net.state_dict().keys()
            if any(key not in stored for key, _ in net.named_buffers()):
                net = None  # it computes some of its buffers when it is built
        if net is None:
            # Building draws initial weights; a caller in the midst of training keeps its generator.
            with torch.random.fork_rng(devices=[]):
                net = build(name, **kwargs)
            check_weights(weights, net.state_dict(), weights_file, name)
        net.preprocessing = Preprocessing.from_dict(description["preprocessing"])
    except _MismatchError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{config_file} does not describe a known network: {error}") from error
    if net.preprocessing.size != net.input_size:
        raise UserError(
            f"{config_file} is inconsistent: its preprocessing makes {net.preprocessing.size} "
            f"images and its network takes {net.input_size}"
        )
    wanted = net.state_dict()
    net.load_state_dict({k: v.to(wanted[k].dtype) for k, v in weights.items()}, assign=True)
    net.metadata = description["metadata"]
    return net.to(device).eval()


def fingerprint(net: Backbone) -> str:
    """sha256 (hex) of a network's weights, configuration and preprocessing.

    Two networks with one fingerprint give one image one embedding. It survives saving, loading and
    moving to another device, and does not depend on metadata.
    """
    import torch

    options = {k: v for k, v in net.config["kwargs"].items() if k != "pretrained"}
    described = [net.config["name"], options, net.preprocessing.to_dict()]
    parts: list[str | np.ndarray] = [json.dumps(described, sort_keys=True)]
    for name, tensor in sorted(net.state_dict().items()):
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        parts.append(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest(*parts)


def run_of(path: str | Path) -> Path:
    """``path`` or, where it is ``latest`` and nothing has that name, the newest run in ``runs/``.

    A run is finished when it has its ``results.json``, and the newest is the one finished last.

    Raises:
        UserError: no run is finished.
    """
    path = Path(path)
    if path != Path("latest") or path.exists():
        return path
    finished = [(file.stat().st_mtime, file.parent) for file in Path("runs").glob("*/results.json")]
    if not finished:
        raise UserError("'latest' is the newest finished run in runs/, and there is none")
    return max(finished)[1]


def resolve(path: str | Path) -> Path:
    """The bundle folder that `path` (bundle, weights file or run folder) stands for.

    An ``.onnx`` file stands for itself and for the folder in which it is ``model.onnx`` and there
    are no other weights; ``latest`` stands for the newest finished run, see `run_of`.
    """
    path = run_of(path)
    if path.suffix == ".onnx":
        return path
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(
                f"{path} is not a network: give a run folder, a model folder or its {WEIGHTS}"
            )
        if path.name != WEIGHTS:
            raise UserError(f"{path} must be named {WEIGHTS} and lie beside its {CONFIG}")
        return path.parent
    if not path.exists():
        raise UserError(
            f"{path} does not exist: give a run folder, a model folder or its {WEIGHTS}"
        )
    checkpoints = path / "checkpoints"
    linked = (pointed(checkpoints / name) for name in ("best", "last"))
    newest = sorted(checkpoints.glob("step-*"), reverse=True)  # where the links were lost
    candidates = [path, *(folder for folder in linked if folder is not None), *newest]
    for folder in candidates:
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    for folder in candidates:
        if (folder / WEIGHTS).is_file():
            return folder
    if (path / ONNX).is_file():
        return path / ONNX
    raise UserError(
        f"{path} holds no network: expected {WEIGHTS} and {CONFIG} in it, "
        "in checkpoints/best or in checkpoints/last"
    )


def _read_config(file: Path) -> dict[str, Any]:
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing beside {WEIGHTS}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged or not a JSON file: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise UserError(f'{file} is not a sphereface2 network: its "format" is not "{FORMAT}"')
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version!r} and this package reads {FORMAT_VERSION}: "
            "use the package version that wrote it "
            f"({description.get('package_version', 'unknown')})"
        )
    backbone = description.get("backbone")
    if (
        not isinstance(backbone, dict)
        or not isinstance(backbone.get("name"), str)
        or not isinstance(backbone.get("kwargs"), dict)
        or "preprocessing" not in description
    ):
        raise UserError(f"{file} lacks the backbone's name, its kwargs or its preprocessing")
    if not isinstance(description.setdefault("metadata", {}), dict):
        raise UserError(f"{file} is damaged: its metadata is not a JSON object")
    return description


def uninitialised() -> TorchFunctionMode:
    """A context in which modules draw no initial weights, which on the device meta costs seconds.

    There torch's random functions are written in Python and load torch's compiler.
    """
    from torch.overrides import TorchFunctionMode

    class Uninitialised(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.__name__ in ("normal_", "uniform_", "trunc_normal_"):
                return args[0] if args else kwargs["tensor"]
            return func(*args, **(kwargs or {}))

    return Uninitialised()


class _MismatchError(UserError):
    """The weights are another network's."""


def check_weights(
    weights: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], file: Path, name: str
) -> None:
    """UserError unless ``weights``, read from ``file``, are those of the network ``name``."""

    def some(keys: set[str]) -> str:
        return f"{len(keys)} tensors, for example {min(keys)!r}"

    if missing := wanted.keys() - weights.keys():
        raise _MismatchError(f"{file} does not hold a {name}: it lacks {some(missing)}")
    if surplus := weights.keys() - wanted.keys():
        raise _MismatchError(f"{file} does not hold a {name}: it has unknown {some(surplus)}")
    for key, tensor in wanted.items():
        if weights[key].shape != tensor.shape:
            raise _MismatchError(
                f"{file} does not hold a {name}: {key!r} has shape "
                f"{tuple(weights[key].shape)}, the network needs {tuple(tensor.shape)}"
            )
