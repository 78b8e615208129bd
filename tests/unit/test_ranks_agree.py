"""Ranks that were given different settings do not train."""

from __future__ import annotations

from typing import Any

import pytest

from sphereface2.errors import UserError
from sphereface2.training import config as configuration
from sphereface2.training.resuming import check_ranks


class Ranks:
    """The world as rank 1 sees it: it gathers what rank 0 gave before."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def gather(self, value: Any) -> list[Any]:
        self.given.append(value)
        return self.given


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"training": {"epochs": 3}}, r"training\.epochs is .* on rank 0 and 3.* on rank 1"),
        ({"head": {"name": "sphereface2", "m": 0.1}}, r"head\.m is 0\.4 on rank 0 and 0\.1"),
        ({"data": {"train": "elsewhere", "workers": 2}, "training": {"threads": 1}}, None),
    ],
)
def test_a_setting_that_differs_is_named(changed: dict[str, Any], told: str | None) -> None:
    ranks: Any = Ranks()
    check_ranks(ranks, configuration.from_dict({}), False)
    if told is None:
        check_ranks(ranks, configuration.from_dict(changed), False)
        return
    with pytest.raises(UserError, match=told):
        check_ranks(ranks, configuration.from_dict(changed), False)
