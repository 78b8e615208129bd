"""Networks on disk: round trips, run folders, atomic writes, damaged and foreign files."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sphereface2 import backbones
from sphereface2.backbones import bundle, registry
from sphereface2.errors import UserError


@pytest.fixture
def net() -> backbones.Backbone:
    torch.manual_seed(0)
    net = backbones.build(
        "sfnet10",
        batch_norm=True,
        activation="relu",
        width=0.125,
        input_size=(32, 48),
        embedding_dim=8,
        mean=(1, 2, 3),
        std=(4, 5, 6),
        colour_order="BGR",
    )
    net(torch.randn(4, 3, 32, 48))  # running statistics other than the initial ones
    return net.eval()


@pytest.fixture
def saved(net: backbones.Backbone, tmp_path: Path) -> Path:
    bundle.save(net, tmp_path, extra={"epoch": 3})
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_round_trip(net: backbones.Backbone, saved: Path) -> None:
    x = torch.randn(2, 3, 32, 48)
    random_state = torch.get_rng_state()
    for path in (saved, str(saved), saved / "model.safetensors"):
        loaded = bundle.load(path)
        assert torch.equal(loaded(x), net(x))
        assert not loaded.training
        assert loaded.preprocessing == net.preprocessing
        assert loaded.config == net.config
        assert loaded.metadata == {"epoch": 3}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("name", ["iresnet18", "mobilefacenet", "timm/resnet18"])
def test_round_trip_of_other_backbones(name: str, tmp_path: Path) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    net = backbones.build(name, input_size=32, embedding_dim=8).eval()
    net = net.to(memory_format=torch.channels_last)  # a layout that safetensors cannot store
    bundle.save(net, tmp_path)
    loaded = bundle.load(tmp_path).state_dict()
    assert list(loaded) == list(net.state_dict())
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())


def test_metadata_survives_a_second_save(
    saved: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    bundle.save(bundle.load(saved), other)
    assert bundle.load(other).metadata == {"epoch": 3}


def test_run_folder_prefers_best_then_last(net: backbones.Backbone, tmp_path: Path) -> None:
    for which in ("last", "best"):
        folder = tmp_path / "checkpoints" / which
        folder.mkdir(parents=True)
        bundle.save(net, folder, extra={"which": which})
        assert bundle.load(tmp_path).metadata == {"which": which}


def test_links_to_checkpoints_are_followed(net: backbones.Backbone, tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-7"
    step.mkdir(parents=True)
    bundle.save(net, step, extra={"step": 7})
    (tmp_path / "checkpoints" / "last").symlink_to("step-7")
    assert bundle.load(tmp_path).metadata == {"step": 7}


def test_config_says_what_the_network_is(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["format_version"] == 1
    assert config["backbone"]["name"] == "sfnet10"
    assert config["preprocessing"]["size"] == [32, 48]


def test_failed_save_keeps_the_old_bundle(
    net: backbones.Backbone, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {file.name: file.read_bytes() for file in saved.iterdir()}
    with pytest.raises(TypeError, match="JSON"):
        bundle.save(net, saved, extra={"object": object()})

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        bundle.save(net, saved)
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before


def test_save_refuses_other_modules_and_folders(net: backbones.Backbone, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not Linear"):
        bundle.save(torch.nn.Linear(1, 1), tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        bundle.save(net, tmp_path / "absent")


# --- every error is one sentence that names the file ----------------------------------------


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        bundle.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text


def test_nothing_there(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "does not exist")
    refused(tmp_path, "holds no network")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, -1])
def test_truncated_weights(saved: Path, keep: float) -> None:
    file = saved / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if keep == 0.5 else int(keep)])
    refused(file, "damaged or not a safetensors file")


def test_foreign_weights(saved: Path) -> None:
    file = saved / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refused(file, "damaged or not a safetensors file")


def test_pickles_are_never_opened(saved: Path, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    (saved / "model.safetensors").write_bytes(pickle.dumps(Harm()))
    refused(saved / "model.safetensors", "damaged or not a safetensors file")
    (saved / "model.pt").write_bytes(pickle.dumps(Harm()))
    refused(saved / "model.pt", "is not a network")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("which", ["model.safetensors", "config.json"])
def test_half_a_bundle(saved: Path, which: str) -> None:
    (saved / which).unlink()
    with pytest.raises(UserError, match=r"holds no network|is missing beside"):
        bundle.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"format": "other"}', "\xff"])
def test_damaged_config(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.json is (damaged|not a sphereface2 network)"):
        bundle.load(saved)


def test_wrong_architecture(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())["backbone"]

    def backbone(**changes: object) -> dict:
        return {"name": config["name"], "kwargs": {**config["kwargs"], **changes}}

    edit(saved, backbone={**config, "name": "sfnet20"})
    with pytest.raises(UserError, match=r"does not hold a sfnet20: it lacks \d+ tensors"):
        bundle.load(saved)
    edit(saved, backbone={**config, "name": "sfnet4"})
    with pytest.raises(UserError, match="does not hold a sfnet4: it has unknown"):
        bundle.load(saved)
    edit(saved, backbone=backbone(width=0.25))
    with pytest.raises(UserError, match=r"does not hold a sfnet\d+: .* has shape"):
        bundle.load(saved)
    preprocessing = json.loads((saved / "config.json").read_text())["preprocessing"]
    edit(saved, backbone=config, preprocessing={**preprocessing, "size": [32, 32]})
    with pytest.raises(UserError, match="is inconsistent"):
        bundle.load(saved)
    edit(saved, backbone=config, preprocessing={})
    with pytest.raises(UserError, match="exactly the keys"):
        bundle.load(saved)
    edit(saved, preprocessing=preprocessing)
    # A claimed network of petabytes is refused without allocating it.
    edit(saved, backbone=backbone(width=1e5))
    with pytest.raises(UserError, match="has shape"):
        bundle.load(saved)
    for bad in (
        {"name": "nothing", "kwargs": {}},
        backbone(widht=1),
        backbone(embedding_dim="x"),
        backbone(width=1e300),
    ):
        edit(saved, backbone=bad)
        with pytest.raises(UserError, match="does not describe a known network"):
            bundle.load(saved)
    for bad in (None, {"name": 1, "kwargs": {}}, {"name": "sfnet4"}):
        edit(saved, backbone=bad)
        with pytest.raises(UserError, match="lacks the backbone's name"):
            bundle.load(saved)


def test_metadata_of_another_kind(saved: Path) -> None:
    edit(saved, metadata=[1, 2])
    with pytest.raises(
        UserError, match=r"config\.json is damaged: its metadata is not a JSON object"
    ):
        bundle.load(saved)


def test_newer_format(saved: Path) -> None:
    edit(saved, format_version=2, package_version="9.0")
    with pytest.raises(UserError, match=r"format version 2 .* wrote it \(9.0\)"):
        bundle.load(saved)


def test_config_cannot_start_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timm = pytest.importorskip("timm")
    bundle.save(backbones.build("timm/resnet18", input_size=32, embedding_dim=8), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["backbone"]
    config["kwargs"]["pretrained"] = True
    edit(tmp_path, backbone=config)
    seen = []
    original = timm.create_model
    monkeypatch.setattr(
        timm, "create_model", lambda *a, **k: (seen.append(k), original(*a, **k))[1]
    )
    bundle.load(tmp_path)
    assert [call["pretrained"] for call in seen] == [False]


def test_weights_of_the_right_shape_from_elsewhere(saved: Path, net: backbones.Backbone) -> None:
    """A plain safetensors state dict, as others write it, loads beside a config."""
    safetensors.torch.save_file(
        {key: value + 1 for key, value in net.state_dict().items()}, saved / "model.safetensors"
    )
    loaded = bundle.load(saved).state_dict()
    assert all(torch.equal(loaded[key], value + 1) for key, value in net.state_dict().items())


def test_latest_is_the_newest_finished_run(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="newest finished run in runs/, and there is none"):
        bundle.resolve("latest")
    for name, finished in (("b-older", 1000), ("a-newer", 2000), ("c-unfinished", None)):
        run = tmp_path / "runs" / name
        (run / "checkpoints" / "best").mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            shutil.copy(saved / file, run / "checkpoints" / "best")
        if finished is not None:
            (run / "results.json").write_text("{}")
            os.utime(run / "results.json", (finished, finished))
    assert bundle.resolve("latest") == Path("runs/a-newer/checkpoints/best")
    shutil.copytree(tmp_path / "runs/b-older/checkpoints/best", tmp_path / "latest")
    assert bundle.resolve("latest") == Path("latest")


def test_loading_imports_no_compiler_and_draws_nothing(saved: Path) -> None:
    """torch's compiler and sympy, which its random functions import on the device meta."""
    program = (
        "import sys, torch\n"
        "from sphereface2.backbones import bundle\n"
        "before = torch.random.get_rng_state()\n"
        f"net = bundle.load({str(saved)!r})\n"
        "assert torch.equal(before, torch.random.get_rng_state())\n"
        "assert not any(t.is_meta for t in [*net.parameters(), *net.buffers()])\n"
        "assert all(p.requires_grad for p in net.parameters())\n"
        "print([name for name in ('torch._dynamo', 'sympy', 'timm') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_buffers_that_are_not_stored_are_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Windowed(backbones.Backbone):
        def __init__(self, *, embedding_dim: int, input_size: int) -> None:
            super().__init__(embedding_dim, input_size)
            self.fc = torch.nn.Linear(3, embedding_dim)
            self.register_buffer("window", torch.hann_window(8), persistent=False)

    monkeypatch.setattr(registry, "_BACKBONES", copy.deepcopy(registry._BACKBONES))
    registry._BACKBONES.register("windowed")(Windowed)
    net = backbones.build("windowed", embedding_dim=4, input_size=32)
    bundle.save(net, tmp_path)
    loaded = bundle.load(tmp_path)
    assert torch.equal(loaded.window, torch.hann_window(8))
    assert torch.equal(loaded.fc.weight, net.fc.weight)
