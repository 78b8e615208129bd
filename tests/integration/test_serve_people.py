"""People behind the service's API: enrolled, listed, searched, changed and deleted."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving import ALIGNED, BASE, drawn, encoded, files, photograph, rows_of

from sphereface2.images import read_image
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service.app import create_app
from sphereface2.recognition.service.settings import Settings


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
    for no_id in ("zzz", "-1", "1.5", "²", 2**63 - 1, 2**63, "9" * 5_000):  # as any other
        gone = client.delete(f"/v1/people/Ada Łovelace/images/{no_id}")
        assert (gone.status_code, gone.json()["code"]) == (404, "no_such_image"), no_id
        crop = client.get(f"/v1/people/Ada Łovelace/images/{no_id}/crop")
        assert (crop.status_code, crop.json()["code"]) == (404, "no_thumbnail"), no_id
    nobody = client.get("/v1/people/Ada Łovelace/images/1").json()  # a name may hold slashes
    assert nobody["error"] == "no person named 'Ada Łovelace/images/1' is enrolled"
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
        for _ in range(100):
            answer = client.get("/v1/people/Ada/thumbnail")  # raises what the server raises
            seen.add(answer.status_code)
            if answer.status_code == 200:
                assert read_image(answer.content).shape == (112, 112, 3)
            assert client.get("/v1/people").status_code == 200
    finally:
        over.set()
        thread.join()
    assert seen == {200, 404}
