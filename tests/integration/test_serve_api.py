"""The service's API inside this process: what it answers, what it refuses, and a lot of rubbish."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving import drawn, encoded, make_model, photograph

from postgres import Postgres
from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service import bodies, keys
from sphereface2.recognition.service.app import create_app
from sphereface2.recognition.service.audit import Audit
from sphereface2.recognition.service.commands import serve
from sphereface2.recognition.service.settings import Settings

BASE = "http://127.0.0.1:8000"
ALIGNED = {"aligned": "true"}


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


def files(*images: bytes, name: str = "images") -> list[tuple[str, tuple[str, bytes, str]]]:
    return [(name, ("secret-file-name.jpg", image, "image/jpeg")) for image in images]


def base64_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


def rows_of(answer: httpx.Response) -> np.ndarray:
    return np.array([one["embedding"] for one in answer.json()["embeddings"]])


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


def test_people_come_and_go(client: TestClient, folder: Path) -> None:
    metadata = json.dumps({"room": 7})
    made = client.post(
        "/v1/people",
        data={"name": "Ada Łovelace", "metadata": metadata, **ALIGNED},
        files=files(drawn(1), drawn(1, 1)),
    )
    assert made.status_code == 201, made.text
    assert (made.json()["images"], len(made.json()["added"])) == (2, 2)
    again = client.post(
        "/v1/people", data={"name": "Ada Łovelace", **ALIGNED}, files=files(drawn(1))
    )
    assert (again.status_code, again.json()["code"]) == (409, "exists")
    for number, name in enumerate(("b", "c", "d"), 2):
        client.post("/v1/people", data={"name": name, **ALIGNED}, files=files(drawn(number)))
    page = client.get("/v1/people?limit=3").json()
    assert [one["name"] for one in page["people"]] == ["Ada Łovelace", "b", "c"]
    assert (page["total"], page["next"]) == (4, 3)
    rest = client.get("/v1/people?limit=3&offset=3").json()
    assert ([one["name"] for one in rest["people"]], rest["next"]) == (["d"], None)
    found = client.post(
        "/v1/search", data={**ALIGNED, "k": "2"}, files=files(drawn(3), name="image")
    )
    (face,) = found.json()["faces"]
    assert face["matches"][0]["name"] == "c" and face["known"] is True
    assert face["matches"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    assert "probability" not in face["matches"][0]  # of one pair, and this is one among many
    far = found.json()["far"]
    assert found.json()["people"] == 4
    assert found.json()["fpir"] == pytest.approx(1 - (1 - far) ** 5)  # Ada has two images
    mean = {**ALIGNED, "fusion": "mean"}
    found = client.post("/v1/search", data=mean, files=files(drawn(3), name="image"))
    assert found.json()["fpir"] == pytest.approx(1 - (1 - far) ** 4)
    for name, seed, expected in (("c", 3, True), ("b", 3, False)):
        verdict = client.post(
            f"/v1/people/{name}/verify", data=ALIGNED, files=files(drawn(seed), name="image")
        ).json()
        assert verdict["person"]["name"] == name and verdict["same"] is expected
        assert verdict["same"] == (verdict["similarity"] >= verdict["threshold"])
    unknown = client.post(
        "/v1/people/nobody/verify", data=ALIGNED, files=files(drawn(3), name="image")
    )
    assert (unknown.status_code, unknown.json()["code"]) == (404, "no_such_person")

    more = client.post("/v1/people/c/images", data=ALIGNED, files=files(drawn(3, 1)))
    assert (more.status_code, more.json()["images"]) == (201, 2)
    new = client.put(
        "/v1/people/c", data={**ALIGNED, "metadata": '{"x": 1}'}, files=files(drawn(9))
    )
    assert (new.json()["images"], new.json()["metadata"]) == (1, {"x": 1})
    for kind in ({"json": {"metadata": {"y": 2}}}, {"files": {"metadata": (None, '{"y": 2}')}}):
        changed = client.patch("/v1/people/c", **kind)
        assert (changed.status_code, changed.json()) == (
            200,
            {"name": "c", "images": 1, "metadata": {"y": 2}, "thumbnail": True},
        )
    refused = client.patch("/v1/people/c", content=b"x", headers={"content-type": "image/png"})
    assert (refused.status_code, refused.json()["code"]) == (415, "content_type")
    listed = client.get("/v1/people/Ada Łovelace/images").json()
    assert (listed["name"], listed["images"], len(listed["enrolled"])) == ("Ada Łovelace", 2, 2)
    first, second = (one["id"] for one in listed["enrolled"])
    crop = client.get(f"/v1/people/Ada Łovelace/images/{second}/crop")
    assert crop.headers["content-type"] == "image/jpeg"
    assert client.get(f"/v1/people/b/images/{second}/crop").status_code == 404
    assert client.delete(f"/v1/people/b/images/{second}").status_code == 404
    assert client.delete(f"/v1/people/Ada Łovelace/images/{second}").status_code == 204
    assert client.get("/v1/people/Ada Łovelace").json()["images"] == 1
    last = client.delete(f"/v1/people/Ada Łovelace/images/{first}")
    assert (last.status_code, last.json()["code"]) == (422, "invalid")
    renamed = client.patch("/v1/people/d", json={"name": "e", "metadata": {"z": 3}}).json()
    assert (renamed["name"], renamed["metadata"]) == ("e", {"z": 3})
    assert client.get("/v1/people/d").status_code == 404
    taken = client.patch("/v1/people/e", json={"name": "c", "metadata": {"z": 4}})
    assert (taken.status_code, taken.json()["code"]) == (409, "exists")
    assert client.get("/v1/people/e").json()["metadata"] == {"z": 3}  # both or neither
    assert client.patch("/v1/people/e", json={"name": "d"}).json()["name"] == "d"
    assert client.patch("/v1/people/nobody", json={"metadata": {}}).status_code == 404
    person = client.get("/v1/people/Ada Łovelace").json()
    assert (person["metadata"], person["thumbnail"]) == ({"room": 7}, True)
    thumbnail = client.get("/v1/people/Ada Łovelace/thumbnail")
    assert read_image(thumbnail.content).shape == (112, 112, 3)
    assert sorted(path.name for path in folder.iterdir() if path.suffix == ".jpg") == []

    assert client.delete("/v1/people/Ada Łovelace").status_code == 204
    for path in ("Ada Łovelace", "Ada Łovelace/thumbnail", "nobody"):
        assert client.get(f"/v1/people/{path}").status_code == 404
    assert client.delete("/v1/people/nobody").status_code == 404
    for name in "bcd":
        client.delete(f"/v1/people/{name}")
    assert client.get("/v1/people").json()["total"] == 0
    empty = client.post("/v1/search", data=ALIGNED, files=files(drawn(3), name="image")).json()
    assert [(face["known"], face["matches"]) for face in empty["faces"]] == [(False, [])]


def test_an_image_with_several_faces_is_told(client: TestClient) -> None:
    face = np.asarray(Image.open(io.BytesIO(photograph())))
    two = encoded(np.concatenate([face, face[:, ::-1]], 1))
    enrolled = client.post("/v1/people", data={"name": "Eve"}, files=files(two))
    assert (enrolled.status_code, enrolled.json()["code"]) == (422, "several_faces")
    assert "2 faces" in enrolled.json()["error"]
    assert client.get("/v1/people").json()["total"] == 0
    form = {"name": "Eve", "faces": "largest"}
    assert client.post("/v1/people", data=form, files=files(two)).status_code == 201
    found = client.post("/v1/search", data={"faces": "all"}, files=files(two, name="image")).json()
    assert [one["matches"][0]["name"] for one in found["faces"]] == ["Eve", "Eve"]
    left, right = sorted(one["face"]["box"][0] for one in found["faces"])
    assert left < face.shape[1] < right
    assert len(rows_of(client.post("/v1/embed", data={"faces": "all"}, files=files(two)))) == 2
    pair = {"a": ("a", two), "b": ("b", photograph())}
    verdict = client.post("/v1/verify", data={"faces": "all"}, files=pair).json()
    assert [len(faces) for faces in verdict["faces"]] == [2, 1] and len(verdict["pairs"]) == 2
    assert verdict["pairs"][0]["similarity"] == verdict["similarity"]
    assert verdict["pairs"][0]["similarity"] >= verdict["pairs"][1]["similarity"]
    client.delete("/v1/people/Eve")


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


def test_people_look_alike_at_the_calibration_s_own_rate_whatever_the_service_decides_by(
    embedder: FaceEmbedder, tmp_path: Path
) -> None:
    assert embedder.calibration is not None
    low, high = (embedder.calibration.threshold(far) for far in (1e-1, 1e-2))
    assert embedder.calibration.far_default == 1e-2 and low < high
    settings = Settings(audit=tmp_path / "a", rate=0, far=1e-1)
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    with TestClient(create_app(embedder, gallery, settings), base_url=BASE) as client:
        (row,) = embedder.embed([drawn(1)], aligned=True)
        other = np.random.default_rng(0).standard_normal(len(row))
        other -= (other @ row) * row
        cosine = (low + high) / 2  # alike at one false accept in ten, not at one in a hundred
        gallery.add("Ada", cosine * row + (1 - cosine**2) ** 0.5 * other / np.linalg.norm(other))
        person = {"name": "Bob", "lookalikes": "refuse", **ALIGNED}
        assert client.post("/v1/people", data=person, files=files(drawn(1))).status_code == 201


def test_a_face_under_a_second_name_is_refused_where_asked(client: TestClient) -> None:
    def enrol(path: str, *images: bytes, **form: str) -> tuple[int, str]:
        answer = client.post(path, data={**ALIGNED, **form}, files=files(*images))
        return answer.status_code, answer.json().get("code") or answer.json()["name"]

    refuse = {"lookalikes": "refuse"}
    assert enrol("/v1/people", drawn(1), name="Ada", **refuse) == (201, "Ada")
    assert enrol("/v1/people", drawn(3), name="Bob", **refuse) == (201, "Bob")
    assert enrol("/v1/people/Ada/images", drawn(1, 1), **refuse) == (201, "Ada")
    answer = client.post(
        "/v1/people",
        data={"name": "Zoe", **ALIGNED, **refuse},
        files=files(drawn(8), drawn(1)),
    )
    assert (answer.status_code, answer.json()["code"]) == (409, "looks_like")
    assert answer.json()["error"].startswith("image 2 looks like Ada, who is enrolled (similarity ")
    assert client.get("/v1/people/Zoe").status_code == 404
    assert enrol("/v1/people/Bob/images", drawn(1), **refuse) == (409, "looks_like")
    assert enrol("/v1/people", drawn(1), name="Zoe") == (201, "Zoe")
    for name in ("Ada", "Bob", "Zoe"):
        client.delete(f"/v1/people/{name}")


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


def test_a_person_enrolled_anew_never_has_the_face_of_the_one_deleted_before(
    embedder: FaceEmbedder, tmp_path: Path
) -> None:
    def started(crops: bool) -> TestClient:
        gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
        settings = Settings(keep_crops=crops, audit=tmp_path / "a")
        return TestClient(create_app(embedder, gallery, settings), base_url=BASE)

    def enrol(client: TestClient, name: str, seed: int) -> None:
        answer = client.post("/v1/people", data={"name": name, **ALIGNED}, files=files(drawn(seed)))
        assert answer.status_code == 201, answer.text

    with started(crops=True) as client:
        enrol(client, "Ada", 1)
        enrol(client, "Bob", 2)
        bob = client.get("/v1/people/Bob/thumbnail").content
    with started(crops=False) as client:
        assert client.delete("/v1/people/Ada").status_code == 204
        enrol(client, "Ada", 3)
    with started(crops=True) as client:
        assert client.get("/v1/people/Ada/thumbnail").json()["code"] == "no_thumbnail"
        listed = client.get("/v1/people").json()["people"]
        assert [person["thumbnail"] for person in listed] == [False, True]
        assert client.get("/v1/people/Bob/thumbnail").content == bob
        # The first of the images added with a crop is shown, and stays the first.
        more = {"data": ALIGNED, "files": files(drawn(3, 1), drawn(3, 2))}
        assert client.post("/v1/people/Ada/images", **more).json()["thumbnail"] is True
        first = client.get("/v1/people/Ada/thumbnail").content
        client.post("/v1/people/Ada/images", data=ALIGNED, files=files(drawn(3, 3)))
        assert client.get("/v1/people/Ada/thumbnail").content == first


def test_whom_the_gallery_holds_under_any_name_can_be_read_and_deleted(
    embedder: FaceEmbedder, tmp_path: Path
) -> None:
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    names = ["R&D/Ada", "a/../b", "100%", "two\nlines"]
    row = embedder.embed([drawn(1)], aligned=True)
    for name in names:
        gallery.add(name, row)
    app = create_app(embedder, gallery, Settings(audit=tmp_path / "a", keep_crops=True))
    with TestClient(app, base_url=BASE) as client:
        for name in names:
            path = f"/v1/people/{quote(name, safe='')}"
            assert client.get(path).json()["name"] == name
            changed = client.patch(path, json={"metadata": {"x": 1}})
            assert changed.json()["metadata"] == {"x": 1}
            more = client.post(f"{path}/images", data=ALIGNED, files=files(drawn(2)))
            assert more.json()["images"] == 2, more.text
            assert client.get(f"{path}/thumbnail").headers["content-type"] == "image/jpeg"
            assert client.delete(path).status_code == 204
            assert client.get(path).json()["code"] == "no_such_person"
        assert client.get("/v1/people").json()["total"] == 0
        assert 'route="/v1/people/{name}/images"' in client.get("/metrics").text
        # Persian and emoji are written with characters that show nothing.
        for name in ("نرگس می\u200cخواهد", "\U0001f469\u200d\U0001f52c"):
            made = client.post("/v1/people", data={"name": name, **ALIGNED}, files=files(drawn(3)))
            assert (made.status_code, made.json()["name"]) == (201, name)
        for name in ("\u200d", ".\u200c.", "a\u202eb"):
            made = client.post("/v1/people", data={"name": name, **ALIGNED}, files=files(drawn(3)))
            assert made.status_code == 422, made.text


def test_a_list_is_of_the_people_there_are_now(client: TestClient) -> None:
    def listed() -> list[tuple[str, int, dict]]:
        people = client.get("/v1/people").json()["people"]
        return [(one["name"], one["images"], one["metadata"]) for one in people]

    assert listed() == []
    for name in "cab":
        client.post("/v1/people", data={"name": name, **ALIGNED}, files=files(drawn(1)))
    assert listed() == [("a", 1, {}), ("b", 1, {}), ("c", 1, {})]
    client.delete("/v1/people/b")
    client.patch("/v1/people/c", json={"metadata": {"x": 1}})
    client.post("/v1/people/a/images", data=ALIGNED, files=files(drawn(1, 1)))
    assert listed() == [("a", 2, {}), ("c", 1, {"x": 1})]
    assert client.get("/v1/people?offset=1&limit=1").json()["people"][0]["name"] == "c"
    page = client.get("/v1/people", params={"query": "A", "limit": 1}).json()
    assert ([one["name"] for one in page["people"]], page["total"], page["next"]) == (
        ["a"],
        1,
        None,
    )
    for name in "ac":
        client.delete(f"/v1/people/{name}")
    assert listed() == []


def test_what_no_answer_could_hold_is_not_stored(client: TestClient) -> None:
    def people() -> list[dict]:
        return client.get("/v1/people").json()["people"]

    half = '{"a": "\\ud83d"}'  # half of an emoji, as a cut text has it
    sent = [half, '{"\\ud83d": 1}', '{"a": 1e999}']
    for metadata in sent:
        form = {"name": "Ada", "metadata": metadata, **ALIGNED}
        answer = client.post("/v1/people", data=form, files=files(drawn(1)))
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid"), answer.text
        assert people() == []
    client.post("/v1/people", data={"name": "Ada", **ALIGNED}, files=files(drawn(1)))
    for metadata in sent:
        field = {"metadata": (None, metadata)}
        assert client.patch("/v1/people/Ada", files=field).status_code == 422
        put = client.put(
            "/v1/people/Ada", data={"metadata": metadata, **ALIGNED}, files=files(drawn(2))
        )
        assert put.status_code == 422
        content = f'{{"metadata": {metadata}}}'
        json_kind = {"content-type": "application/json"}
        answer = client.patch("/v1/people/Ada", content=content, headers=json_kind)
        assert answer.status_code == 422
    whole = client.patch("/v1/people/Ada", files={"metadata": (None, '{"a": "\\ud83d\\ude00"}')})
    assert whole.json()["metadata"] == {"a": "😀"}
    assert [person["metadata"] for person in people()] == [{"a": "😀"}]
    # Where the form's own encoding smuggles it in, no error may quote it.
    body = "".join(
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in (("+2AA-", "1"), ("+2AA-", "1"), ("metadata", "{}"))
    )
    kind = {"content-type": "multipart/form-data; boundary=b; charset=utf-7"}
    answer = client.patch("/v1/people/Ada", content=f"{body}--b--\r\n", headers=kind)
    assert answer.status_code == 422, answer.text
    client.delete("/v1/people/Ada")


def test_a_thumbnail_is_there_or_not_while_people_come_and_go(client: TestClient) -> None:
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            form = {"data": {"name": "Ada", **ALIGNED}, "files": files(drawn(1))}
            client.post("/v1/people", **form)
            client.put("/v1/people/Ada", data=ALIGNED, files=files(drawn(2)))
            client.delete("/v1/people/Ada")

    thread = threading.Thread(target=change)
    thread.start()
    seen = set()
    try:
        for _ in range(300):
            answer = client.get("/v1/people/Ada/thumbnail")  # raises what the server raises
            seen.add(answer.status_code)
            if answer.status_code == 200:
                assert read_image(answer.content).shape == (112, 112, 3)
            assert client.get("/v1/people").status_code == 200
    finally:
        over.set()
        thread.join()
    assert seen == {200, 404}


def bomb() -> bytes:
    """A PNG that says it has 20,000 × 20,000 pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return len(content).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    side = (20_000).to_bytes(4, "big")
    rows = zlib.compress(b"\0" * 2501 * 20_000, 9)
    head = chunk(b"IHDR", side + side + b"\x01\0\0\0\0")
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("image", "status", "code"),
    [
        (b"", 415, "not_an_image"),
        (b"a text that was renamed to .jpg", 415, "not_an_image"),
        (b"GIF89a" + b"\0" * 40, 415, "not_an_image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not_an_image"),
        (drawn(1)[:600], 422, "unreadable"),
        (b"\xff\xd8\xff", 422, "unreadable"),
        (bomb(), 422, "unreadable"),
        (encoded(np.zeros((200, 200, 3), np.uint8)), 422, "no_face"),
        (encoded(np.zeros((1, 1, 3), np.uint8), "PNG"), 422, "no_face"),
    ],
    ids=["empty", "text", "gif", "svg", "truncated", "three bytes", "bomb", "no face", "1x1"],
)
def test_a_bad_image_is_refused_in_one_sentence(
    client: TestClient, image: bytes, status: int, code: str
) -> None:
    answer = client.post("/v1/embed", files=files(image))
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert "\n" not in answer.json()["error"] and "secret" not in answer.text


