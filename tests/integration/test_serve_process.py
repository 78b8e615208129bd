"""A real server in a process of its own: raw sockets, signals, what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from serving import ALIGNED, drawn, make_model, serving

FORM = {"images": ("x.jpg", drawn(1), "image/jpeg")}


def raw(url: str, request: bytes, *, timeout: float = 10) -> bytes:
    """What comes back for these bytes, until the server closes or is silent."""
    place = urlsplit(url)
    answer = b""
    with socket.create_connection((place.hostname, place.port), timeout=timeout) as connection:
        try:
            connection.sendall(request)
            while part := connection.recv(65536):
                answer += part
        except (TimeoutError, ConnectionError):
            pass
    return answer


def test_a_server_limits_recovers_drains_and_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    model, gallery, audit = make_model(tmp_path / "m"), tmp_path / "g.db", tmp_path / "audit.jsonl"
    options = ["--max-body-mb", "1", "--audit", str(audit), "--drain-seconds", "1.5"]
    with serving(model, gallery, *options) as server:
        with httpx.Client(base_url=server.url) as client:
            made = client.post("/v1/people", data={"name": "Ada", **ALIGNED}, files=FORM)
            assert made.status_code == 201, made.text
            head = b"POST /v1/embed HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
            # Too large as declared; too large without saying so; bytes that are no HTTP.
            answer = raw(
                server.url,
                head
                + b"Content-Length: 2000000\r\nConnection: close\r\nExpect: 100-continue\r\n\r\n",
            )
            assert answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer
            chunk = b"10000\r\n" + b"\0" * 65536 + b"\r\n"
            chunks = head + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunk * 20
            answer = raw(server.url, chunks + b"0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer
            assert raw(server.url, b"\x16\x03\x01\x02\0\x01\0\r\n\r\n").startswith(b"HTTP/1.1 400")
            raw(server.url, head + b"Content-Length: 5000\r\n\r\nabc", timeout=0.2)  # and hangs up
            lying = b"GET /v1/people HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n"
            assert raw(server.url, lying).startswith(b"HTTP/1.1 400")
            assert client.get("/readyz").text == "ready"

            # A request whose body is still on its way when SIGTERM comes is served to its end.
            place = urlsplit(server.url)
            slow = socket.create_connection((place.hostname, place.port), timeout=20)
            part = b'--b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n'
            image = b'--b\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'
            body = part % (b"aligned", b"1") + image + drawn(2) + b"\r\n--b--\r\n"
            slow.sendall(
                b"POST /v1/embed HTTP/1.1\r\nHost: 127.0.0.1\r\n"
                b"Content-Type: multipart/form-data; boundary=b\r\n"
                b"Content-Length: %d\r\n\r\n" % len(body)
            )
            slow.sendall(body[:500])
            time.sleep(0.3)
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert httpx.get(f"{server.url}/readyz").status_code == 503  # a new connection
            assert client.get("/v1/people").json()["total"] == 1  # and still served
            time.sleep(1.8)
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{server.url}/healthz")
            slow.sendall(body[500:])
            answer = b""
            while part := slow.recv(65536):
                answer += part
            slow.close()
            assert answer.startswith(b"HTTP/1.1 200") and b"embeddings" in answer
        assert server.process.wait(20) == 0, "".join(server.log)
    assert not any("Traceback" in line for line in server.log), "".join(server.log)
    actions = [json.loads(line)["action"] for line in audit.read_text().splitlines()]
    assert {"enrol", "embed", "list"} <= set(actions)
    assert os.stat(audit).st_mode & 0o077 == 0
    # Nothing of an image is anywhere: only the gallery, the log and the model.
    assert {path.name for path in tmp_path.iterdir()} == {"m", "g.db", "audit.jsonl"}

    with serving(model, gallery) as server:
        assert httpx.get(f"{server.url}/v1/people").json()["people"][0]["name"] == "Ada"
        statuses: list[int] = []

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=30) as client:
                for _ in range(5):
                    answer = client.post("/v1/embed", data=ALIGNED, files=FORM)
                    statuses.append(answer.status_code)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 30
        assert server.stop(signal.SIGINT) in (0, -signal.SIGINT, 130)
