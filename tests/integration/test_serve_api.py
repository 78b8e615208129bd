"""The service's API inside this process: what it answers, and what it says of itself."""

from __future__ import annotations

import base64
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving import ALIGNED, BASE, base64_of, drawn, encoded, files, make_model, photograph, rows_of

from postgres import Postgres
from sphereface2.images import read_image
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service.app import create_app
from sphereface2.recognition.service.settings import Settings


def test_every_way_of_sending_an_image_gives_the_embedder_s_own_numbers(
    client: TestClient, embedder: FaceEmbedder
) -> None:
    image = drawn(1)
    expected = embedder.embed([image], aligned=True)
    text = base64_of(image)
    url_safe = base64.urlsafe_b64encode(image).decode().rstrip("=")
    lines = "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76))
    answers = [client.post("/v1/embed", files=files(image), data=ALIGNED)]
    answers += [
        client.post("/v1/embed", json={"images": [sent], "aligned": True})
        for sent in (text, url_safe, lines, f"data:image/jpeg;base64,{text}")
    ]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        np.testing.assert_allclose(rows_of(answer), expected, atol=1e-6)
        assert answer.json()["model"] == embedder.fingerprint
    photo = photograph()
    answer = client.post("/v1/embed", files=files(photo))
    np.testing.assert_allclose(rows_of(answer), embedder.embed([photo]), atol=1e-5)
    face = answer.json()["embeddings"][0]["face"]
    assert len(face["landmarks"]) == 5 and face["box"][0] < face["box"][2]
    bare = client.post("/v1/embed", content=image, headers={"content-type": "image/jpeg"})
    assert (bare.status_code, bare.json()["code"]) == (415, "content_type")


def test_concurrent_requests_each_get_their_own_answer(
    client: TestClient, embedder: FaceEmbedder
) -> None:
    images = [drawn(seed) for seed in range(12)]
    expected = embedder.embed(images, aligned=True)
    rows: dict[int, np.ndarray] = {}

    def ask(number: int) -> None:
        answer = client.post("/v1/embed", files=files(images[number]), data=ALIGNED)
        rows[number] = rows_of(answer)[0]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_allclose(np.stack([rows[n] for n in range(12)]), expected, atol=1e-5)


def test_a_verdict_follows_from_the_calibration(client: TestClient, embedder: FaceEmbedder) -> None:
    a, b = drawn(1), drawn(2)
    rows = embedder.embed([a, b], aligned=True)
    form = {"a": ("a", a), "b": ("b", b)}
    answer = client.post("/v1/verify", files=form, data={**ALIGNED, "crops": "1", "far": "0.1"})
    verdict = answer.json()
    assert embedder.calibration is not None
    assert verdict["similarity"] == pytest.approx(float(rows[0] @ rows[1]), abs=1e-5)
    assert verdict["threshold"] == embedder.calibration.threshold(0.1)
    assert verdict["same"] == (verdict["similarity"] >= verdict["threshold"])
    expected = embedder.calibration.probability(verdict["similarity"])
    assert verdict["probability"] == pytest.approx(float(expected))
    crop = base64.b64decode(verdict["crops"][0].partition(",")[2])
    np.testing.assert_array_equal(read_image(crop), read_image(a))
    refused = client.post("/v1/verify", files=form, data={**ALIGNED, "far": "0.00001"})
    assert refused.status_code == 422 and refused.json()["code"] == "unknown_far"


def test_a_poor_image_is_warned_of_or_refused(embedder: FaceEmbedder, tmp_path: Path) -> None:
    grey = encoded(np.full((112, 112, 3), 128, np.uint8), "PNG")
    for action, status in (("warn", 201), ("refuse", 422), ("off", 201)):
        gallery = Gallery.open(tmp_path / f"{action}.db", embedder=embedder)
        settings = Settings(audit=tmp_path / "a", rate=0, quality=action)
        app = create_app(embedder, gallery, settings)
        with TestClient(app, base_url=BASE) as client:
            answer = client.post("/v1/people", data={"name": "x", **ALIGNED}, files=files(grey))
            assert answer.status_code == status, answer.text
            if status == 201:
                assert len(answer.json()["warnings"]) == (action == "warn")
            else:
                assert answer.json()["code"] == "poor_image" and "blurred" in answer.json()["error"]
            assert client.get("/v1/people").json()["total"] == (status == 201)
            assert client.get("/v1/model").json()["quality"] == action


