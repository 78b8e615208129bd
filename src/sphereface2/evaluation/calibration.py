"""From a similarity to a decision: log-likelihood ratios, probabilities and thresholds.

A cosine means nothing by itself: what 0.4 means depends on the network. A calibration is fitted on
pairs whose truth is known and lies as ``calibration.json`` beside the network it belongs to.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from sphereface2.errors import UserError, check_choice
from sphereface2.evaluation.bootstrap import USUAL, Bootstrap
from sphereface2.evaluation.one_threshold import CheckedSet
from sphereface2.evaluation.results import Resampling, far_key, to_dict
from sphereface2.evaluation.thresholds import Threshold, check_fars, find_thresholds
from sphereface2.evaluation.verification import check_both
from sphereface2.files import atomic_write, writing
from sphereface2.version import __version__

FILE = "calibration.json"
FORMAT = "sphereface2-calibration"
FORMAT_VERSION = 1

Method = Literal["logistic", "isotonic"]
Images = Literal["crops", "aligned", "photographs"]


@dataclass(frozen=True)
class CalibrationSet:
    """A set of pairs that a calibration was fitted on.

    Attributes:
        name: of the set.
        pairs: ``genuine`` and ``impostor`` ones.
        people: whom they show; None where unknown.
        fingerprint: of the set, see `PairSet.fingerprint` and `Source.fingerprint`.
        unreadable: images left out; None where none could be.
    """

    name: str
    pairs: int
    genuine: int
    impostor: int
    people: int | None
    fingerprint: str
    unreadable: int | None = None

    @classmethod
    def of(
        cls,
        name: str,
        same: np.ndarray,
        people: np.ndarray | None,
        fingerprint: str,
        unreadable: int | None = None,
    ) -> CalibrationSet:
        """The set of pairs with the truth ``same`` (P,) and the ``people`` (P, 2) in them."""
        genuine = int(same.sum())
        who = None if people is None else len(np.unique(people))
        return cls(name, len(same), genuine, len(same) - genuine, who, fingerprint, unreadable)


@dataclass(frozen=True)
class Calibration:
    """What a similarity of one network means.

    The log-likelihood ratio is the natural logarithm of how much likelier a similarity is for two
    images of one person than for images of two people; it holds whatever the share of genuine pairs
    is, and `probability` adds the share that is expected.

    Attributes:
        fingerprint: of the network.
        method: "logistic", a straight line, or "isotonic", any rising curve.
        scores: float64 (K,), rising similarities at which the curve is given.
        llrs: float64 (K,), the log-likelihood ratio there. Straight between; beyond the ends
            straight on for "logistic" (K = 2), constant for "isotonic".
        thresholds: by FAR, in the order asked for.
        data: the sets that it was fitted on.
        intervals: how those of the thresholds were made.
        images: "crops" as they were given, "aligned" crops of photographs, or whole
            "photographs"; None where an older version did not record it.
        checked: sets that the thresholds were checked on.
    """

    fingerprint: str
    method: Method
    scores: np.ndarray
    llrs: np.ndarray
    thresholds: Mapping[float, Threshold]
    data: Sequence[CalibrationSet]
    intervals: Resampling
    images: Images | None = None
    checked: Sequence[CheckedSet] = ()

    @property
    def far_default(self) -> float:
        """The FAR of a decision when none is named: the first that was asked for."""
        return next(iter(self.thresholds))

    @property
    def fitted_on(self) -> set[str]:
        """Fingerprints of the sets that it was fitted on."""
        return {one.fingerprint for one in self.data}

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
            prior: share of genuine pairs among those to be judged, in (0, 1).
        """
        from scipy.special import expit

        if not 0 < prior < 1:
            raise UserError(f"the prior must lie between 0 and 1, got {prior}")
        return np.asarray(expit(self.llr(scores) + math.log(prior / (1 - prior))))

    def threshold(self, far: float | None = None) -> float:
        """The similarity from which to accept at ``far``, by default at `far_default`.

        Raises:
            UserError: the calibration has no threshold for this FAR.
        """
        wanted = self.far_default if far is None else far
        if not 0 < wanted < 1:
            raise UserError(f"a FAR must lie between 0 and 1, got {wanted:g}")
        for known, found in self.thresholds.items():
            if math.isclose(known, wanted, rel_tol=1e-9):
                return found.threshold
        raise UserError(
            f"this calibration has no threshold for a FAR of {far_key(wanted)}, it has "
            f"{', '.join(map(far_key, sorted(self.thresholds, reverse=True)))}: choose one of "
            f"these, or repeat sphereface2 calibrate with --far {far_key(wanted)}"
        )

    def check_for_crops(self) -> None:
        """UserError if it was fitted on whole photographs, whose similarities are others."""
        if self.images == "photographs":
            raise UserError(
                "the model's calibration was fitted on whole photographs, and here crops of faces "
                "are compared: repeat sphereface2 calibrate with --align"
            )

    @classmethod
    def fit(
        cls,
        scores: np.ndarray,
        same: np.ndarray,
        *,
        fingerprint: str,
        fars: Sequence[float] = (1e-2,),
        method: Method = "logistic",
        people: np.ndarray | None = None,
        data: Sequence[CalibrationSet] = (),
        images: Images | None = None,
        bootstrap: Bootstrap = USUAL,
    ) -> Calibration:
        """Fit on pairs whose truth is known.

        Genuine and impostor pairs count as half of the whole each, so their numbers do not matter.
        "logistic": Platt's regression. "isotonic": the pool-adjacent-violators algorithm, after one
        genuine pair was added below all scores and one impostor pair above, so that nothing is ever
        certain.

        Args:
            scores: (P,) similarities.
            same: bool (P,), True for genuine pairs.
            fingerprint: of the network that gave the scores.
            fars: where thresholds are wanted, each in (0, 1); the first is the default.
            method: "logistic" or "isotonic".
            people: int (P, 2), the identities of each pair, over which intervals are bootstrapped;
                None resamples pairs, which makes them too narrow where pairs share people.
            data, images: what the pairs are, to be stored.
            bootstrap: of the intervals, with resamples.

        Raises:
            UserError: a FAR too small for the number of impostor pairs (it must allow
                `FALSE_ACCEPTS` of them), an unknown method, one kind of pair only, or similarities
                that are no higher for genuine pairs.

        Examples:
            >>> rng = np.random.default_rng(0)
            >>> same = np.arange(3000) < 1000
            >>> scores = rng.normal(np.where(same, 0.6, 0.1), 0.1)
            >>> calibration = Calibration.fit(scores, same, fingerprint="of the network")
            >>> calibration.probability([0.1, 0.35, 0.6]).round(1).tolist()
            [0.0, 0.5, 1.0]
        """
        check_choice("method", method, get_args(Method))
        scores, same = check_both(scores, same)
        fars = list(dict.fromkeys(float(far) for far in fars))
        check_fars(fars, int((~same).sum()))
        knots, llrs = {"logistic": _logistic, "isotonic": _isotonic}[method](scores, same)
        if not llrs[-1] > llrs[0]:
            raise UserError(
                "the similarities of genuine pairs are no higher than those of impostor pairs: "
                "is the network trained, and is the list of pairs right?"
            )
        thresholds = find_thresholds(scores, same, fars, people=people, bootstrap=bootstrap)
        over = "pairs" if people is None else "people"
        resampling = Resampling(over, *bootstrap)
        return cls(fingerprint, method, knots, llrs, thresholds, tuple(data), resampling, images)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``calibration.json``."""
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "model": self.fingerprint,
            "method": self.method,
            "scores": self.scores.tolist(),
            "llrs": self.llrs.tolist(),
            "thresholds": [asdict(found) for found in self.thresholds.values()],
            "data": [to_dict(one) for one in self.data],
            "intervals": to_dict(self.intervals),
            "images": self.images,
            "checked": [one.to_dict() for one in self.checked],
        }

    def save(self, network: str | Path) -> Path:
        """Write it beside a network, whole or not at all; returns the file.

        Args:
            network: a model folder, for ``calibration.json`` in it, or an exported ``X.onnx``, for
                ``X.calibration.json`` beside it.

        Raises:
            UserError: the folder cannot be written.
        """
        path = file_of(Path(network))
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"
        with writing(path):
            atomic_write(path, text.encode())
        return path

    @classmethod
    def load(cls, network: str | Path, *, fingerprint: str) -> Calibration | None:
        """The calibration beside a network, or None where there is none.

        Args:
            network: a model folder or an exported ``.onnx`` file; the latter has its own
                calibration, or that of the checkpoint or run in whose folder it lies, if they
                compute the same.
            fingerprint: of the network there.

        Raises:
            UserError: the file is damaged, or belongs to another network.
        """
        network = Path(network)
        path = file_of(network)
        if not path.exists() and network.suffix == ".onnx":
            others = (network.parent / FILE, network.parent / "checkpoints" / "best" / FILE)
            lent = [_read(other) for other in others if other.exists()]
            return next((one for one in lent if one.fingerprint == fingerprint), None)
        if not path.exists():
            return None
        found = _read(path)
        if found.fingerprint != fingerprint:
            raise UserError(
                f"{path} belongs to another network than the one beside it: delete it, or "
                "overwrite it with sphereface2 calibrate"
            )
        return found


def named_by_mistake(far: float, comparisons: int) -> float:
    """The share of strangers with at least one false accept: 1 - (1 - far)^comparisons."""
    return -math.expm1(comparisons * math.log1p(-far))


def file_of(network: Path) -> Path:
    """Where the calibration of a model folder or an exported ``.onnx`` file lies."""
    if network.suffix == ".onnx":
        return network.with_suffix(f".{FILE}")
    return network / FILE


# --- curves --------------------------------------------------------------------------------------


def balance(same: np.ndarray) -> np.ndarray:
    """The weight of each pair that makes genuine and impostor pairs half of the whole each.

    Examples:
        >>> balance(np.array([True, False, False]))
        array([0.5 , 0.25, 0.25])
    """
    return np.where(same, 0.5 / same.sum(), 0.5 / (~same).sum())


def pool(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rising curve nearest to the share of genuine pairs at each score, both kinds balanced.

    Found by the pool-adjacent-violators algorithm.

    Returns:
        The distinct scores (K,), the share (K,) at each, and of each pair (P,) the index of its
        score.

    Examples:
        >>> pool(np.array([0.1, 0.2, 0.3, 0.4]), np.array([False, True, False, True]))[1]
        array([0. , 0.5, 0.5, 1. ])
    """
    from scipy.optimize import isotonic_regression

    weight = balance(same)
    x, index = np.unique(scores, return_inverse=True)
    total = np.bincount(index, weight)
    share = np.bincount(index, weight * same) / total
    return x, isotonic_regression(share, weights=total).x.clip(0, 1), index


