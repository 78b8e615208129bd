"""Packages that only some uses need, the extras that bring them, and one sentence without them."""

from __future__ import annotations

import importlib

from sphereface2.errors import UserError

EXTRAS = {
    "matplotlib": "plots",
    "tensorboard": "tensorboard",
    "huggingface_hub": "hub",
    "timm": "timm",
    "pillow_heif": "heif",
    "onnx": "export",
    "onnxscript": "export",
    "psycopg": "postgresql",
    "pgvector": "postgresql",
    "fastapi": "serve",
    "fastapi_offline": "serve",
    "uvicorn": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
    "limits": "serve",
    "ray": "ray",
    "jinja2": "study",
}
"""Modules, and the extras of this package that install them."""


def require(purpose: str, *modules: str) -> None:
    """Import modules that an extra installs, for an import statement that follows.

    Args:
        purpose: what needs them, in the plural, for the message.
        modules: some of `EXTRAS`.

    Raises:
        UserError: one of them cannot be imported.

    Examples:
        >>> require("plots", "matplotlib")
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise UserError(
                f"{purpose} need {module}, which cannot be imported ({error}): "
                f"pip install 'sphereface2[{EXTRAS[module]}]'"
            ) from error
