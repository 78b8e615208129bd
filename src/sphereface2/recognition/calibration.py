"""From a similarity to a decision: log-likelihood ratios, probabilities and thresholds.

A cosine means nothing by itself: what 0.4 says depends on the network. A calibration is fitted on
pairs whose truth is known and lies as ``calibration.json`` beside the network it belongs to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np

from sphereface2.backbones import bundle
from sphereface2.errors import UserError
from sphereface2.evaluation.verification import (
    LEVEL,
    allowed_accepts,
    check_both,
    far_key,
    tar_at_far,
)
from sphereface2.files import atomic_write
from sphereface2.recognition.fingerprint import fingerprint_of
from sphereface2.version import __version__

FILE = "calibration.json"
FORMAT = "sphereface2-calibration"
FORMAT_VERSION = 1
#: How many false accepts a threshold must rest on: it then allows the FAR within about a third.
FALSE_ACCEPTS = 10
_CHUNK = 16_000_000  # numbers that a bootstrap holds at a time

Method = Literal["logistic", "isotonic"]


@dataclass(frozen=True)
class Threshold:
    """Where to accept for one FAR.

    Attributes:
        far: the FAR wanted.
        threshold: accept a similarity of at least this; the smallest score of the pairs at which
            their FAR is at most ``far``.
        ci: bootstrap interval of ``threshold``, 95 %, in similarity.
        far_ci: interval of the FAR at ``threshold``.
        tar: share of the matched pairs accepted there.
        impostors: mismatched pairs it was found on.
    """

    far: float
    threshold: float
    ci: tuple[float, float]
    far_ci: tuple[float, float]
    tar: float
    impostors: int


@dataclass(frozen=True)
class Calibration:
    """What a similarity of one network is worth.

    The log-likelihood ratio is the natural logarithm of how much likelier a similarity is for two
    pictures of one person than for two people; it holds whatever the share of matched pairs is,
    and `probability` adds the share that is expected.

    Attributes:
        fingerprint: of the network, see `sphereface2.recognition.fingerprint`.
        method: "logistic", a straight line, or "isotonic", any rising curve.
        scores: float64 (K,), rising similarities at which the curve is given.
        llrs: float64 (K,), the log-likelihood ratio there. Straight between; beyond the ends
            straight on for "logistic" (K = 2), constant for "isotonic".
        thresholds: by FAR, in the order asked for.
        data: what it was fitted on: name, pairs, matched, mismatched, people and fingerprint of
            each set.
        intervals: what was resampled ("people" or "pairs"), how often, the seed, the level.
    """

    fingerprint: str
    method: Method
    scores: np.ndarray
    llrs: np.ndarray
    thresholds: Mapping[float, Threshold]
    data: Sequence[Mapping[str, Any]] = ()
    intervals: Mapping[str, Any] = field(default_factory=dict)

    @property
    def far_default(self) -> float:
        """The FAR of a decision when none is named: the first that was asked for."""
        return next(iter(self.thresholds))

    def llr(self, scores: np.ndarray | float) -> np.ndarray:
        """Log-likelihood ratio of each similarity, natural logarithm; float64, same shape."""
        scores = np.asarray(scores, np.float64)
        if self.method == "isotonic":
            return np.interp(scores, self.scores, self.llrs)
        (s0, s1), (l0, l1) = self.scores, self.llrs
        return l0 + (scores - s0) * ((l1 - l0) / (s1 - s0))

    def probability(self, scores: np.ndarray | float, prior: float = 0.5) -> np.ndarray:
        """Probability that a pair shows one person; float64, same shape.

        Args:
            scores: similarities.
            prior: share of matched pairs among those to be judged, in (0, 1).
        """
        if not 0 < prior < 1:
            raise UserError(f"the prior must lie between 0 and 1, not {prior}")
        odds = self.llr(scores) + math.log(prior / (1 - prior))
        # Each half where its exponential cannot overflow.
        e = np.exp(-np.abs(odds))
        return np.where(odds >= 0, 1, e) / (1 + e)

    def threshold(self, far: float | None = None) -> float:
        """The similarity from which to accept at ``far``, by default at `far_default`.

        Raises:
            UserError: the calibration has no threshold for this FAR.
        """
        wanted = self.far_default if far is None else far
        for known, found in self.thresholds.items():
            if math.isclose(known, wanted, rel_tol=1e-9):
                return found.threshold
        raise UserError(
            f"this calibration has no threshold for a FAR of {wanted:g}, it has "
            f"{', '.join(map(far_key, self.thresholds))}: repeat sphereface2 calibrate with "
            f"--far {wanted:g}"
        )

    @classmethod
    def fit(
        cls,
        scores: np.ndarray,
        same: np.ndarray,
        *,
        fingerprint: str,
        fars: Sequence[float] = (1e-2,),
        method: str = "logistic",
        people: np.ndarray | None = None,
        data: Sequence[Mapping[str, Any]] = (),
        replicates: int = 1000,
        seed: int = 0,
    ) -> Calibration:
        """Fit on pairs whose truth is known.

        Matched and mismatched pairs count as half of the whole each, so their numbers do not
        matter. "logistic": Platt's regression. "isotonic": the pool-adjacent-violators algorithm,
        after one matched pair was added below all scores and one mismatched above, so that nothing
        is ever certain.

        Args:
            scores: (P,) similarities.
            same: bool (P,).
            fingerprint: of the network that gave the scores.
            fars: where thresholds are wanted, each in (0, 1); the first is the default.
            method: "logistic" or "isotonic".
            people: int (P, 2), the identities of each pair, over which intervals are bootstrapped;
                None resamples pairs, which makes them too narrow where pairs share people.
            data: what the pairs are, to be stored.
            replicates: number of resamples.
            seed: of the resampling.

        Raises:
            UserError: a FAR too small for the number of mismatched pairs (it must allow
                `FALSE_ACCEPTS` of them), an unknown method, one kind of pair only, or similarities
                that are no higher for matched pairs.
        """
        if method not in get_args(Method):
            raise UserError(f"--method must be logistic or isotonic, not {method!r}")
        scores, same = check_both(scores, same)
        fars = list(dict.fromkeys(float(far) for far in fars))
        check_fars(fars, int((~same).sum()))
        curve = {"logistic": _logistic, "isotonic": _isotonic}[method]
        knots, llrs = curve(scores, same)
        if not llrs[-1] > llrs[0]:
            raise UserError(
                "the similarities of matched pairs are no higher than those of mismatched ones: "
                "is the network trained, and is the list of pairs right?"
            )
        return cls(
            fingerprint=fingerprint,
            method=cast(Method, method),
            scores=knots,
            llrs=llrs,
            thresholds=_thresholds(scores, same, fars, people, replicates, seed),
            data=tuple(data),
            intervals={
                "level": LEVEL,
                "over": "pairs" if people is None else "people",
                "replicates": replicates,
                "seed": seed,
            },
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "model": self.fingerprint,
            "method": self.method,
            "scores": self.scores.tolist(),
            "llrs": self.llrs.tolist(),
            "thresholds": [asdict(found) for found in self.thresholds.values()],
            "data": [dict(one) for one in self.data],
            "intervals": dict(self.intervals),
        }

    def save(self, network: str | Path) -> Path:
        """Write it beside a network, whole or not at all; returns the file.

        Args:
            network: a model folder, for ``calibration.json`` in it, or an exported ``X.onnx``, for
                ``X.calibration.json`` beside it.

        Raises:
            UserError: the folder cannot be written.
        """
        path = _file_of(Path(network))
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        try:
            atomic_write(path, text.encode())
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        return path

    @classmethod
    def load(cls, network: str | Path, *, fingerprint: str | None = None) -> Calibration | None:
        """The calibration beside a network, or None where there is none.

        Args:
            network: a bundle, a run or an exported ``.onnx`` file; the last has its own
                calibration, or that of the checkpoint in whose folder it lies, if they compute the
                same.
            fingerprint: of the network there, where the caller knows it; else it is computed.

        Raises:
            UserError: the file is damaged, or belongs to another network.
        """
        network = bundle.resolve(network).resolve()
        path, borrowed = _file_of(network), False
        if not path.exists() and network.suffix == ".onnx":
            path, borrowed = network.with_name(FILE), True
        if not path.exists():
            return None
        found = _read(path)
        if found.fingerprint != (fingerprint or fingerprint_of(network)):
            if borrowed:
                return None
            raise UserError(
                f"{path} belongs to another network than the one beside it: delete it, or "
                "overwrite it with sphereface2 calibrate"
            )
        return found


def _file_of(network: Path) -> Path:
    if network.suffix == ".onnx":
        return network.with_suffix(f".{FILE}")
    return network / FILE


def pairs_needed(far: float) -> int:
    """Mismatched pairs that a threshold for ``far`` needs: enough for `FALSE_ACCEPTS`."""
    needed = math.ceil(FALSE_ACCEPTS / far)
    while allowed_accepts(far, needed) < FALSE_ACCEPTS:
        needed += 1
    while allowed_accepts(far, needed - 1) >= FALSE_ACCEPTS:
        needed -= 1
    return needed


def check_fars(fars: Sequence[float], impostors: int) -> None:
    """UserError unless so many mismatched pairs can tell a threshold for each FAR."""
    if not fars:
        raise UserError("a calibration needs a FAR: give --far, for example --far 1e-2")
    for far in fars:
        if not 0 < far < 1:
            raise UserError(f"a FAR lies between 0 and 1, not at {far:g}")
        if allowed_accepts(far, impostors) < FALSE_ACCEPTS:
            raise UserError(
                f"{impostors:,} mismatched pairs are too few for a FAR of {far_key(far)}: "
                f"{pairs_needed(far):,} are needed, so that at least {FALSE_ACCEPTS} are accepted "
                "by mistake; give more pairs (--all-pairs makes the most of a set) or a larger "
                "--far"
            )


# --- curves --------------------------------------------------------------------------------------


def _logistic(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two points of the line that minimises the balanced cross-entropy, with Platt's targets."""
    from scipy.optimize import minimize

    centre, spread = scores.mean(), scores.std() or 1.0
    x = (scores - centre) / spread
    matched, mismatched = int(same.sum()), int((~same).sum())
    weight = np.where(same, 0.5 / matched, 0.5 / mismatched)
    # Platt's targets, a little off 1 and 0, keep the slope finite where the two kinds part.
    target = np.where(same, (matched + 1) / (matched + 2), 1 / (mismatched + 2))

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        z = line[0] * x + line[1]
        e = np.exp(-np.abs(z))
        p = np.where(z >= 0, 1, e) / (1 + e)
        error = weight * (p - target)
        value = weight @ (np.log1p(e) + np.maximum(z, 0) - target * z)
        return float(value), np.array([error @ x, error.sum()])

    def curvature(line: np.ndarray) -> np.ndarray:
        e = np.exp(-np.abs(line[0] * x + line[1]))
        w = weight * e / (1 + e) ** 2
        return np.array([[w @ x**2, w @ x], [w @ x, w.sum()]])

    found = minimize(
        loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10}
    )
    low, high = float(scores.min()), float(scores.max())
    knots = np.array([low, high if high > low else low + 1.0])
    return knots, found.x[0] * (knots - centre) / spread + found.x[1]


