"""FaceEmbedder: where models come from, what it embeds, what it writes."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import cv2
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from sphereface2 import backbones
from sphereface2.align import Face, NoFaceError
from sphereface2.backbones import bundle
from sphereface2.backbones.hub import hub_id
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.calibration import Calibration
from sphereface2.recognition import face_embedder as module
from sphereface2.recognition.face_embedder import FaceEmbedder


def network(seed: int = 0, **options: object) -> backbones.Backbone:
    torch.manual_seed(seed)
    given = {"width": 0.125, "input_size": 32, "embedding_dim": 16, "batch_norm": True} | options
    return backbones.build("sfnet4", **given).eval()  # type: ignore[arg-type]


def crops(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [cv2.resize(rng.integers(0, 256, (6, 6, 3), np.uint8), (112, 112)) for _ in range(count)]


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[:, :, ::-1])[1].tobytes()


class HalfAligner:
    """Takes the left half of a photograph for its face; a black one shows none."""

    name = "half"

    def align(self, image: object) -> tuple[np.ndarray, Face]:
        pixels = module.read_image(image)  # type: ignore[arg-type]
        if not pixels.any():
            raise NoFaceError("no face found in the picture")
        face = Face(np.zeros(4, np.float32), 1.0, np.zeros((5, 2), np.float32))
        return np.ascontiguousarray(pixels[:, : pixels.shape[1] // 2]), face


def by_hand(net: backbones.Backbone, images: list[np.ndarray], flip: bool) -> np.ndarray:
    """One image at a time, in float64 after the network."""
    rows = []
    for image in images:
        inputs = net.preprocessing(torch.from_numpy(image).permute(2, 0, 1)[None])
        with torch.no_grad():
            row = net(inputs)[0].double()
            if flip:
                row = row + net(inputs.flip(3))[0].double()
        rows.append((row / row.norm()).numpy())
    return np.stack(rows)


@pytest.mark.parametrize("flip", [True, False])
def test_every_kind_of_picture_gives_the_embedding_of_its_pixels(
    tmp_path: Path, flip: bool
) -> None:
    images = crops(7)
    path = tmp_path / "a.png"
    path.write_bytes(png(images[0]))
    given = [
        path,
        str(path),
        png(images[2]),
        Image.fromarray(images[3]),
        images[4],
        torch.from_numpy(images[5]).permute(2, 0, 1),
        images[6][:, :, 0],  # grey
    ]
    grey = np.repeat(images[6][:, :, :1], 3, axis=2)
    shown = [images[0], images[0], *images[2:6], grey]
    net = network()
    embedder = FaceEmbedder(Embedder(net, flip=flip, batch_size=3))
    found = embedder.embed(iter(given), aligned=True)
    assert found.dtype == np.float32 and found.shape == (7, 16)
    np.testing.assert_allclose(found, by_hand(net, shown, flip), atol=2e-6)


def test_photographs_are_cropped_and_their_order_kept() -> None:
    photos = [np.concatenate([image, 255 - image], axis=1) for image in crops(9)]
    embedder = FaceEmbedder(network(), aligner=HalfAligner())  # type: ignore[arg-type]
    expected = embedder.embed(crops(9), aligned=True)
    np.testing.assert_array_equal(embedder.embed(photos), expected)
    two = FaceEmbedder(Embedder(network(), batch_size=2), aligner=embedder.aligner)
    np.testing.assert_allclose(two.embed(photos), expected, atol=2e-6)


def test_a_picture_that_fails_is_named(tmp_path: Path) -> None:
    embedder = FaceEmbedder(network(), aligner=HalfAligner())  # type: ignore[arg-type]
    good = crops(1)[0]
    with pytest.raises(NoFaceError, match="image 1: no face"):
        embedder.embed([good, np.zeros((8, 8, 3), np.uint8), b"no image"])
    with pytest.raises(UserError, match=r"^image 2: .*as an image"):
        embedder.embed([good, good, b"no image"], aligned=True)
    with pytest.raises(UserError, match=r"gone\.jpg cannot be read"):
        embedder.embed([good, tmp_path / "gone.jpg"], aligned=True)


def test_none_and_one_image(tmp_path: Path) -> None:
    embedder = FaceEmbedder(network())
    assert embedder.embed([], aligned=True).shape == (0, 16)
    single = crops(1)[0]
    (tmp_path / "a.png").write_bytes(png(single))
    (expected,) = embedder.embed([single], aligned=True)
    tensor = torch.from_numpy(single).permute(2, 0, 1)
    files = (tmp_path / "a.png", str(tmp_path / "a.png"), png(single))
    for image in (*files, Image.fromarray(single), single, tensor):
        found = embedder.embed(image, aligned=True)  # type: ignore[arg-type]
        np.testing.assert_array_equal(found, expected)
    stacked = embedder.embed(np.stack([single] * 2), aligned=True)
    assert stacked.shape == (2, 16)
    np.testing.assert_array_equal(embedder.embed(torch.stack([tensor] * 2), aligned=True), stacked)
    # Alpha, channels first, grey images stacked: one of them would pass for another.
    for array in (np.dstack([single, single[..., :1]]), np.asarray(tensor), single[..., :2]):
        with pytest.raises(UserError, match=r"an image as an array must be uint8 \(H, W, 3\)"):
            embedder.embed(array, aligned=True)
    with pytest.raises(UserError, match="None was given"):
        embedder.embed(None, aligned=True)  # type: ignore[arg-type]


def test_images_that_fail_are_skipped_where_that_is_wished(tmp_path: Path) -> None:
    embedder = FaceEmbedder(network(), aligner=HalfAligner())  # type: ignore[arg-type]
    good, bad = crops(2), tmp_path / "gone.jpg"
    images = [good[0], np.zeros((8, 8, 3), np.uint8), bad, good[1], b"no image"]
    skipped: dict[int, str] = {}
    found = embedder.embed(images, skipped=skipped)
    np.testing.assert_array_equal(found, embedder.embed(good))
    assert sorted(skipped) == [1, 2, 4]
    assert skipped[1].startswith("image 1: no face") and str(bad) in skipped[2]
    with pytest.raises(UserError, match=r"gone\.jpg"):
        embedder.embed(bad, skipped={})  # one image has no rest to go on with


def test_verify_decides_by_far_or_threshold() -> None:
    a, b = crops(2)
    plain = FaceEmbedder(network())
    rows = plain.embed([a, b], aligned=True).astype(np.float64)
    result = plain.verify(a, b, aligned=True)
    assert result.similarity == pytest.approx(rows[0] @ rows[1], abs=1e-12)
    assert (result.same, result.threshold, result.llr, result.verdict) == (
        (None, None, None, "no decision")
    )
    for threshold, same in ((result.similarity, True), (result.similarity + 1e-6, False)):
        decided = plain.verify(a, b, threshold=threshold, aligned=True)
        assert (decided.same, decided.threshold, decided.far) == (same, threshold, None)
    with pytest.raises(UserError, match="needs a calibration"):
        plain.verify(a, b, far=0.1, aligned=True)
    with pytest.raises(UserError, match=r"cosine in \[-1, 1\], not 50"):
        plain.verify(a, b, threshold=50, aligned=True)

    rng, genuine = np.random.default_rng(0), np.arange(2000) % 2 == 0
    calibration = Calibration.fit(
        rng.normal(0.4 * genuine, 0.1), genuine, fingerprint=plain.fingerprint, fars=(0.1, 0.02),
        bootstrap=Bootstrap(20),
    )  # fmt: skip
    embedder = FaceEmbedder(network(), calibration)
    result = embedder.verify(a, b, aligned=True)
    assert (result.far, result.threshold) == (0.1, calibration.threshold())
    assert result.same == (result.similarity >= calibration.threshold())
    assert result.probability == calibration.probability(result.similarity, 0.5)
    strict = embedder.verify(a, b, far=0.02, prior=0.01, aligned=True)
    assert strict.threshold == calibration.threshold(0.02)
    assert strict.probability < result.probability
    with pytest.raises(UserError, match="not both"):
        embedder.verify(a, b, far=0.1, threshold=0.5, aligned=True)
    assert "threshold 0." in repr(embedder) and "sfnet4, 16 dimensions" in repr(embedder)


# -- the fingerprint -----------------------------------------------------------------------------


def test_the_fingerprint_is_that_of_weights_and_preprocessing(tmp_path: Path) -> None:
    embedder = FaceEmbedder(network())
    embedder.save_pretrained(tmp_path / "a")
    again = FaceEmbedder.from_pretrained(tmp_path / "a", device="cpu")
    again.network.metadata = {"anything": 1}
    again.save_pretrained(tmp_path / "b")
    assert FaceEmbedder.from_pretrained(tmp_path / "b", device="cpu").fingerprint == (
        embedder.fingerprint
    )
    others = [network(1), network(colour_order="BGR"), network(mean=(0.0, 0.0, 0.0))]
    assert len({embedder.fingerprint, *(FaceEmbedder(net).fingerprint for net in others)}) == 4


# -- loading -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    embedder = FaceEmbedder(network())
    rng = np.random.default_rng(0)
    same = np.arange(2000) % 2 == 0
    embedder.calibration = Calibration.fit(
        rng.normal(0.4 * same, 0.1), same, fingerprint=embedder.fingerprint, bootstrap=Bootstrap(20)
    )
    embedder.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_saved_model_comes_back_whole(saved: Path) -> None:
    for path in (saved, str(saved), saved / "model.safetensors"):
        found = FaceEmbedder.from_pretrained(path, device="cpu")
        assert found.calibration is not None and found.calibration.far_default == 0.01
        np.testing.assert_array_equal(
            found.embed(crops(2), aligned=True),
            FaceEmbedder(network()).embed(crops(2), aligned=True),
        )


def test_a_calibration_of_another_network_is_refused(saved: Path, tmp_path: Path) -> None:
    FaceEmbedder(network(1)).save_pretrained(tmp_path / "other")
    shutil.copy(saved / "calibration.json", tmp_path / "other")
    with pytest.raises(UserError, match="another network"):
        FaceEmbedder.from_pretrained(tmp_path / "other", device="cpu")
    # Saving another network over a model takes the old calibration away.
    FaceEmbedder(network(1)).save_pretrained(saved)
    assert FaceEmbedder.from_pretrained(saved, device="cpu").calibration is None


def test_the_hub_gives_a_model_and_is_asked_for_nothing_else(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through huggingface_hub's own cache layout: refs, and a snapshot of links to blobs."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "cache" / "models--owner--faces"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "blobs").mkdir()
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(saved.iterdir())):
        shutil.copy(file, repo / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    monkeypatch.chdir(tmp_path)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True, "device": "cpu"}
    for name in ("owner/faces", "hf://owner/faces"):
        found = FaceEmbedder.from_pretrained(name, **options)
        assert found.fingerprint == FaceEmbedder(network()).fingerprint
        assert found.calibration is not None
    with pytest.raises(UserError, match="neither a folder owner/other here"):
        FaceEmbedder.from_pretrained("owner/other", **options)

    asked: dict[str, object] = {}

    def fake(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    FaceEmbedder.from_pretrained("owner/faces", revision="v1", device="cpu")
    assert asked["repo_id"] == "owner/faces" and asked["revision"] == "v1"
    assert sorted(asked["allow_patterns"]) == [  # type: ignore[call-overload]
        "README.md",
        "calibration.json",
        "config.json",
        "model.safetensors",
    ]


def test_a_local_path_is_never_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/real").mkdir(parents=True)

    def fail(*_: object, **__: object) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    for missing in ("runs/nmae", "./owner/name", "owner", "/owner/name", "a/b/c", "~/x"):
        with pytest.raises(UserError, match="does not exist"):
            FaceEmbedder.from_pretrained(missing)
    with pytest.raises(UserError, match="does not exist"):
        FaceEmbedder.from_pretrained(Path("owner/name"))
    with pytest.raises(UserError, match="does not exist"):
        FaceEmbedder.from_pretrained("owner/model.safetensors")
    with pytest.raises(UserError, match="holds no network"):
        FaceEmbedder.from_pretrained("runs/real")


@given(st.text(alphabet="ab./~-_ \\:\0é", max_size=12))
@settings(max_examples=300, deadline=None)
@example("aé/a")
def test_only_owner_slash_name_is_a_hub_id(text: str) -> None:
    found = hub_id(text)
    if found is not None:
        owner, _, name = found.partition("/")
        assert owner and name and "/" not in name
        assert owner[0].isalnum() and name[0].isalnum()
        assert not any(character in found for character in "~ \\:\0é")


class _Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path(self.path),))  # type: ignore[attr-defined, return-value]


@pytest.mark.parametrize("name", ["model.pt", "pytorch_model.bin", "model.safetensors"])
def test_a_pickle_is_never_opened(saved: Path, tmp_path: Path, name: str) -> None:
    bomb = _Bomb()
    bomb.path = str(tmp_path / "exploded")  # type: ignore[attr-defined]
    (saved / "model.safetensors").unlink()
    (saved / name).write_bytes(pickle.dumps(bomb))
    for path in (saved, saved / name):
        with pytest.raises(UserError) as caught:
            FaceEmbedder.from_pretrained(path, device="cpu")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


def test_damaged_and_foreign_weights(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        FaceEmbedder.from_pretrained(saved, device="cpu")
    torch.manual_seed(0)
    other = tmp_path / "other"
    other.mkdir()
    bundle.save(backbones.build("sfnet10", width=0.125, input_size=32, embedding_dim=16), other)
    weights.write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="does not hold a sfnet4"):
        FaceEmbedder.from_pretrained(saved, device="cpu")


# -- saving --------------------------------------------------------------------------------------


def run_folder(tmp_path: Path, *, drawn: bool, older: bool = False) -> Path:
    """What `fit` leaves behind, as far as a card tells of it."""
    run = tmp_path / "runs" / "small-1"
    step = run / "checkpoints" / "step-1"
    step.mkdir(parents=True)
    bundle.save(network(), step, extra={"step": 1})
    (run / "checkpoints" / "best").symlink_to("step-1")
    data = {"kind": "given", "train": "/home/me/secret", "fingerprint": "f00d", "images": 1200}
    data |= {"people": 30} if older else {"people": 30, "synthetic": drawn}
    (run / "environment.json").write_text(json.dumps({"data": data}))
    (run / "config.yaml").write_text(
        "data: {train: /home/me/secret}\nbackbone: {name: sfnet4}\nhead: {name: sphereface2}\n"
        "sample_to_sample: {weight: 0.25}\nteacher: {path: /home/me/secret/large, weight: 2}\n"
        "training: {epochs: 2, start_from: /home/me/secret/small-0}\n"
    )
    (run / "results.json").write_text(
        f'{{"data": {{"note": "/home/me/secret", "synthetic": {json.dumps(drawn)}}}, '
        '"training": {"steps": 7}, "sets": [{"name": "lfw", '
        '"pairs": 6000, "folds": 10, "accuracy": 0.875, "accuracy_std": 0.01, "eer": 0.125, '
        '"auc": 0.9, "tar": {"1e-2": 0.5, "1e-3": null}, "plots": ["/home/me/secret"]}]}'
    )
    return run


@pytest.mark.parametrize(("drawn", "older"), [(False, False), (True, False), (True, True)])
def test_the_card_of_a_run(tmp_path: Path, drawn: bool, older: bool) -> None:
    run = run_folder(tmp_path, drawn=drawn, older=older)
    embedder = FaceEmbedder.from_pretrained(run, device="cpu")
    embedder.save_pretrained(tmp_path / "a")
    # Once more from the saved folder: the run is gone by then, what it told is not.
    shutil.rmtree(tmp_path / "runs")
    FaceEmbedder.from_pretrained(tmp_path / "a", device="cpu").save_pretrained(tmp_path / "b")
    text = (tmp_path / "b" / "README.md").read_text()
    assert text == (tmp_path / "a" / "README.md").read_text()
    everything = text + (tmp_path / "b" / "config.json").read_text()
    assert "secret" not in everything
    for fact in ("f00d", "1,200 images of 30 people", "87.50 ± 1.00 %", "50.0 % @1e-2", "7 steps"):
        assert fact in text
    for made_by in ("weight: 0.25", "path: large", "start_from: small-0"):
        assert made_by in text
    for heading in ("Intended use", "Limits", "Licence", "Training", "Figures", "Threshold"):
        assert f"## {heading}" in text
    assert ("synthetic, drawn faces" in text) == drawn
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["library_name"] == "sphereface2" and front["license"] == "other"
    results = ModelCard(text).data.eval_results  # the hub's own reading of it
    assert [(r.dataset_name, r.metric_value) for r in results] == [("lfw", 0.875)]


def test_a_card_written_by_hand_is_kept_and_a_generated_one_renewed(saved: Path) -> None:
    embedder = FaceEmbedder.from_pretrained(saved, device="cpu")
    assert "| 1e-2 |" in (saved / "README.md").read_text()
    embedder.calibration = None
    embedder.save_pretrained(saved, model_card_kwargs={"license": "cc-by-nc-4.0"})
    text = (saved / "README.md").read_text()
    assert "None is calibrated" in text and "license: cc-by-nc-4.0" in text
    (saved / "README.md").write_text("by hand")
    embedder.save_pretrained(saved)
    assert (saved / "README.md").read_text() == "by hand"


def test_saving_spares_what_is_no_model_and_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="holds no model"):
        FaceEmbedder(network()).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(module, "atomic_write", full)  # the card, which is written last
    with pytest.raises(OSError, match="no space"):
        FaceEmbedder(network()).save_pretrained(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_pushing_uploads_the_folder_that_saving_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, object] = {}

    class Api:
        def __init__(self, **_: object) -> None: ...

        def create_repo(self, repo_id: str, **_: object) -> object:
            return type("Url", (), {"repo_id": repo_id})()

        def upload_folder(self, *, folder_path: Path, repo_id: str, **_: object) -> str:
            uploaded["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            return f"commit of {repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert FaceEmbedder(network()).push_to_hub("me/faces") == "commit of me/faces"
    assert uploaded["files"] == ["README.md", "config.json", "model.safetensors"]