def test_unusual_images_are_taken(client: TestClient) -> None:
    pixels = read_image(drawn(1))
    image = Image.fromarray(pixels)
    animated = encoded(pixels, "WEBP", save_all=True, append_images=[image.rotate(90)])
    unusual = [
        encoded(image.convert("L"), "PNG"),
        encoded(image.convert("RGBA"), "PNG"),
        encoded(pixels, "WEBP", lossless=True),
        animated,
        encoded(image.convert("CMYK")),
        encoded(np.zeros((1, 1, 3), np.uint8), "PNG"),
    ]
    for image in unusual:
        answer = client.post("/v1/embed", files=files(image), data=ALIGNED)
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 422),
        ({"content": b"[" * 100_000, "headers": {"content-type": "application/json"}}, 422),
        ({"json": {"images": ["%%%"]}}, 422),
        ({"json": {"images": []}}, 422),
        ({"json": {"images": "x", "unknown": 1}}, 422),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, 400),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data; boundary=b"}}, 400),
        ({"content": b"x", "headers": {"content-type": "text/plain"}}, 415),
        ({"files": files(*[b"\xff\xd8\xff"] * 5)}, 422),
        ({"content": b"\0" * 3_000_001, "headers": {"content-type": "image/png"}}, 413),
    ],
    ids=[
        "half JSON",
        "deep JSON",
        "no base64",
        "no image",
        "unknown field",
        "no boundary",
        "no form",
        "text",
        "too many",
        "too large",
    ],
)
def test_a_bad_request_is_refused_in_one_sentence(
    client: TestClient, request_: dict, status: int
) -> None:
    answer = client.post("/v1/embed", **request_)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"code", "error"} and "\n" not in answer.json()["error"]