def _isotonic(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.isotonic import IsotonicRegression

    low, high = float(scores.min()), float(scores.max())
    # A pair against the trend at either end keeps the ends finite.
    x = np.concatenate([[low], scores, [high]])
    y = np.concatenate([[True], same, [False]])
    weight = np.where(y, 0.5 / y.sum(), 0.5 / (~y).sum())
    regression = IsotonicRegression(y_min=0, y_max=1).fit(x, y.astype(np.float64), weight)
    knots, p = regression.X_thresholds_, regression.y_thresholds_
    if len(knots) == 1:
        knots, p = np.array([low, low + 1.0]), p.repeat(2)
    return knots, np.log(p) - np.log1p(-p)


# --- thresholds ----------------------------------------------------------------------------------


def _thresholds(
    scores: np.ndarray,
    same: np.ndarray,
    fars: Sequence[float],
    people: np.ndarray | None,
    replicates: int,
    seed: int,
) -> dict[float, Threshold]:
    """The threshold of each FAR with its intervals.

    The bootstrap is that of `verification.bootstrap`: people are drawn with replacement, and a
    mismatched pair (a, b) counts as often as the product of the counts of a and b. Only the
    highest scores can become a threshold, so the others are counted and not sorted.
    """
    from scipy.sparse import coo_matrix

    impostors = scores[~same]
    count = len(impostors)
    order = np.argsort(-impostors, kind="stable")
    if people is None:
        first, second, units = order, None, count
    else:
        drawn = np.unique(people[~same], return_inverse=True)[1].reshape(-1, 2)
        units = int(drawn.max()) + 1
        first, second = drawn[order].T
        ones = np.ones(count)
        pairs_of = coo_matrix((ones, (drawn[:, 0], drawn[:, 1])), (units, units)).tocsr()
    # Far more than a resample accepts at the largest FAR; the whole where the set is small.
    tail = min(count, 4 * allowed_accepts(max(fars), count) + 1000)
    top = impostors[order[:tail]]
    last = np.flatnonzero(np.append(top[1:] != top[:-1], True))
    points = tar_at_far(scores, same, fars)
    limits = [float(point.threshold) if point.threshold is not None else np.inf for point in points]
    # The next score above each mismatched one, which is the threshold that rejects it.
    ordered = np.sort(scores)
    following = np.searchsorted(ordered, np.append(top[last], top[-1]), side="right")
    above = ordered[np.minimum(following, len(ordered) - 1)]
    rng = np.random.default_rng(seed)
    chunk = max(1, _CHUNK // max(tail, units))
    drawn_limits: list[np.ndarray] = []
    drawn_fars: list[np.ndarray] = []
    for start in range(0, replicates, chunk):
        size = min(chunk, replicates - start)
        counts = np.stack(
            [np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(size)], 1
        ).astype(np.float64)
        if second is None:
            total = counts.sum(0)
            weights = counts[first[:tail]]
        else:
            total = (counts * (pairs_of @ counts)).sum(0)
            weights = counts[first[:tail]] * counts[second[:tail]]
        accepted = np.cumsum(weights, axis=0)
        far_at = np.concatenate([np.zeros((1, size)), accepted[last]]) / np.maximum(total, 1)
        drawn_limits.append(np.stack([above[(far_at <= far).sum(0) - 1] for far in fars]))
        within = [int((top >= limit).sum()) for limit in limits]
        zero = np.concatenate([np.zeros((1, size)), accepted])
        drawn_fars.append(np.stack([zero[k] / np.maximum(total, 1) for k in within]))
    bounds = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
    limit_ci = np.quantile(np.concatenate(drawn_limits, 1), bounds, axis=1).T
    far_ci = np.quantile(np.concatenate(drawn_fars, 1), bounds, axis=1).T
    return {
        point.far: Threshold(
            point.far,
            limit,
            (float(ci[0]), float(ci[1])),
            (float(fci[0]), float(fci[1])),
            float(point.tar or 0),
            count,
        )
        for point, limit, ci, fci in zip(points, limits, limit_ci, far_ci, strict=True)
    }


# --- reading -------------------------------------------------------------------------------------


def _read(path: Path) -> Calibration:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError("its format is another one")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {content['format_version']!r}")
        scores, llrs = (np.array(content[key], np.float64) for key in ("scores", "llrs"))
        if content["method"] not in get_args(Method):
            raise ValueError(f"its method is {content['method']!r}")
        if (
            scores.ndim != 1
            or scores.shape != llrs.shape
            or len(scores) < 2
            or (content["method"] == "logistic" and len(scores) != 2)
            or not np.isfinite([scores, llrs]).all()
            or not (np.diff(scores) > 0).all()
            or not (np.diff(llrs) >= 0).all()
        ):
            raise ValueError("its curve does not rise")
        thresholds = [
            Threshold(
                float(one["far"]),
                float(one["threshold"]),
                (float(one["ci"][0]), float(one["ci"][1])),
                (float(one["far_ci"][0]), float(one["far_ci"][1])),
                float(one["tar"]),
                int(one["impostors"]),
            )
            for one in content["thresholds"]
        ]
        if not thresholds:
            raise ValueError("it has no threshold")
        return Calibration(
            fingerprint=str(content["model"]),
            method=content["method"],
            scores=scores,
            llrs=llrs,
            thresholds={one.far: one for one in thresholds},
            data=tuple(dict(one) for one in content["data"]),
            intervals=dict(content["intervals"]),
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        reason = f"{error!s:.100}" if not isinstance(error, KeyError) else f"it lacks {error}"
        raise UserError(
            f"{path} is damaged ({reason}): delete it, or overwrite it with sphereface2 calibrate"
        ) from error
