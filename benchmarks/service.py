"""The service's requests a second and latency, what batching brings, and its memory over time.

Servers are processes of their own on 127.0.0.1, the clients connections that this one keeps; all
share the machine's cores. A request embeds one aligned JPEG crop; the
network is in PyTorch or exported to ONNX; the server with batches of one is the alternative. The
bound is the embedder alone, called in this process with batches of 64 of the same images, in turns
with the server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import torch

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data.synthetic import person
from sphereface2.recognition.export import export
from sphereface2.recognition.face_embedder import FaceEmbedder

CLIENTS = (1, 8, 64)
ROUNDS = 2
RAMP = 1.0
ANSWER = re.compile(rb"HTTP/1.1 200 .*?\r\ncontent-length: (\d+)\r\n.*?\r\n\r\n", re.DOTALL)


@contextmanager
def server(model: Path, gallery: Path, *options: str) -> Iterator[tuple[str, int]]:
    """Address and process id of a running service."""
    command = [sys.executable, "-m", "sphereface2", "serve", str(model), "--gallery", str(gallery)]
    command += ["--port", "0", "--rate", "0", "--drain-seconds", "0", "--device", "cpu"]
    with tempfile.NamedTemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--audit", str(gallery.parent / "audit.jsonl"), *options],
            stdout=log,
            stderr=log,
        )
        try:
            for _ in range(600):
                text = Path(log.name).read_text()
                if found := re.search(r"running on (\S+)", text):
                    break
                if process.poll() is not None:
                    sys.exit(text)
                time.sleep(0.1)
            else:
                sys.exit(f"the server did not start: {text}")
            yield found[1], process.pid
        finally:
            process.terminate()
            process.wait(60)


class Client:
    """One connection that is kept."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self.connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)

    def ask(self, method: str, path: str, body: bytes | None = None, kind: str = "") -> int:
        """Send, read all of the answer, return the status."""
        self.connection.request(method, path, body, {"Content-Type": kind} if kind else {})
        answer = self.connection.getresponse()
        answer.read()
        return answer.status


def load(url: str, images: list[bytes], clients: int, seconds: float) -> list[float]:
    """Latencies of requests, in seconds; any refusal ends the benchmark.

    One thread has all connections, on each the next request as soon as the last is answered: a
    thread a client would take a seventh of the machine from the server that it measures. The first
    second does not count: in it all the clients connect at once.
    """
    place = urlsplit(url)
    head = f"POST /v1/embed HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: {FORM}\r\n"
    forms = [form("images", image) for image in images]
    requests = [f"{head}Content-Length: {len(one)}\r\n\r\n".encode() + one for one in forms]
    latencies: list[float] = []
    started, received, turns = [0.0] * clients, [b""] * clients, list(range(clients))
    begin = time.perf_counter() + RAMP
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())

        def ask(connection: socket.socket, number: int) -> None:
            started[number], received[number] = time.perf_counter(), b""
            connection.sendall(requests[turns[number] % len(requests)])
            turns[number] += 1

        for number in range(clients):
            address = (place.hostname, place.port)
            connection = stack.enter_context(socket.create_connection(address, timeout=60))
            selector.register(connection, selectors.EVENT_READ, number)
            ask(connection, number)
        waiting = clients
        while waiting:
            for key, _ in selector.select():
                connection, number = key.fileobj, key.data
                received[number] += (part := connection.recv(1 << 16))
                found = ANSWER.match(received[number])
                if not part or (found is None and b"\r\n\r\n" in received[number]):
                    sys.exit(f"the service answered {received[number][:200]!r}")
                if found is None or len(received[number]) < found.end() + int(found[1]):
                    continue
                now = time.perf_counter()
                if started[number] >= begin:
                    latencies.append(now - started[number])
                if now < begin + seconds:
                    ask(connection, number)
                else:
                    waiting -= 1
    return latencies


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def compare(models: dict[str, Path], folder: Path, images: list[bytes], seconds: float) -> None:
    """Requests a second, in turns with the embedder alone, which calls nobody and decodes ahead."""
    alone = {
        name: FaceEmbedder.from_pretrained(path, device="cpu") for name, path in models.items()
    }
    with ExitStack() as stack:

        def serve(name: str, *options: str) -> str:
            file = folder / f"{name}{len(options)}.db"
            return stack.enter_context(server(models[name], file, *options))[0]

        urls = {(name, 16): serve(name) for name in models}
        urls["PyTorch", 1] = serve("PyTorch", "--max-batch", "1")
        for url in urls.values():
            load(url, images, 8, 2)
        print(
            f"{'clients':>7}  {'network':>12}  {'max batch':>9}  {'requests/s':>10}  "
            f"{'p50 ms':>7}  {'p99 ms':>7}  {'alone, images/s':>15}  {'ratio':>5}"
        )
        for clients in CLIENTS:
            taken: dict[tuple[str, int], list[float]] = {key: [] for key in urls}
            bounds: dict[str, list[float]] = {name: [] for name in models}
            for _ in range(ROUNDS):
                for name, embedder in alone.items():
                    bounds[name].append(rate(embedder, images, seconds))
                    for key in urls:
                        if key[0] == name:
                            taken[key] += load(urls[key], images, clients, seconds)
            for (name, size), latencies in taken.items():
                served = clients / statistics.mean(latencies)
                bound = statistics.mean(bounds[name])
                print(
                    f"{clients:>7}  {name:>12}  {size:>9}  {served:>10,.0f}  "
                    f"{1000 * percentile(latencies, 0.5):>7.1f}  "
                    f"{1000 * percentile(latencies, 0.99):>7.1f}  {bound:>15,.0f}  "
                    f"{served / bound:>5.2f}",
                    flush=True,
                )