@pytest.mark.parametrize(
    "body",
    [
        {"images": [1] * 500_000},
        {"images": [1] * 5_000},
        {"images": [""] * 5_000},
        {"images": ["eA=="], **{f"a{n}": 1 for n in range(200_000)}},
        {"images": ["eA=="], "aligned": {f"a{n}": 1 for n in range(3_000)}},
    ],
    ids=["items", "fewer items", "empty items", "fields", "nested"],
)
def test_a_body_of_many_parts_costs_no_more_than_another(
    client: TestClient, body: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    original = bodies.sentence

    def sentence(errors: list) -> str:
        told.append(len(errors))
        return original(errors)

    monkeypatch.setattr(bodies, "sentence", sentence)
    content, kind = json.dumps(body), {"content-type": "application/json"}
    started = time.process_time()
    answer = client.post("/v1/embed", content=content, headers=kind)
    assert time.process_time() - started < 0.5
    assert answer.status_code == 422 and len(answer.json()["error"]) < 200
    assert told in ([], [1])


@pytest.mark.parametrize("name", ["", " ", "a/b", "..", "a\0b", "x" * 201, "a\nb"])
def test_a_bad_name_is_refused(client: TestClient, name: str) -> None:
    image = base64_of(drawn(1))
    answer = client.post("/v1/people", json={"name": name, "images": [image], "aligned": True})
    assert answer.status_code == 422, answer.text
    assert client.get("/v1/people").json()["total"] == 0


def test_a_page_of_another_site_gets_nothing(client: TestClient) -> None:
    refused = [
        {"host": "evil.example"},  # its name points to 127.0.0.1
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1@evil.example"},
        {"host": ""},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9000"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ]
    for headers in refused:
        for path in ("/v1/people", "/", "/docs", "/metrics"):
            assert client.get(path, headers=headers).status_code in (400, 403, 421), headers
    for headers in (
        {},
        {"host": "localhost:8000"},
        {"host": "[::1]:8000"},
        {"origin": BASE, "sec-fetch-site": "same-origin"},
    ):
        assert client.get("/v1/people", headers=headers).status_code == 200
    link = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert client.get("/", headers=link).status_code == 200
    assert client.get("/docs", headers=link).status_code == 200
    assert client.get("/v1/people", headers=link).status_code == 403


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


def test_the_audit_log_says_who_did_what_and_nothing_more(client: TestClient, folder: Path) -> None:
    client.post("/v1/people", data={"name": "Eve", **ALIGNED}, files=files(drawn(5)))
    client.post("/v1/search", data=ALIGNED, files=files(drawn(5), name="image"))
    client.delete("/v1/people/Eve")
    client.post("/v1/embed", files=files(b"nothing"))
    lines = [json.loads(line) for line in (folder / "audit.jsonl").read_text().splitlines()]
    told = [(line["action"], line.get("person"), line["outcome"]) for line in lines[-4:]]
    assert told == [
        ("enrol", "Eve", "ok"),
        ("search", "Eve", "known"),
        ("remove", "Eve", "ok"),
        ("embed", None, "not_an_image"),
    ]
    fields = {"time", "request", "client", "key", "action", "person", "images", "status"}
    assert all(set(line) <= fields | {"outcome"} for line in lines)
    assert "secret-file-name" not in (folder / "audit.jsonl").read_text()


def test_keys_rates_and_hosts_of_a_server_in_the_open(
    embedder: FaceEmbedder, tmp_path: Path
) -> None:
    token = keys.add("desk", tmp_path / "keys.json")
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    app = create_app(
        embedder,
        gallery,
        Settings(
            host="0.0.0.0",
            keys=tmp_path / "keys.json",
            audit=tmp_path / "audit.jsonl",
            rate=0.6,
            max_images=1,
            max_queue=1,
        ),
    )
    with TestClient(app, base_url="http://faces.example") as client:
        for path in ("/", "/healthz", "/readyz", "/openapi.json", "/static/main.js"):
            assert client.get(path).status_code == 200, path
        for path in ("/metrics", "/v1/people", "/v1/model"):
            assert client.get(path).status_code == 401, path
        wrong = {"authorization": f"Bearer {token[:-2]}"}
        assert client.get("/v1/people", headers=wrong).status_code == 401
        good = {"authorization": f"Bearer {token}"}
        assert client.get("/v1/people", headers=good).status_code == 200
        assert client.get("/metrics", headers={"x-api-key": token}).status_code == 200
        no_crop = client.get("/v1/people/x/thumbnail", headers=good)
        assert no_crop.status_code == 404
        answers = [client.get("/v1/people", headers=good) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert 1 <= int(answers[-1].headers["retry-after"]) <= 10
        keys.add("other", tmp_path / "keys.json")
        keys.remove("desk", tmp_path / "keys.json")
        assert client.get("/v1/people", headers=good).status_code == 401
    key = token.split("_")[1]
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert {line.get("key") for line in lines} == {None, key}
    assert token not in (tmp_path / "audit.jsonl").read_text()


def test_a_rate_below_one_lets_a_first_request_in_and_the_page_s_files_do_not_count(
    embedder: FaceEmbedder, tmp_path: Path
) -> None:
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    app = create_app(embedder, gallery, Settings(audit=tmp_path / "a", rate=0.05))
    with TestClient(app, base_url=BASE) as client:
        loaded = [client.get("/static/main.js").status_code for _ in range(100)]
        assert loaded == [200] * 100
        answers = [client.get("/v1/people") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [200, 429]
        assert 1 <= int(answers[1].headers["retry-after"]) <= 20


def test_what_is_too_much_is_refused_with_a_time_to_return(
    embedder: FaceEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    settings = Settings(audit=tmp_path / "a", max_images=1, max_queue=2, rate=0)
    app = create_app(embedder, gallery, settings)
    entered, gate = threading.Event(), threading.Event()
    with TestClient(app, base_url=BASE) as client:
        original = app.state.service.recogniser.batcher._forward

        def slow(*args: object, **options: object) -> np.ndarray:
            entered.set()
            assert gate.wait(20)
            return original(*args, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(app.state.service.recogniser.batcher, "_forward", slow)
        answers: list[int] = []

        def ask() -> None:
            answer = client.post("/v1/embed", files=files(drawn(1)), data=ALIGNED)
            answers.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(2)]
        threads[0].start()
        assert entered.wait(10)
        threads[1].start()
        accepted = app.state.service.recogniser
        for _ in range(500):
            if accepted._accepted == 2:
                break
            threading.Event().wait(0.01)
        refused = client.post("/v1/embed", files=files(drawn(1)), data=ALIGNED)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        assert refused.headers["retry-after"] == "1"
        gate.set()
        for thread in threads:
            thread.join()
        assert answers == [200, 200]
        app.state.service.draining = True
        assert client.get("/readyz").status_code == 503
        assert client.get("/healthz").status_code == 200


def test_images_in_work_count_until_the_last_of_them_is_done(
    embedder: FaceEmbedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gallery = Gallery.open(tmp_path / "g.db", embedder=embedder)
    settings = Settings(audit=tmp_path / "a", max_images=3, max_queue=3, rate=0)
    app = create_app(embedder, gallery, settings)
    entered, gate, looked = threading.Event(), threading.Event(), []
    with TestClient(app, base_url=BASE) as client:
        original = embedder.aligner.detect

        def slow(*args: Any, **options: Any) -> Any:
            looked.append(options)
            entered.set()
            assert gate.wait(20)
            return original(*args, **options)

        monkeypatch.setattr(embedder.aligner, "detect", slow)
        answers: list[tuple[int, str]] = []

        def ask() -> None:
            images = [photograph(), b"\xff\xd8\xff", photograph()]
            answer = client.post("/v1/embed", files=files(*images))
            answers.append((answer.status_code, answer.json()["error"]))

        thread = threading.Thread(target=ask)
        thread.start()
        assert entered.wait(10)
        time.sleep(0.3)  # the second is found to be none meanwhile
        assert answers == []
        refused = client.post("/v1/embed", files=files(drawn(1)), data=ALIGNED)
        assert (refused.status_code, refused.json()["code"]) == (503, "overloaded")
        gate.set()
        thread.join()
        assert answers[0][0] == 422 and "image 2" in answers[0][1]
        assert "sphereface2_images 0.0" in client.get("/metrics").text
        assert client.post("/v1/embed", files=files(drawn(1)), data=ALIGNED).status_code == 200
        # What is seen to be no image at once keeps nobody busy.
        looked.clear()
        assert client.post("/v1/embed", files=files(photograph(), b"")).status_code == 415
        assert looked == []


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


def test_options_in_the_address_are_refused(client: TestClient) -> None:
    image = drawn(1)
    for body in (
        {"files": files(image, name="image"), "data": ALIGNED},
        {"json": {"image": base64_of(image), "aligned": True}},
    ):
        refused = client.post("/v1/search?k=3", **body)
        assert (refused.status_code, refused.json()["code"]) == (422, "invalid")
        assert "address" in refused.json()["error"]


def test_the_audit_log_is_private_after_it_was_moved_away(tmp_path: Path) -> None:
    path, mask = tmp_path / "audit.jsonl", os.umask(0o022)
    try:
        audit = Audit(path)
        audit.write(action="one")
        path.rename(tmp_path / "audit.1")
        audit.write(action="two")
        audit.close()
    finally:
        os.umask(mask)
    for file, action in ((path, "two"), (tmp_path / "audit.1", "one")):
        assert (file.stat().st_mode & 0o777, json.loads(file.read_text())["action"]) == (
            0o600,
            action,
        )


def test_an_unsafe_start_is_refused(tmp_path: Path) -> None:
    model = str(make_model(tmp_path / "m"))
    keys.add("desk", tmp_path / "keys.json")

    def start(**options: Any) -> None:
        serve(model, gallery=str(tmp_path / "g.db"), settings=Settings(**options))

    for host in ("0.0.0.0", "::", "192.0.2.1", "example.org", ""):
        with pytest.raises(UserError, match="keys"):
            start(host=host)
        with pytest.raises(UserError, match="--behind-proxy"):
            start(host=host, keys=tmp_path / "keys.json")
    with pytest.raises(UserError, match="keys"):  # a proxy brings others to a loopback address
        start(behind_proxy=True)
    with pytest.raises(UserError, match="does not exist"):
        start(keys=tmp_path / "none.json")
    for options in ({"max_queue": 3}, {"far": 0.5}, {"audit": tmp_path}):
        with pytest.raises(UserError):
            start(**options)
    for option in ("max_megapixels", "max_body_mb", "rate", "drain_seconds"):
        with pytest.raises(UserError, match=option.replace("_", "-")):
            start(**{option: math.inf})
    (tmp_path / "evil.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/x'\ntR.")
    with pytest.raises(UserError):
        serve(str(tmp_path / "evil.bin"), gallery=str(tmp_path / "g.db"))


# --- rubbish -------------------------------------------------------------------------------------

FUZZED = 400
# Halves of surrogate pairs as JSON, UTF-8 and UTF-7 can write them; numbers and texts out of reach.
AWKWARD = [rb"\ud800", b"\xed\xa0\x80", b"+2AA-", b"NaN", b"1e999", b"\0", b"\r\n", b'"', b"[" * 99]


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, cut out, doubled or moved."""
    content = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
        if not content:
            break
        at = int(rng.integers(len(content)))
        length = int(rng.integers(1, 1 + max(1, len(content) // 8)))
        match int(rng.integers(6)):
            case 0:
                content[at] ^= 1 << int(rng.integers(8))
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = content[at : at + length]
            case 3:
                content[at : at + length] = rng.integers(0, 256, length, np.uint8).tobytes()
            case 4:
                del content[at:]
            case 5:
                content[at:at] = AWKWARD[int(rng.integers(len(AWKWARD)))]
    return bytes(content)


def test_rubbish_never_breaks_the_server(client: TestClient) -> None:
    rng = np.random.default_rng(20)
    pixels = read_image(drawn(1))
    images = [
        drawn(1),
        encoded(pixels, "PNG"),
        encoded(pixels, "WEBP"),
        encoded(pixels, "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    ]
    boundary = b"----boundary"
    part = b'--%b\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'

    def form_of(fields: dict[bytes, bytes], name: bytes, image: bytes) -> bytes:
        fields = {b"aligned": b"true", **fields}
        form = b"".join(part % (boundary, key, b"", value) for key, value in fields.items())
        form += part % (boundary, name, b'; filename="x.jpg"', image)
        return form + b"--%b--\r\n" % boundary

    def person_of(metadata: bytes) -> bytes:
        return form_of({b"name": b"Zoe", b"metadata": metadata}, b"images", images[0])

    form = person_of(b'{"a": 1}')
    document = json.dumps(
        {"name": "Zoe", "images": [base64_of(images[0][:400])], "metadata": {"a": 1}}
    ).encode()
    multipart = "multipart/form-data; boundary=----boundary"
    statuses: list[int] = []
    for number in range(FUZZED):
        headers = {"content-type": multipart}
        match number % 8:
            case 0 | 1 | 2 | 3 as kind:
                path, body = "/v1/embed", form_of({}, b"images", mutated(images[kind], rng))
            case 4:
                path, body = "/v1/search", form_of({}, b"image", mutated(images[number % 4], rng))
            case 5:
                path, body = "/v1/people", mutated(form, rng)
                if number % 16 == 5:  # the image takes most of a form's blows
                    body = person_of(mutated(b'{"a": "b"}', rng))
            case 6:
                path, body = "/v1/people", mutated(document, rng)
                headers = {"content-type": "application/json"}
            case _:
                path, body = "/v1/verify", mutated(form, rng)
                kind = mutated(multipart.encode(), rng).decode("latin-1")
                headers = {"content-type": "".join(c for c in kind if c.isprintable())}
        answer = client.post(path, content=body, headers=_sendable(headers))
        assert answer.status_code < 500, (number, path, answer.text)
        if answer.status_code >= 400:
            assert "\n" not in answer.json()["error"]
        statuses.append(answer.status_code)
    assert client.get("/readyz").status_code == 200
    assert client.get("/v1/people").status_code == 200  # nothing stored that cannot be told
    # Both sides were met: much is refused, and what was hardly touched is served.
    assert 20 < sum(status < 300 for status in statuses) < FUZZED - 100
    for person in client.get("/v1/people").json()["people"]:
        client.delete(f"/v1/people/{person['name']}")


def _sendable(headers: dict[str, str]) -> dict[str, bytes]:
    return {name: value.encode("latin-1") for name, value in headers.items()}
