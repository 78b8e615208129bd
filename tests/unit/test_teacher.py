"""Distillation: the loss, what it does to a step, and tables that do not fit their set."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_training_step import PEOPLE, batches, training_step

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data import embedding_table
from sphereface2.errors import UserError
from sphereface2.training import config
from sphereface2.training import teacher as teachers
from sphereface2.training.config import TeacherConfig
from sphereface2.training.distributed import World
from sphereface2.training.step import TrainingStep
from sphereface2.training.teacher import Teacher, open_teacher


class Faces:
    """A set of four images, in memory."""

    def __init__(self, fingerprint: str = "this set") -> None:
        self.labels, self.num_classes = np.array([0, 0, 1, 1]), 2
        self.class_names = None
        self._fingerprint = fingerprint

    def __len__(self) -> int:
        return 4

    def read(self, index: int) -> bytes:
        raise AssertionError("nothing is read")

    def name(self, index: int) -> str:
        return f"{'abcd'[index]}.jpg"

    def fingerprint(self) -> str:
        return self._fingerprint


EMBEDDINGS = np.array([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0], [5.0, 12.0]], np.float32)


def table(path: Path, names: str = "dcba", **metadata: str) -> Path:
    """A table of the images ``names``, in this order."""
    rows = EMBEDDINGS[["abcd".index(name) for name in names]]
    files = [f"{name}.jpg" for name in names]
    if path.suffix == ".npz":
        embedding_table.write_npz(path, files, rows, metadata)
    else:
        columns = {"name": files, "embedding": list(rows)}
        content = pa.table(columns).replace_schema_metadata({"sphereface2": json.dumps(metadata)})
        pq.write_table(content, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".parquet"])
def test_rows_are_found_by_name_whatever_the_order(tmp_path: Path, suffix: str) -> None:
    read = embedding_table.read(table(tmp_path / f"t{suffix}", input="this set"))
    rows, missing = read.rows(Faces(), np.array([3, 0, 2]), 0.0)
    expected = [[5 / 13, 12 / 13], [0.6, 0.8], [-1, 0]]
    np.testing.assert_allclose(rows, expected, rtol=1e-6)
    assert rows.dtype == np.float32 and not missing


def test_a_table_of_another_set_is_refused(tmp_path: Path) -> None:
    read = embedding_table.read(table(tmp_path / "t.npz", input="this set"))
    with pytest.raises(UserError, match=r"t\.npz holds the embeddings of another set"):
        read.rows(Faces("that set"), np.arange(4), 0.0)


def test_images_that_a_table_lacks_are_named(tmp_path: Path) -> None:
    read = embedding_table.read(table(tmp_path / "t.npz", "db"))
    with pytest.raises(UserError, match=r"no embedding of 2 of the 4 .*a\.jpg, c\.jpg"):
        read.rows(Faces(), np.arange(4), 0.25)
    rows, missing = read.rows(Faces(), np.arange(4), 0.5)
    assert missing == ["a.jpg", "c.jpg"]
    assert (rows[[0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"name": np.array(["a.jpg"] * 2), "embedding": EMBEDDINGS[:2]}, "names an image twice"),
        ({"name": np.array(["a.jpg"]), "embedding": EMBEDDINGS}, r"float32 \(4, 2\) and \(1,\)"),
        ({"name": np.array("a.jpg"), "embedding": EMBEDDINGS[:1]}, r"float32 \(1, 2\) and \(\)"),
        (
            {"name": np.array(["a"]), "embedding": EMBEDDINGS[:1], "sphereface2": np.array("[3]")},
            "metadata is no JSON object",
        ),
        ({"name": np.array(["a.jpg"])}, "no table of embeddings, with 'name' and 'embedding'"),
        ({"name": np.array(["a.jpg"]), "embedding": EMBEDDINGS[:1] * np.inf}, "not finite"),
        (
            {"name": np.array(["a"]), "embedding": EMBEDDINGS[:1] * 0},
            r"1 embeddings .* 0.* \(a first",
        ),
    ],
)
def test_damaged_tables_are_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "t.npz", **content)
    with pytest.raises(UserError, match=message):
        embedding_table.read(tmp_path / "t.npz").rows(Faces(), np.arange(4), 1.0)
    (tmp_path / "t.npz").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="damaged"):
        embedding_table.read(tmp_path / "t.npz")


@pytest.mark.parametrize(
    ("name", "embedding", "message"),
    [
        ("abc", [[1.0, 2.0], [3.0, 4.0, 5.0, 6.0], [7.0, 8.0, 9.0]], "not of one length"),
        ("ab", [[1.0, 2.0], None], "empty entries"),
        (["a", None], [[1.0, 2.0], [3.0, 4.0]], "empty entries"),
        ("ab", ["x", "y"], "damaged or no table"),
    ],
)
def test_parquet_that_is_no_table_is_refused(
    tmp_path: Path, name: Any, embedding: list[Any], message: str
) -> None:
    pq.write_table(pa.table({"name": list(name), "embedding": embedding}), tmp_path / "t.parquet")
    with pytest.raises(UserError, match=message):
        embedding_table.read(tmp_path / "t.parquet")


# -- the loss ------------------------------------------------------------------------------------


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("width", [3, 5])
def test_the_loss_is_one_minus_the_cosine(width: int) -> None:
    generator = np.random.default_rng(0)
    targets = unit(generator.normal(size=(4, width))).astype(np.float32)
    targets[1] = 0  # an image that the table lacks
    teacher = Teacher(targets, np.arange(4), 3, TeacherConfig())
    x = generator.normal(size=(3, 3)).astype(np.float32)
    mapped = x
    if width != 3:
        assert isinstance(teacher.map, torch.nn.Linear)
        mapped = x @ teacher.map.weight.detach().numpy().T + teacher.map.bias.detach().numpy()
    wanted = targets[[2, 1, 0]]
    losses = 1 - (unit(mapped) * wanted).sum(1)
    losses[1] = 0
    found = teacher(torch.from_numpy(x), teacher.of(torch.tensor([2, 1, 0])))
    assert found.item() == pytest.approx(losses.mean(), rel=1e-5)


def with_teacher(width: int, **settings: Any) -> TrainingStep:
    plain = training_step(**settings)
    targets = unit(np.random.default_rng(1).normal(size=(PEOPLE, width))).astype(np.float32)
    labels = np.arange(PEOPLE) // 2  # two images each of the first half of the people
    teacher = Teacher(targets, labels, plain.network.embedding_dim, plain.config.teacher)
    step = TrainingStep(plain.config, plain.world, PEOPLE, teacher)
    step.forward.train()
    return step


@pytest.mark.parametrize("prototypes", ["start", "fixed"])
def test_statistics_are_of_all_ranks_beside_prototypes_that_stay(
    monkeypatch: pytest.MonkeyPatch, prototypes: str
) -> None:
    monkeypatch.setattr(TrainingStep, "_replicate", lambda _, module: module)
    settings = {"head__name": "adaface", "teacher__prototypes": prototypes}
    alone = with_teacher(512, **settings)
    assert not alone.head.sync_statistics
    world = dataclasses.replace(alone.world, size=2)
    assert TrainingStep(alone.config, world, PEOPLE, alone.teacher).head.sync_statistics


@pytest.mark.parametrize("labels", [0.0, 0.5])
def test_a_step_weighs_both_losses(labels: float) -> None:
    step = with_teacher(512, teacher__weight=3.0, teacher__labels=labels)
    (batch,) = batches()
    network = step.network
    pixels = network.preprocessing(batch.images)
    state = {key: value.clone() for key, value in network.state_dict().items()}
    embeddings = network(pixels)
    assert step.teacher is not None
    expected = 3 * step.teacher(embeddings, step.teacher.of(batch.positions))
    if labels:
        expected = expected + labels * step.head(embeddings, batch.labels)
    network.load_state_dict(state)
    loss, _ = step([batch])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_prototypes_at_the_teachers_class_means() -> None:
    for kind in ("start", "fixed"):
        step = with_teacher(512, teacher__prototypes=kind)
        assert step.teacher is not None
        targets = step.teacher.of(torch.arange(PEOPLE))
        mean = torch.nn.functional.normalize((targets[2] + targets[3])[None])
        torch.testing.assert_close(step.head.weight[1:2].detach(), mean)
        for _ in range(2):
            step(batches())
        moved = not torch.allclose(step.head.weight[1:2].detach(), mean, atol=1e-7)
        assert moved == (kind == "start")
    with pytest.raises(UserError, match=r"have 7 dimensions and the prototypes 512"):
        with_teacher(7, teacher__prototypes="start")


# -- settings and the table of a model -----------------------------------------------------------


FUSED = {"fused_head": True, "clip_norm": None}


@pytest.mark.parametrize(
    ("teacher", "training", "message"),
    [
        ({"prototypes": "fixed"}, FUSED, "must not be fixed with training.fused_head"),
        ({"labels": 0.5}, FUSED, r"labels must be 0 or 1 .*got 0\.5"),
        ({"prototypes": "start"}, {"start_from": "runs/x"}, "both say where the head starts"),
    ],
)
def test_settings_of_which_one_would_be_passed_over_are_refused(
    teacher: dict[str, Any], training: dict[str, Any], message: str
) -> None:
    tree = {"teacher": teacher, "training": training, "head": {"streaming": True}}
    with pytest.raises(UserError, match=message):
        config.from_dict(tree)


def test_settings_without_a_teacher_are_refused() -> None:
    settings = config.from_dict({"teacher": {"weight": 80.0}})
    place = World(0, 1, 0, 1, torch.device("cpu"))
    with pytest.raises(UserError, match=r"need teacher\.path"):
        open_teacher(settings, Path(), place, Faces(), np.arange(4), np.arange(4))


class Drawn(Faces):
    """Three PNG files and a damaged one."""

    def read(self, index: int) -> bytes:
        drawn = np.random.default_rng(index).integers(256, size=(32, 32, 3)).astype(np.uint8)
        return cv2.imencode(".png", drawn)[1].tobytes() if index != 2 else b"no image"


def test_a_model_embeds_the_images_once_though_one_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    bundle.save(backbones.build("sfnet4", width=0.125, input_size=32), tmp_path / "model")
    settings = config.from_dict(
        {"teacher": {"path": str(tmp_path / "model")}, "data": {"max_unreadable": 0.3}}
    )
    place = World(0, 1, 0, 1, torch.device("cpu"))

    def opened(count: int) -> str:
        chosen = np.arange(count)
        found = open_teacher(settings, tmp_path / "run", place, Drawn(), chosen, chosen)
        assert found is not None and found.of(chosen)[2].norm() == 0
        return found.fingerprint

    first = opened(4)
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "embed_together", None)  # nothing is embedded again
        assert opened(4) == first
        with pytest.raises(TypeError):
            opened(3)  # of fewer images, though all of them have rows