def rate(embedder: FaceEmbedder, images: list[bytes], seconds: float) -> float:
    """Images a second of an embedder in this process, in batches of all of them."""
    embedder.embed(images, aligned=True)
    started, repeats = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        embedder.embed(images, aligned=True)
        repeats += 1
    return repeats * len(images) / (time.perf_counter() - started)


def resident(process: int) -> float:
    """Resident memory in MB."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024


def soak(model: Path, folder: Path, images: list[bytes], minutes: float) -> None:
    """Mixed requests of 8 clients, good and bad, and the server's memory meanwhile.

    A quarter of the requests change the gallery: each client enrols somebody and deletes them.
    """
    with server(model, folder / "soak.db", "--keep-crops") as (url, process):
        end = time.monotonic() + 60 * minutes
        counts: dict[int, int] = {}
        lock = threading.Lock()

        def count(status: int) -> None:
            with lock:
                counts[status] = counts.get(status, 0) + 1

        def work(number: int) -> None:
            client = Client(url)
            turn = number
            while time.monotonic() < end:
                image = images[turn % len(images)]
                incomplete = json.dumps({"aligned": True, "name": "nobody"}).encode()
                name = f"somebody-{number}"
                requests = [
                    ("POST", "/v1/embed", form("images", image), FORM),
                    ("POST", "/v1/embed", form("images", image, aligned="false"), FORM),
                    ("POST", "/v1/search", form("image", image), FORM),
                    ("GET", "/v1/people", None, ""),
                    ("POST", "/v1/embed", form("images", image[: len(image) // 2]), FORM),
                    ("POST", "/v1/people", incomplete, "application/json"),
                    ("POST", "/v1/people", form("images", image, name=name), FORM),
                    ("DELETE", f"/v1/people/{name}", None, ""),
                ]
                count(client.ask(*requests[turn // 8 % len(requests)]))
                turn += 8

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        memory = []
        started = time.monotonic()
        while time.monotonic() < end:
            memory.append((time.monotonic() - started, resident(process)))
            time.sleep(min(5.0, max(0.01, end - time.monotonic())))
        for thread in threads:
            thread.join()
        memory.append((time.monotonic() - started, resident(process)))
    total = sum(counts.values())
    listed = ", ".join(f"{count:,} × {status}" for status, count in sorted(counts.items()))
    print(f"soak: {minutes:g} min, {total:,} requests ({listed})")
    tenth = max(1, len(memory) // 10)
    for part in range(0, len(memory), tenth):
        seconds, megabytes = memory[part]
        print(f"  {seconds / 60:5.1f} min  {megabytes:7.1f} MB")
    settled = [value for second, value in memory if second >= 6 * minutes]  # past a tenth
    half = len(settled) // 2
    before, after = statistics.mean(settled[:half]), statistics.mean(settled[half:])
    print(
        f"  mean memory of the second half over the first, warm-up left out: {after / before:.3f}"
    )
    if any(status >= 500 for status in counts):
        sys.exit("the server failed")


FORM = "multipart/form-data; boundary=soak"


def form(field: str, image: bytes, **fields: str) -> bytes:
    """A form with an aligned image in ``field``, and other fields."""
    parts = [
        f'--soak\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in {"aligned": "true", **fields}.items()
    ]
    head = f'--soak\r\nContent-Disposition: form-data; name="{field}"; filename="x"\r\n\r\n'
    return b"".join(parts) + head.encode() + image + b"\r\n--soak--\r\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak", type=float, default=0, help="minutes of mixed requests")
    parser.add_argument("--seconds", type=float, default=4, help="of each measurement")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    network = backbones.build("sfnet20", width=0.25, input_size=64, batch_norm=True)
    images = [image for number in range(16) for image in person(0, number, 4)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = folder / "model"
        model.mkdir()
        bundle.save(network, model)
        if arguments.soak:
            soak(model, folder, images, arguments.soak)
        else:
            exported = export(model, to="onnx").path
            compare({"PyTorch": model, "ONNX Runtime": exported}, folder, images, arguments.seconds)


if __name__ == "__main__":
    main()
