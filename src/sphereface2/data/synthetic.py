"""Procedural faces, so that the whole pipeline runs where there are no real ones.

An identity is a draw of shape and texture parameters: the head's outline, where eyes, brows, nose
and mouth sit and how they are cut, colours, hair, moles, a skin pattern. An image adds what an
identity must be recognised in spite of: pose, expression, light, occlusion, blur, noise, JPEG.
They are drawings. An accuracy measured on them says that the pipeline works, and nothing about
real faces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rich.progress import track

from sphereface2.data import pairbin
from sphereface2.data.locate import ABOUT, DRAWN
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.errors import UserError
from sphereface2.files import atomic_folder

SIZE = 112
_FOLDS = 10
_GENUINE_A_PERSON = 5  # of the 15 pairs that 6 images make
_IMAGES_PER_TEST_PERSON = 6
#: Faces are drawn at twice the size and averaged down, which smooths every edge.
_ZOOM = 2
_CANVAS = SIZE * _ZOOM
_SHIFT = 4  # fractional bits of the drawing coordinates
_SKINS = np.array([[255, 224, 196], [234, 192, 158], [198, 142, 104], [141, 92, 62], [88, 56, 42]])
_HAIRS = np.array(
    [[32, 26, 24], [70, 44, 28], [120, 78, 42], [196, 154, 88], [150, 62, 34], [172, 168, 164]]
)
_IRISES = np.array([[84, 54, 32], [110, 88, 48], [70, 104, 70], [84, 120, 158], [120, 124, 128]])


@dataclass(frozen=True)
class Identity:
    """A person: an (M,) vector of shape and texture parameters in [0, 1], and a skin pattern."""

    shape: np.ndarray
    pattern: np.ndarray
    moles: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Identity:
        """A new person."""
        return cls(
            shape=rng.random(40),
            pattern=rng.normal(0, 1, (9, 9)).astype(np.float32),
            moles=rng.uniform((-0.8, -0.6, 0.8), (0.8, 0.9, 2.2), (int(rng.integers(0, 5)), 3)),
        )


def _between(low: float, high: float, share: float) -> float:
    return low + (high - low) * float(share)


def _palette(colours: np.ndarray, share: float) -> np.ndarray:
    """A colour on the path through ``colours``."""
    at = float(share) * (len(colours) - 1)
    below = min(int(at), len(colours) - 2)
    return colours[below] + (colours[below + 1] - colours[below]) * (at - below)


class _Canvas:
    """Polygons in face coordinates, projected by the head's pose."""

    def __init__(self, background: np.ndarray, project: Callable[[np.ndarray], np.ndarray]) -> None:
        self.pixels = background
        self.project = project

    def _fixed(self, points: np.ndarray) -> np.ndarray:
        return np.round(self.project(points) * (_ZOOM << _SHIFT)).astype(np.int32)

    def fill(self, points: np.ndarray, colour: np.ndarray) -> None:
        cv2.fillPoly(self.pixels, [self._fixed(points)], colour.tolist(), cv2.LINE_AA, _SHIFT)

    def line(self, points: np.ndarray, colour: np.ndarray, width: float) -> None:
        thickness = max(1, round(width * _ZOOM))
        cv2.polylines(
            self.pixels, [self._fixed(points)], False, colour.tolist(), thickness, cv2.LINE_AA,
            _SHIFT,
        )  # fmt: skip


