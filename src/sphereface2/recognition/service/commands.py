"""``sphereface2 serve`` and ``sphereface2 keys``."""

from __future__ import annotations

from pathlib import Path

from sphereface2 import console
from sphereface2.extras import require
from sphereface2.recognition.box import chosen
from sphereface2.recognition.service import keys as key_file
from sphereface2.recognition.service.settings import Settings


def serve(
    checkpoint: str | None = None, /, *, gallery: str, settings: Settings | None = None
) -> None:
    """Serve a model and a gallery: REST API and web page.

    Args:
        checkpoint: A run, a model folder, an exported .onnx file or a name on the hub; default:
            the model that comes with the package.
        gallery: File of the gallery, or the address of its PostgreSQL server.
        settings: How it is reached, what it decides by, and its limits.

    Raises:
        UserError: a value out of range, an address that is open and unprotected, a foreign
            gallery, or the service's packages are not installed.
    """
    require("services", "fastapi", "fastapi_offline", "uvicorn", "python_multipart")
    require("services", "prometheus_client", "limits")
    from sphereface2.recognition.service.server import run

    run(chosen(checkpoint), gallery, settings or Settings())


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
        console.show(f"{key.id}  {key.created}  {key.name}")


def remove_key(name: str, /, *, file: Path) -> None:
    """Remove an API key; a running server refuses it at once.

    Args:
        name: Name or id of the key.
        file: Key file.
    """
    for key in key_file.remove(name, file):
        console.show(f"removed {key.id}  {key.created}  {key.name}")
