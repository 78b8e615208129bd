"""What results of every kind are made of, and how they become JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any

import numpy as np

from sphereface2.evaluation.bootstrap import LEVEL, Bootstrap, Interval

FLAT = {"flat": True}
"""Metadata of a field of `Rate`s that become a JSON key each: ``rank`` at 5 is ``rank5``."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval.

    Attributes:
        value: the figure on the set as it is.
        ci: (low, high) of its 95 % interval, or None.
    """

    value: float
    ci: Interval | None = None


@dataclass(frozen=True)
class Rate:
    """A share under one condition.

    Attributes:
        at: the condition: a FAR, an FPIR, a rank, or a number of distractors.
        value: in [0, 1]; None where the set is too small to measure it.
        ci: (low, high) of its 95 % interval, or None.
    """

    at: float
    value: float | None
    ci: Interval | None = None


@dataclass(frozen=True)
class OperatingPoint(Rate):
    """A TAR at a FAR, or a TPIR at an FPIR.

    Attributes:
        threshold: the smallest observed score at which the error rate is at most ``at``; None where
            the set is too small or no score qualifies.
    """

    threshold: float | None = None


@dataclass(frozen=True)
class Resampling:
    """How intervals were made.

    Attributes:
        over: "people" or "pairs", what was resampled.
        replicates: how many resamples counted.
        seed: of the resampling.
        level: coverage of the intervals.
        thresholds: "fixed" where they were given and resamples kept them; "first order" where each
            resample had its own, to first order; None where each found its own.
    """

    over: str
    replicates: int
    seed: int
    level: float = LEVEL
    thresholds: str | None = None

    @classmethod
    def of(cls, bootstrap: Bootstrap, thresholds: str) -> Resampling | None:
        """Over people; None without resamples."""
        return cls("people", *bootstrap, thresholds=thresholds) if bootstrap.replicates else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the results of every kind of set have.

    Attributes:
        name: of the set.
        notes: what could not be measured, and what makes figures doubtful.
        intervals: how those of the figures were made, or None.
        plots: files written.
        path: where the set lies.
        condition: that its images were put under, see `data.hardening`; None: as they are.
    """

    name: str
    notes: list[str]
    intervals: Resampling | None = None
    plots: tuple[str, ...] = ()
    path: str | None = None
    condition: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, see `to_dict`."""
        return to_dict(self)


@dataclass(frozen=True, kw_only=True)
class PairsVerified(Result):
    """Verification of pairs: their numbers, and TAR at each FAR."""

    genuine: int
    impostor: int
    tar: tuple[OperatingPoint, ...]

    @property
    def pairs(self) -> int:
        """Number of pairs of both kinds."""
        return self.genuine + self.impostor

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with ``pairs``."""
        return {"pairs": self.pairs, **super().to_dict()}


def least_far(impostor: float, asked: float) -> float:
    """The FAR to take the logarithm of where none of so many pairs was accepted.

    Half a pair, or the share asked for where that is less: a set too small to tell is no reproach.
    """
    return min(0.5 / impostor, asked)


def far_key(far: float) -> str:
    """The spelling of a FAR, an FPIR or a count in reports.

    Examples:
        >>> far_key(0.001), far_key(2.5e-4), far_key(100)
        ('1e-3', '2.5e-4', '100')
    """
    if isinstance(far, int):
        return str(far)
    mantissa, exponent = f"{far:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def unmeasured(figure: str, rates: Sequence[Rate], count: int, kind: str) -> list[str]:
    """The note on rates that are None, if there are any.

    Examples:
        >>> unmeasured("TAR at FAR", [Rate(0.1, 0.9), Rate(0.01, None)], 50, "impostor pairs")
        ['TAR at FAR 1e-2 and below cannot be measured with 50 impostor pairs']
    """
    missing = [rate.at for rate in rates if rate.value is None]
    if not missing:
        return []
    return [f"{figure} {far_key(max(missing))} and below cannot be measured with {count:,} {kind}"]


def to_dict(result: Any) -> dict[str, Any]:
    """A result as JSON has it.

    A field with a default is left out while it is None or empty. An `Estimate` x becomes ``x`` and
    ``x_ci``; several `Rate`s become ``x``, ``x_threshold`` and ``x_ci``, each an object by the
    rates' conditions. Where a result has ``intervals`` that are None, there is no ``_ci``.

    Examples:
        >>> to_dict(OperatingPoint(0.1, 0.8, (0.7, 0.9), 0.25))
        {'at': 0.1, 'value': 0.8, 'ci': [0.7, 0.9], 'threshold': 0.25}
    """
    found: dict[str, Any] = {}
    resampled = getattr(result, "intervals", None) is not None
    for field in fields(result):
        value = getattr(result, field.name)
        if field.default is not MISSING and (value is None or value == ()):
            continue
        found |= _entries(field.name, value, resampled, field.metadata.get("flat", False))
    return found


def _entries(name: str, value: Any, resampled: bool, flat: bool) -> dict[str, Any]:
    if isinstance(value, Estimate):
        found = {name: value.value}
        return found | {f"{name}_ci": _plain(value.ci)} if resampled else found
    if not (isinstance(value, tuple) and value and isinstance(value[0], Rate)):
        return {name: _plain(value)}
    parts = {"": [rate.value for rate in value]}
    if isinstance(value[0], OperatingPoint):
        parts["_threshold"] = [point.threshold for point in value]
    if resampled:
        parts["_ci"] = [_plain(rate.ci) for rate in value]
    keys = [far_key(rate.at) for rate in value]
    if flat:
        return {
            f"{name}{at}{part}": one
            for part, values in parts.items()
            for at, one in zip(keys, values, strict=True)
        }
    return {f"{name}{part}": dict(zip(keys, v, strict=True)) for part, v in parts.items()}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return value.to_dict() if hasattr(value, "to_dict") else to_dict(value)
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, dict):
        return {_key(name): _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, tuple | list) else value


def _key(name: Any) -> str:
    return far_key(name) if isinstance(name, float) else str(name)
