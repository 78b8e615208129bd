"""``sphereface2 serve`` and ``sphereface2 keys``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from sphereface2.errors import check_count, check_number
from sphereface2.extras import require
from sphereface2.recognition.service import keys as key_file


def serve(
    checkpoint: str,
    /,
    *,
    gallery: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    behind_proxy: bool = False,
    insecure: bool = False,
    allow_host: Sequence[str] = (),
    allow_origin: Sequence[str] = (),
    keep_crops: bool = False,
    quality: Literal["refuse", "warn", "off"] = "warn",
    audit: Path | None = None,
    far: float | None = None,
    max_batch: int = 32,
    max_wait_ms: float = 5.0,
    max_queue: int = 128,
    max_body_mb: float = 20.0,
    max_megapixels: float = 50.0,
    rate: float = 50.0,
    drain_seconds: float = 5.0,
    device: str | None = None,
) -> None:
    """Serve a model and a gallery: REST API and web page.

    Args:
        checkpoint: A run, a model folder or a name on the hub.
        gallery: File of the gallery, or the address of its PostgreSQL server.
        host: Address to bind. Any but a loopback address needs `--keys`, and `--behind-proxy` or
            `--insecure`.
        port: Port to bind; 0 takes a free one.
        keys: File of the API keys that are accepted.
        behind_proxy: A proxy stands before the service: take the clients' addresses from its
            headers. Nobody else may reach the port.
        insecure: Bind an address that other machines reach, without a proxy and without TLS.
        allow_host: Host name that requests may use; repeatable.
        allow_origin: Origin of another site whose pages may call the API, such as
            https://intranet.example; repeatable.
        keep_crops: Store the aligned faces of enrolled people in the gallery, as thumbnails.
        quality: What happens to a small, blurred or turned face at enrolment and verification.
        audit: File of the audit log; default: standard output.
        far: False accept rate to decide at; default: the calibration's first.
        max_batch: Maximum number of faces in one forward pass.
        max_wait_ms: Maximum batching delay in milliseconds.
        max_queue: Maximum number of images in work; further requests get status 503.
        max_body_mb: Maximum size of a request in megabytes.
        max_megapixels: Maximum size of an image in megapixels.
        rate: Maximum requests per second of one client, on average over ten seconds; 0: no limit.
        drain_seconds: Seconds between SIGTERM and the end, in which requests are still served.
        device: "cpu", "cuda" or "mps"; default: the best there is.

    Raises:
        UserError: a value out of range, an address that is open and unprotected, a foreign
            gallery, or the service's packages are not installed.
    """
    require("services", "fastapi", "fastapi_offline", "uvicorn", "python_multipart")
    require("services", "prometheus_client", "limits")
    check_number("--port", port, least=0, most=65535)
    check_count("--max-batch", max_batch, 1)
    check_count("--max-queue", max_queue, 1)
    check_number("--max-wait-ms", max_wait_ms, least=0)
    check_number("--max-body-mb", max_body_mb, least=0.001)
    # Pillow refuses images of more than 178 megapixels.
    check_number("--max-megapixels", max_megapixels, least=0.001, most=178)
    check_number("--rate", rate, least=0)
    check_number("--drain-seconds", drain_seconds, least=0)
    from sphereface2.recognition.gallery.quality import Gate
    from sphereface2.recognition.service.app import Settings
    from sphereface2.recognition.service.server import serve as run

    run(
        checkpoint,
        gallery,
        host=host,
        port=port,
        keys=keys,
        behind_proxy=behind_proxy,
        insecure=insecure,
        allow_hosts=allow_host,
        allow_origins=allow_origin,
        audit=audit,
        drain_seconds=drain_seconds,
        device=device,
        settings=Settings(
            far=far,
            max_batch=max_batch,
            max_wait=max_wait_ms / 1000,
            max_queue=max_queue,
            max_body=int(max_body_mb * 1e6),
            max_pixels=int(max_megapixels * 1e6),
            rate=rate,
            keep_crops=keep_crops,
            quality=Gate(action=quality),
        ),
    )


def add_key(name: str, /, *, file: Path) -> None:
    """Make an API key and print it; the file holds only its hash.

    Args:
        name: Who will use the key.
        file: Key file; it is made if it does not exist.
    """
    print(key_file.add(name, file))


def list_keys(*, file: Path) -> None:
    """List the ids, names and creation times of API keys.

    Args:
        file: Key file.
    """
    for key in key_file.read(file):
        print(f"{key.id}  {key.created}  {key.name}")


def remove_key(name: str, /, *, file: Path) -> None:
    """Remove an API key; a running server refuses it at once.

    Args:
        name: Name or id of the key.
        file: Key file.
    """
    key_file.remove(name, file)
