"""The service's settings: the options of ``sphereface2 serve``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from sphereface2.errors import UserError, check_count, check_number


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the service is reached, what it decides by, and its limits.

    Attributes:
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
        rotations: Where no face is found, turn the image by 90°, 180° and 270°.
        audit: File of the audit log; default: standard output.
        far: False accept rate to decide at; default: the calibration's first.
        max_batch: Maximum number of faces in one forward pass.
        max_wait_ms: Maximum batching delay in milliseconds.
        max_queue: Maximum number of images in work; further requests get status 503.
        max_images: Maximum number of images in a request.
        max_body_mb: Maximum size of a request in megabytes.
        max_megapixels: Maximum size of an image in megapixels.
        rate: Maximum requests per second of one client, on average over ten seconds; 0: no limit.
        drain_seconds: Seconds between SIGTERM and the end, in which requests are still served.
        device: "cpu", "cuda" or "mps"; default: the best there is.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Path | None = None
    behind_proxy: bool = False
    insecure: bool = False
    allow_host: Sequence[str] = ()
    allow_origin: Sequence[str] = ()
    keep_crops: bool = False
    quality: Literal["refuse", "warn", "off"] = "warn"
    rotations: bool = False
    audit: Path | None = None
    far: float | None = None
    max_batch: int = 16
    max_wait_ms: float = 5.0
    max_queue: int = 128
    max_images: int = 16
    max_body_mb: float = 20.0
    max_megapixels: float = 50.0
    rate: float = 50.0
    drain_seconds: float = 5.0
    device: str | None = None

    def __post_init__(self) -> None:
        check_number("--port", self.port, least=0, most=65535)
        check_count("--max-batch", self.max_batch, 1)
        check_count("--max-images", self.max_images, 1)
        check_number("--max-wait-ms", self.max_wait_ms, least=0)
        check_number("--max-body-mb", self.max_body_mb, least=0.001)
        # Pillow refuses images of more than 178 megapixels.
        check_number("--max-megapixels", self.max_megapixels, least=0.001, most=178)
        check_number("--rate", self.rate, least=0)
        check_number("--drain-seconds", self.drain_seconds, least=0)
        check_count("--max-queue", self.max_queue, 1)
        for host in self.allow_host:
            if not re.fullmatch(r"(\*\.)?[\w.-]+|\*|\[?[\da-fA-F:]+\]?", host):
                raise UserError(f"--allow-host takes a name such as faces.example, got {host!r}")
        for origin in self.allow_origin:
            if not re.fullmatch(r"\w+://[^/\s]+|\*|null", origin):
                raise UserError(
                    "--allow-origin takes an origin such as https://intranet.example, got "
                    f"{origin!r}"
                )
        if self.max_queue < self.max_images:
            raise UserError(
                f"--max-queue {self.max_queue} is less than the {self.max_images} images that one "
                "request may hold (--max-images): give at least as many"
            )

    @property
    def max_pixels(self) -> int:
        """Pixels of an image."""
        return int(self.max_megapixels * 1e6)