_TURN = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_ARC = np.linspace(-1, 1, 15)


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> np.ndarray:
    points = np.stack([rx * np.cos(_TURN), ry * np.sin(_TURN)], axis=1)
    cos, sin = math.cos(tilt), math.sin(tilt)
    return points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def render(identity: Identity, rng: np.random.Generator) -> np.ndarray:
    """One image of a person: uint8 (112, 112, 3) RGB, pose and light drawn from ``rng``."""
    p = identity.shape
    yaw, pitch = rng.normal(0, 0.28), rng.normal(0, 0.14)
    roll, zoom = rng.normal(0, 0.05), 1 + rng.normal(0, 0.04)
    drift = rng.normal(0, 1.3, 2)
    smile, gape = rng.normal(0.3, 0.6), max(0.0, rng.normal(-0.2, 0.5))
    lift, squint = rng.normal(0, 1.0), float(np.clip(rng.normal(0.9, 0.25), 0.15, 1.2))

    # Shape, in pixels of the aligned crop: eyes near (38, 52) and (74, 52), mouth near y = 92.
    half_width = _between(35, 46, p[0])
    crown, chin = _between(50, 60, p[1]), _between(41, 53, p[2])
    jaw, cheek = _between(0.62, 1.0, p[3]), _between(1.7, 3.0, p[4])
    eye_x, eye_y = _between(15, 20.5, p[5]), _between(-10, -6, p[6])
    eye_w, eye_h = _between(5.2, 8.4, p[7]), _between(2.4, 4.6, p[8])
    eye_tilt = _between(-0.22, 0.22, p[9])
    brow_gap, brow_w = _between(6.5, 12, p[10]), _between(7.5, 11.5, p[11])
    brow_thick, brow_arch = _between(1.2, 4.2, p[12]), _between(0, 4.5, p[13])
    brow_tilt = _between(-0.25, 0.25, p[14])
    nose_l, nose_w = _between(14, 24, p[15]), _between(4.5, 9.5, p[16])
    mouth_y, mouth_w = _between(27, 35, p[17]), _between(9, 16.5, p[18])
    lip_up, lip_down = _between(1.2, 3.8, p[19]), _between(1.8, 5.0, p[20])
    skin = _palette(_SKINS, p[21]) + (p[22:25] - 0.5) * 26
    hair = _palette(_HAIRS, p[25])
    iris = _palette(_IRISES, p[26])
    lips = skin * 0.55 + np.array([168, 60, 70]) * _between(0.25, 0.5, p[27])
    dark = skin * 0.62
    style, hairline = int(p[28] * 5), _between(0.42, 0.78, p[29])
    beard = (p[30] - 0.7) / 0.3  # present above 0
    glasses = p[31] > 0.82 and rng.random() < 0.85
    ear = _between(5, 9.5, p[32])

    centre = np.array([SIZE / 2, 60.0]) + drift
    sin_yaw, cos_yaw = math.sin(yaw), math.cos(yaw)
    sin_pitch, cos_pitch = math.sin(pitch), math.cos(pitch)
    cos_roll, sin_roll = math.cos(roll) * zoom, math.sin(roll) * zoom

    def project(points: np.ndarray) -> np.ndarray:
        x, y = points[:, 0], points[:, 1]
        depth = 34 * np.sqrt(np.clip(1 - (x / 58) ** 2 - (y / 70) ** 2, 0, 1))
        turned = x * cos_yaw + depth * sin_yaw
        depth = depth * cos_yaw - x * sin_yaw
        tilted = y * cos_pitch + depth * sin_pitch
        # The crop follows the eyes and mouth: take back most of the shift of the face's middle.
        turned = turned - 26 * sin_yaw
        tilted = tilted - 26 * sin_pitch
        return (
            np.stack(
                [turned * cos_roll - tilted * sin_roll, turned * sin_roll + tilted * cos_roll],
                axis=1,
            )
            + centre
        )

    canvas = _Canvas(_background(rng), project)

    angle = _TURN
    radius_x = half_width * np.where(
        np.sin(angle) > 0, 1 - (1 - jaw) * np.abs(np.sin(angle)) ** cheek, 1.0
    )
    outline = np.stack(
        [
            radius_x * np.cos(angle),
            np.where(np.sin(angle) > 0, chin, crown) * np.sin(angle),
        ],
        axis=1,
    )  # fmt: skip

    clothes = rng.uniform(20, 235, 3)
    if style in (2, 4):
        canvas.fill(_ellipse(0, _between(-4, 14, p[33]), half_width * 1.22, crown * 1.14), hair)
    canvas.fill(np.array([[-20, 34], [20, 34], [26, 80], [-26, 80]], float), skin * 0.8)
    canvas.fill(np.array([[-22, 62], [22, 62], [80, 84], [-80, 84]], float), clothes)
    for side in (-1, 1):
        canvas.fill(_ellipse(side * half_width * 0.99, 1, ear * 0.6, ear * 1.25), skin * 0.88)
    canvas.fill(outline, skin)
    face = np.zeros((_CANVAS, _CANVAS), np.uint8)
    cv2.fillPoly(face, [canvas._fixed(outline)], 255, cv2.LINE_AA, _SHIFT)

    # Cheeks, moles and the shadow beside the nose.
    for side in (-1, 1):
        blush = skin + (np.array([230, 110, 100]) - skin) * _between(0.0, 0.22, p[34])
        canvas.fill(_ellipse(side * half_width * 0.55, 14, 8.5, 6.5), blush)
    for mx, my, size in identity.moles:
        canvas.fill(_ellipse(mx * half_width * 0.8, my * 36, size, size), skin * 0.45)
    if beard > 0:
        depth = _between(0.25, 0.8, p[35])
        lower = outline[np.sin(angle) > 0.05] * (0.985, 1.0)
        inner = np.array([[-half_width * 0.55, 22], [0, mouth_y - 6], [half_width * 0.55, 22]])
        canvas.fill(np.vstack([lower, inner]), skin + (hair - skin) * depth)

    for side in (-1, 1):
        tilt = side * eye_tilt
        opening = eye_h * squint
        canvas.fill(
            _ellipse(side * eye_x, eye_y - 0.6, eye_w * 1.22, eye_h * 1.5, tilt), skin * 0.9
        )
        canvas.fill(_ellipse(side * eye_x, eye_y, eye_w, opening, tilt), np.array([242, 240, 236]))
        gaze = side * eye_x + 2.2 * math.sin(2.2 * yaw)
        pupil = min(opening, eye_h * 0.92)
        canvas.fill(_ellipse(gaze, eye_y, pupil, pupil), iris)
        canvas.fill(_ellipse(gaze, eye_y, pupil * 0.45, pupil * 0.45), np.array([12, 10, 10]))
        lid = np.stack([_ARC * eye_w, -opening * np.sqrt(np.clip(1 - _ARC**2, 0, 1))], axis=1)
        lid = lid @ np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        canvas.line(lid + np.array([side * eye_x, eye_y]), dark * 0.5, _between(0.6, 1.8, p[36]))
        arch = np.stack(
            [
                side * eye_x * 1.03 + _ARC * brow_w,
                eye_y - brow_gap - lift - brow_arch * (1 - _ARC**2)
                + side * _ARC * brow_w * math.tan(brow_tilt),
            ],
            axis=1,
        )  # fmt: skip
        canvas.line(arch, hair * 0.8, brow_thick)

    # A nose stands out, so it moves further with the head than the face behind it.
    reach = np.array([7.0 * sin_yaw, 7.0 * sin_pitch])
    tip = np.array([0.0, eye_y + nose_l]) + reach
    sides = tip + np.array([[-nose_w, 0.0], [0.0, 2.2]])
    bridge = np.vstack([[-nose_w * 0.35, eye_y + 1], sides])
    canvas.line(bridge, dark * 1.1, 0.9)
    canvas.fill(_ellipse(tip[0], tip[1] - 1.5, nose_w * 0.72, nose_w * 0.5), skin * 0.95)
    for side in (-1, 1):
        canvas.fill(
            _ellipse(tip[0] + side * nose_w * 0.55, tip[1] + 0.8, nose_w * 0.26, 1.2), dark * 0.6
        )

    width = mouth_w * (1 + 0.12 * smile)
    bend = -3.2 * smile * (_ARC**2 - 0.4)
    middle = np.stack([_ARC * width, mouth_y + bend], axis=1)
    bulge = (1 - _ARC**2)[:, None] * np.array([[0.0, 1.0]])
    gap = 7.0 * gape
    upper, lower_lip = middle - bulge * lip_up, middle + bulge * (lip_down + gap)
    canvas.fill(np.vstack([upper, lower_lip[::-1]]), lips)
    if gap > 1:
        canvas.fill(
            np.vstack([middle + bulge * 0.4, (middle + bulge * (gap + 0.2))[::-1]]),
            np.array([70, 22, 26]) if gap > 3 else np.array([238, 234, 228]),
        )
    else:
        canvas.line(middle, lips * 0.55, 0.9)

    if style != 0:
        _hair(canvas, outline, hair, style, hairline, p)
    if glasses:
        frame = np.array([30, 28, 34]) + 90 * p[37]
        for side in (-1, 1):
            ring = _ellipse(
                side * eye_x, eye_y + 0.5, eye_w * 1.5, eye_w * _between(1.0, 1.4, p[38])
            )
            canvas.line(np.vstack([ring, ring[:1]]), frame, 1.3)
        canvas.line(
            np.array([[-eye_x + eye_w * 1.5, eye_y], [eye_x - eye_w * 1.5, eye_y]]), frame, 1.3
        )
    _occlude(canvas, rng, eye_x, eye_y, eye_w, mouth_y)
    return _photograph(canvas.pixels, face, identity, yaw, rng)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A smooth random backdrop, uint8 (224, 224, 3)."""
    coarse = rng.uniform(10, 245, 3) + rng.normal(0, 32, (3, 3, 3))
    coarse = np.clip(coarse, 0, 255).astype(np.uint8)
    return cv2.resize(coarse, (_CANVAS, _CANVAS), interpolation=cv2.INTER_LINEAR)


def _hair(
    canvas: _Canvas,
    outline: np.ndarray,
    colour: np.ndarray,
    style: int,
    hairline: float,
    p: np.ndarray,
) -> None:
    """The hair in front of the head: a cap above the hairline, cut by style."""
    top = outline[np.sin(_TURN) < -0.02] * (1.06, 1.08)
    top = top[np.argsort(top[:, 0])]
    left, right, crown = top[0, 0], top[-1, 0], top[:, 1].min()
    x = np.linspace(right, left, 21)
    share = (x - left) / (right - left)
    if style == 1:  # short: a round hairline
        edge = crown * hairline * (1 - 0.45 * (2 * share - 1) ** 2)
    elif style == 2:  # long, with a parting
        parting = _between(0.25, 0.75, p[39])
        edge = crown * (0.25 + (hairline - 0.1) * np.exp(-(((share - parting) / 0.22) ** 2)))
    elif style == 3:  # a fringe of waves
        edge = crown * (hairline - 0.16 + 0.07 * np.cos(share * _between(9, 30, p[39])))
    else:  # a straight fringe
        edge = crown * np.full_like(share, hairline - 0.14)
    canvas.fill(np.vstack([top, np.stack([x, edge], axis=1)]), colour)


def _occlude(
    canvas: _Canvas,
    rng: np.random.Generator,
    eye_x: float,
    eye_y: float,
    eye_w: float,
    mouth_y: float,
) -> None:
    """In some images: sunglasses, a scarf or mask, or something in front of the face."""
    kind = rng.random()
    colour = rng.uniform(10, 240, 3)
    if kind < 0.04:
        shade = np.array([18, 16, 20])
        for side in (-1, 1):
            canvas.fill(_ellipse(side * eye_x, eye_y + 1, eye_w * 1.6, eye_w * 1.2), shade)
        canvas.line(np.array([[-eye_x, eye_y - 1], [eye_x, eye_y - 1]]), shade, 2)
    elif kind < 0.07:
        low = mouth_y - 8
        canvas.fill(
            np.array([[-40, low - 4], [0, low], [40, low - 4], [34, 70], [-34, 70]]), colour
        )
    elif kind < 0.14:
        x, y = rng.uniform(-45, 45), rng.uniform(-40, 50)
        canvas.fill(
            _ellipse(x, y, rng.uniform(6, 15), rng.uniform(6, 22), rng.uniform(0, 3)), colour
        )


def _photograph(
    drawing: np.ndarray,
    face: np.ndarray,
    identity: Identity,
    yaw: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Skin pattern, light, blur and sensor noise: uint8 (112, 112, 3)."""
    small = cv2.resize(drawing, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    image: np.ndarray = small.astype(np.float32)
    mask = cv2.resize(face, (SIZE, SIZE), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    pattern: np.ndarray = cv2.resize(identity.pattern, (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    slide = np.array([[1, 0, 14 * math.sin(yaw)], [0, 1, 0]])
    pattern = cv2.warpAffine(pattern, slide, (SIZE, SIZE), borderMode=cv2.BORDER_REFLECT)
    direction, slope = rng.uniform(0, 2 * np.pi), abs(rng.normal(0, 0.24))
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].astype(np.float32)
    light = rng.normal(1, 0.16) * (1 + slope * (math.cos(direction) * x + math.sin(direction) * y))
    round_shade = 1 - 0.16 * (x - 0.6 * math.cos(direction) * slope) ** 2
    field = np.clip(light, 0.25, 1.9) * round_shade * (1 + 0.055 * pattern * mask)
    tint = np.clip(rng.normal(1, 0.055, 3), 0.75, 1.25).astype(np.float32)
    image *= field[..., None].astype(np.float32) * tint
    if rng.random() < 0.08:
        image[...] = image.mean(axis=2, keepdims=True)
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), float(rng.uniform(0.4, 1.5)))
    image += rng.normal(0, rng.uniform(1, 7), image.shape).astype(np.float32)
    return np.clip(image, 0, 255).astype(np.uint8)


def encode(image: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of an RGB image."""
    bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def person(seed: int, number: int, images: int) -> list[bytes]:
    """``images`` JPEGs of person ``number``; the same for the same arguments, in any order."""
    rng = np.random.default_rng((seed, number))
    identity = Identity.draw(rng)
    return [encode(render(identity, rng), int(rng.integers(60, 93))) for _ in range(images)]


def write(
    directory: str | Path,
    *,
    people: int = 1000,
    images_per_person: int = 20,
    seed: int = 0,
    pairs_per_fold: int = 100,
) -> Path:
    """Draw a training set and a verification set of other people into a new folder.

    ``directory`` gets ``train.rec``, ``train.idx`` and ``property`` (``people`` × ``images_per_
    person`` JPEGs of 112×112), and, like LFW's ten folds, ``synthetic.bin`` with
    ``synthetic_pairs.txt``: ten folds of ``pairs_per_fold`` genuine and as many impostor pairs,
    of a fifth as many people with 6 images each, no person in two folds. Returns ``directory``.
    The same arguments give the same bytes. Raises UserError if ``directory`` exists or a count is
    out of range.
    """
    directory = Path(directory)
    if directory.exists():
        raise UserError(f"{directory} exists already; name a new folder")
    if people < 1 or images_per_person < 1:
        raise UserError("synthetic data need at least one person with one image")
    if pairs_per_fold < 1:
        raise UserError(f"pairs per fold must be 1 or more, not {pairs_per_fold}")
    with atomic_folder(directory) as temporary:
        with RecordIOWriter(temporary, (SIZE, SIZE)) as writer:
            for number in track(range(people), "Drawing synthetic faces", transient=True):
                for image in person(seed, number, images_per_person):
                    writer.add(number, image)
        _write_pairs(temporary, people, seed, pairs_per_fold)
        (temporary / ABOUT).write_text(
            f"{DRAWN} faces, drawn: figures show that the pipeline works, and nothing about real "
            "faces\n",
            encoding="utf-8",
        )
    return directory


def _write_pairs(directory: Path, first_person: int, seed: int, per_fold: int) -> None:
    rng = np.random.default_rng((seed, 2**32))
    members = max(2, math.ceil(per_fold / _GENUINE_A_PERSON))
    combinations = np.array(
        [
            (who, a, b)
            for who in range(members)
            for a in range(_IMAGES_PER_TEST_PERSON)
            for b in range(a)
        ]
    )
    images: list[bytes] = []
    same: list[bool] = []
    lines = [f"{_FOLDS}\t{per_fold}"]
    for fold in range(_FOLDS):
        first = first_person + fold * members
        faces = [person(seed, first + i, _IMAGES_PER_TEST_PERSON) for i in range(members)]
        for who, a, b in combinations[rng.permutation(len(combinations))[:per_fold]]:
            images += [faces[who][a], faces[who][b]]
            lines.append(f"person_{first + who}\t{a + 1}\t{b + 1}")
        for _ in range(per_fold):
            one, other = rng.choice(members, size=2, replace=False)
            a, b = rng.integers(_IMAGES_PER_TEST_PERSON, size=2)
            images += [faces[one][a], faces[other][b]]
            lines.append(f"person_{first + one}\t{a + 1}\tperson_{first + other}\t{b + 1}")
        same += [True] * per_fold + [False] * per_fold
    pairbin.write(directory / "synthetic.bin", images, same)
    (directory / "synthetic_pairs.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