def test_the_service_recovers_when_its_database_does(
    embedder: FaceEmbedder, server: Postgres, tmp_path: Path
) -> None:
    gallery = Gallery.open(server.database(), embedder=embedder)
    app = create_app(embedder, gallery, Settings(audit=tmp_path / "a", rate=0))
    with TestClient(app, base_url=BASE) as client:
        person = {"name": "Ada", **ALIGNED}
        assert client.post("/v1/people", data=person, files=files(drawn(1))).status_code == 201
        asked = {
            "list": lambda: client.get("/v1/people"),
            "search": lambda: client.post(
                "/v1/search", data=ALIGNED, files=files(drawn(1), name="image")
            ),
            "verify": lambda: client.post(
                "/v1/people/Ada/verify", data=ALIGNED, files=files(drawn(1), name="image")
            ),
            "add": lambda: client.post(
                "/v1/people/Ada/images", data=ALIGNED, files=files(drawn(1, 1))
            ),
            "rename": lambda: client.patch("/v1/people/Ada", json={"name": "Ada"}),
            "model": lambda: client.get("/v1/model"),
        }
        server.kill()
        try:
            for name, ask in asked.items():
                answer = ask()
                assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1"), name
                assert answer.json()["code"] == "gallery_unavailable"
                assert "does not answer" in answer.json()["error"]
            assert client.get("/readyz").status_code == 503
            assert client.get("/healthz").status_code == 200
        finally:
            server.start()
        for name, ask in asked.items():
            assert ask().is_success, name
        assert client.get("/readyz").status_code == 200


def test_head_answers_wherever_get_does_and_other_sites_only_where_allowed(
    embedder: FaceEmbedder, tmp_path: Path
) -> None:
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    app = create_app(
        embedder,
        gallery,
        Settings(allow_origin=["https://intranet.example"], audit=tmp_path / "a"),
    )
    with TestClient(app, base_url=BASE) as client:
        for path in ("/", "/healthz", "/readyz", "/metrics", "/v1/people", "/v1/model"):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, get.status_code) == (200, 200), path
            assert head.headers["content-type"] == get.headers["content-type"]
        assert client.head("/v1/people/nobody").status_code == 404
        preflight = {
            "origin": "https://intranet.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        allowed = client.options("/v1/verify", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://intranet.example"
        sent = client.get("/v1/people", headers={"origin": "https://intranet.example"})
        assert sent.status_code == 200
        assert sent.headers["access-control-allow-origin"] == "https://intranet.example"
        for origin in ("https://evil.example", "https://intranet.example.evil.example"):
            refused = client.get("/v1/people", headers={"origin": origin})
            assert refused.status_code == 403
            assert "access-control-allow-origin" not in refused.headers


def test_headers_documents_and_metrics(client: TestClient) -> None:
    page = client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    document = client.get("/openapi.json").json()
    paths = {"/v1/embed", "/v1/verify", "/v1/search", "/v1/people", "/v1/people/{name}"}
    assert paths <= set(document["paths"])
    for path in paths - {"/v1/people/{name}"}:
        body = document["paths"][path]["post"]["requestBody"]["content"]
        assert "binary" in json.dumps(body["multipart/form-data"])
    client.get("/v1/people/somebody")
    text = client.get("/metrics").text
    assert 'route="/v1/people/{name}"' in text and "sphereface2_batch_size_bucket" in text
    assert "somebody" not in text
    assert client.get("/v1/nothing").json()["code"] == "not_found"
    assert client.put("/v1/embed").json()["code"] == "method_not_allowed"


def test_without_calibration_there_is_a_similarity_and_no_verdict(tmp_path: Path) -> None:
    embedder = FaceEmbedder.from_pretrained(make_model(tmp_path / "m", calibrated=False))
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    app = create_app(embedder, gallery, Settings(audit=tmp_path / "a"))
    with TestClient(app, base_url=BASE) as client:
        form = {"a": ("a", drawn(1)), "b": ("b", drawn(2))}
        verdict = client.post("/v1/verify", files=form, data=ALIGNED).json()
        assert verdict["same"] is None and verdict["probability"] is None
        far = client.post("/v1/verify", files=form, data={**ALIGNED, "far": "0.1"})
        assert far.json()["code"] == "not_calibrated"
        person = {"name": "Ada", "lookalikes": "refuse", **ALIGNED}
        enrolled = client.post("/v1/people", data=person, files=files(drawn(1)))
        assert enrolled.json()["code"] == "not_calibrated"
        assert client.get("/v1/model").json()["curve"] is None
