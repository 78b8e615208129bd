"""Keys, rates, limits and the audit log of the service, inside this process."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from serving import ALIGNED, BASE, drawn, files, make_model, photograph

from sphereface2.errors import UserError
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service import keys
from sphereface2.recognition.service.app import create_app
from sphereface2.recognition.service.audit import Audit
from sphereface2.recognition.service.commands import serve
from sphereface2.recognition.service.settings import Settings


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
