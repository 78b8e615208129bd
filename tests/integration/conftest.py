"""Fixtures of the tests of galleries, and of the service inside the tests' own process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from galleries import ENGINES
from serving import BASE, make_model

from postgres import Postgres
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service.app import create_app
from sphereface2.recognition.service.settings import Settings


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> FaceEmbedder:
    folder = make_model(tmp_path_factory.mktemp("model") / "small")
    return FaceEmbedder.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("service")


@pytest.fixture(scope="module")
def client(embedder: FaceEmbedder, folder: Path) -> Iterator[TestClient]:
    """A service as on a laptop: bound to loopback, no keys, crops kept."""
    gallery = Gallery.open(folder / "gallery.db", embedder=embedder)
    app = create_app(
        embedder,
        gallery,
        Settings(
            audit=folder / "audit.jsonl",
            max_megapixels=2,
            max_images=4,
            max_body_mb=3,
            rate=0,
            keep_crops=True,
        ),
    )
    with TestClient(app, base_url=BASE, raise_server_exceptions=True) as client:
        yield client


@pytest.fixture(params=ENGINES)
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a new gallery may be, on each engine."""
    if request.param == "sqlite":
        return str(tmp_path / "g.db")
    server: Postgres = request.getfixturevalue("server")
    return server.database()