def _logistic(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two points of the line that minimises the balanced cross-entropy, with Platt's targets."""
    from scipy.optimize import minimize
    from scipy.special import expit

    centre, spread = scores.mean(), scores.std() or 1.0
    x = (scores - centre) / spread
    genuine, impostors = int(same.sum()), int((~same).sum())
    weight = balance(same)
    # Platt's targets, a little off 1 and 0, keep the slope finite where the two kinds part.
    target = np.where(same, (genuine + 1) / (genuine + 2), 1 / (impostors + 2))

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        z = line[0] * x + line[1]
        error = weight * (expit(z) - target)
        value = weight @ (np.logaddexp(0, z) - target * z)
        return float(value), np.array([error @ x, error.sum()])

    def curvature(line: np.ndarray) -> np.ndarray:
        p = expit(line[0] * x + line[1])
        w = weight * p * (1 - p)
        return np.array([[w @ x**2, w @ x], [w @ x, w.sum()]])

    found = minimize(
        loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10}
    )
    low, high = float(scores.min()), float(scores.max())
    knots = np.array([low, high if high > low else low + 1.0])
    return knots, found.x[0] * (knots - centre) / spread + found.x[1]


def _isotonic(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = float(scores.min()), float(scores.max())
    # A pair against the trend at either end keeps the ends finite.
    knots, p, _ = pool(
        np.concatenate([[low], scores, [high]]), np.concatenate([[True], same, [False]])
    )
    if len(knots) == 1:
        return np.array([low, low + 1.0]), np.log(p.repeat(2)) - np.log1p(-p.repeat(2))
    # Of a level stretch the two ends suffice.
    step = np.concatenate([[True], p[1:] != p[:-1], [True]])
    kept = step[1:] | step[:-1]
    return knots[kept], np.log(p[kept]) - np.log1p(-p[kept])


# --- reading -------------------------------------------------------------------------------------

_OLD_KEYS = {"matched": "genuine", "mismatched": "impostor"}  # of version 0.1.0, in "data"


def _read(path: Path) -> Calibration:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError("its format is another one")
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"its format version is {content['format_version']!r}")
        if content["method"] not in get_args(Method):
            raise ValueError(f"its method is {content['method']!r}")
        found: list[dict[str, Any]] = [
            {key: tuple(v) if isinstance(v, list) else v for key, v in one.items()}
            for one in content["thresholds"]
        ]
        thresholds = [Threshold(**one) for one in found]
        if not thresholds:
            raise ValueError("it has no threshold")
        for one in thresholds:
            (low, high), (least, most) = one.ci, one.far_ci
            if not np.isfinite([one.threshold, low, high]).all() or not 0 < one.far < 1:
                raise ValueError("it has a threshold or a FAR that is none")
            if not 0 <= least <= most <= 1 or not 0 <= one.tar <= 1:
                raise ValueError("it has a rate that is none")
        data = [
            {_OLD_KEYS.get(key, key): value for key, value in one.items()}
            for one in content["data"]
        ]
        return Calibration(
            str(content["model"]),
            content["method"],
            *_read_curve(content),
            {one.far: one for one in thresholds},
            tuple(CalibrationSet(**one) for one in data),
            Resampling(**content["intervals"]),
            content.get("images"),
            tuple(map(CheckedSet.from_dict, content.get("checked", ()))),
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = f"{error!s:.100}" if not isinstance(error, KeyError) else f"it lacks {error}"
        raise UserError(
            f"{path} is damaged ({reason}): delete it, or overwrite it with sphereface2 calibrate"
        ) from error


def _read_curve(content: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    scores, llrs = (np.array(content[key], np.float64) for key in ("scores", "llrs"))
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
    return scores, llrs
