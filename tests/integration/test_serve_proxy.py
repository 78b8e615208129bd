"""The shipped proxy configuration: a real nginx before a real service, and what attacks it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving import drawn, make_model, serving

from required import needs
from sphereface2.recognition.service import keys

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
OPENSSL = shutil.which("openssl")
TEMPLATE = Path(__file__).parents[2] / "deploy" / "proxy" / "nginx.conf.template"
pytestmark = needs(NGINX and OPENSSL, "no nginx or openssl: apt-get install nginx openssl")
SECONDS = 12.0  # longer than the proxy's patience with slow clients


@contextmanager
def proxy(folder: Path, service: str) -> Iterator[tuple[int, Path]]:
    """nginx with the shipped configuration: its port and its certificate."""
    cert, key, run = folder / "cert.pem", folder / "key.pem", folder / "run"
    subprocess.run(
        [str(OPENSSL), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
        + ["-addext", "subjectAltName=DNS:localhost", "-out", str(cert), "-keyout", str(key)],
        check=True,
        capture_output=True,
    )
    run.mkdir(mode=0o777)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    configuration = folder / "nginx.conf"
    values = {
        "SERVER_NAME": "localhost",
        "LISTEN": str(port),
        "SERVICE": service,
        "CERT": str(cert),
        "KEY": str(key),
        "RUN": str(run),
    }
    text = TEMPLATE.read_text()
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", value)
    assert not re.findall(r"\$\{[A-Z]", text)
    configuration.write_text(text)
    command = [str(NGINX), "-p", str(folder), "-c", str(configuration)]
    subprocess.run([*command, "-t"], check=True, capture_output=True)
    process = subprocess.Popen(
        [*command, "-g", "daemon off;"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            time.sleep(0.05)
        yield port, cert
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path, str]]:
    """Port and certificate of a proxy before a service, and a key."""
    folder = tmp_path_factory.mktemp("proxy")
    folder.chmod(0o755)
    token = keys.add("desk", folder / "keys.json")
    options = ["--behind-proxy", "--keys", str(folder / "keys.json"), "--rate", "0"]
    audit = ["--audit", str(folder / "audit.jsonl"), "--drain-seconds", "0"]
    with (
        serving(make_model(folder / "m"), folder / "g.db", *options, *audit) as server,
        proxy(folder, urlsplit(server.url).netloc) as (port, cert),
    ):
        yield port, cert, token


def client_of(place: tuple[int, Path, str], address: str = "127.0.0.1") -> httpx.Client:
    port, cert, token = place
    return httpx.Client(
        base_url=f"https://localhost:{port}",
        headers={"authorization": f"Bearer {token}"},
        transport=httpx.HTTPTransport(
            verify=ssl.create_default_context(cafile=str(cert)), local_address=address
        ),
        timeout=30,
    )


def test_the_service_works_behind_the_proxy(place: tuple[int, Path, str]) -> None:
    _, cert, _ = place
    with client_of(place, "127.0.0.7") as client:
        page = client.get("/")
        assert page.status_code == 200 and "strict-transport-security" in page.headers
        assert client.get("/", headers={"origin": str(client.base_url)}).status_code == 200
        assert client.get("/metrics").status_code == 404
        image = {"images": ("x.jpg", drawn(1), "image/jpeg")}
        answer = client.post("/v1/embed", data={"aligned": "true"}, files=image)
        assert answer.status_code == 200, answer.text
        large = client.post("/v1/embed", content=b"\0" * 21_000_000)
        assert large.status_code == 413
        forged = client.get("/v1/people", headers={"x-forwarded-for": "192.0.2.1"})
        assert forged.status_code == 200
        assert client.get("/v1/people", headers={"authorization": "Bearer x"}).status_code == 401
        flood = [client.get("/v1/people").status_code for _ in range(150)]
        assert 429 in flood and set(flood) == {200, 429}
    lines = (cert.parent / "audit.jsonl").read_text().splitlines()
    # Whatever a client says of itself, the address is the one that the proxy saw.
    assert len(lines) > 3 and all('"client": "127.0.0.7"' in line for line in lines)


@contextmanager
def attack(place: tuple[int, Path, str]) -> Iterator[dict[str, Any]]:
    """A process that attacks meanwhile; what it tells is there in the end."""
    port, cert, token = place
    told: dict[str, Any] = {}
    script = Path(__file__).with_name("proxy_attacker.py")
    with subprocess.Popen(
        [sys.executable, script, str(port), cert, token],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield told
        told |= json.loads(process.communicate(timeout=60)[0])


@pytest.mark.slow
def test_attackers_do_not_slow_others_down(place: tuple[int, Path, str]) -> None:
    """Quiet and attacked in turns, so that what else the machine does falls on both."""
    image = {"images": ("x.jpg", drawn(1), "image/jpeg")}

    def p99(client: httpx.Client, seconds: float) -> float:
        """Of requests at a pace below the limit of an address."""
        taken, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            started = time.perf_counter()
            answer = client.post("/v1/embed", data={"aligned": "true"}, files=image)
            taken.append(time.perf_counter() - started)
            assert answer.status_code == 200, answer.text
            time.sleep(0.05)
        return sorted(taken)[int(0.99 * len(taken))]

    quiet, attacked = [], []
    with client_of(place) as client:
        p99(client, 2)
        for _ in range(5):
            quiet.append(p99(client, SECONDS))
            with attack(place) as told:
                attacked.append(p99(client, SECONDS))
            refused = told["statuses"].get("429", 0) / sum(told["statuses"].values())
            print(
                f"p99 quiet {1000 * quiet[-1]:.1f} ms, attacked {1000 * attacked[-1]:.1f} ms; "
                f"{refused:.0%} refused of a flood of {told['a_second']:.0f} requests a second"
            )
            assert refused > 0.5 and told["idle"] == 300
            assert told["heads_cut_off"] == told["heads"] == 40
    assert median(attacked) < 2 * median(quiet) + 0.005
