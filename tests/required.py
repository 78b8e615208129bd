"""What tests need beside Python's packages: skipped where it is missing, an error in CI."""

from __future__ import annotations

import os

import pytest


def needs(there: object, reason: str) -> pytest.MarkDecorator:
    """Skip tests unless something is ``there``; where ``CI`` is set, fail to collect them."""
    if not there and os.environ.get("CI"):
        raise RuntimeError(reason)
    return pytest.mark.skipif(not there, reason=reason)
