"""Recognition over HTTP: a REST service and its web page, in one process.

Where things are:

- ``server``: binding, keys, signals, draining.
- ``connections``: how many may be open, and their deadlines.
- ``app``: puts the parts together into an ASGI application.
- ``routes``, ``schemas``, ``bodies``: the API; what it takes and gives; how a request is read.
- ``recogniser``, ``batching``: pictures to embeddings; many requests in one forward pass.
- ``people``: the gallery and the kept crops, as the API sees them.
- ``gate``, ``keys``, ``limits``: who may ask, from where, how much and how often.
- ``observer``, ``metrics``, ``audit``: what is recorded of each request.
- ``static/``: the page, served as it is.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from sphereface2.errors import UserError

_NEEDED = ("fastapi", "uvicorn", "python_multipart", "prometheus_client", "pymilvus")


def serve(checkpoint: str, gallery: str, *, device: str | None = None, **options: Any) -> None:
    """Serve until told to stop: `server.serve` with the fields of `app.Settings` as options.

    Raises:
        UserError: the packages of the service are not installed, or see `server.serve`.
    """
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        raise UserError(
            f"the service needs {', '.join(missing)}: install it with "
            "pip install 'sphereface2[serve]'"
        )
    from dataclasses import fields

    from sphereface2.recognition.service.app import Settings
    from sphereface2.recognition.service.server import serve as run

    limits = {f.name: options.pop(f.name) for f in fields(Settings) if f.name in options}
    run(checkpoint, gallery, device=device, settings=Settings(**limits), **options)
