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
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np

from sphereface2 import console
from sphereface2.data import pairbin
from sphereface2.data.locate import DRAWN, write_about
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.errors import UserError
from sphereface2.files import atomic_folder
from sphereface2.images import encode_image

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

    def ellipse(self, colour: np.ndarray, *shape: float) -> None:
        self.fill(_ellipse(*shape), colour)

    def line(self, points: np.ndarray, colour: np.ndarray, width: float) -> None:
        thickness = max(1, round(width * _ZOOM))
        cv2.polylines(
            self.pixels, [self._fixed(points)], False, colour.tolist(), thickness, cv2.LINE_AA,
            _SHIFT,
        )  # fmt: skip


_TURN = np.linspace(0, 2 * np.pi, 40, endpoint=False)
_ARC = np.linspace(-1, 1, 15)


def _points(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.stack([x, y], axis=1)


def _ellipse(x: float, y: float, rx: float, ry: float, tilt: float = 0.0) -> np.ndarray:
    points = _points(rx * np.cos(_TURN), ry * np.sin(_TURN))
    cos, sin = math.cos(tilt), math.sin(tilt)
    return points @ np.array([[cos, sin], [-sin, cos]]) + (x, y)


def _features(identity: Identity, rng: np.random.Generator) -> SimpleNamespace:
    """What the drawing follows from: pose and expression, and the identity's shape and colours."""
    p = identity.shape
    f = SimpleNamespace(p=p, moles=identity.moles)
    f.yaw, f.pitch = rng.normal(0, 0.28), rng.normal(0, 0.14)
    f.roll, f.zoom = rng.normal(0, 0.05), 1 + rng.normal(0, 0.04)
    f.drift = rng.normal(0, 1.3, 2)
    f.smile, f.gape = rng.normal(0.3, 0.6), max(0.0, rng.normal(-0.2, 0.5))
    f.lift, f.squint = rng.normal(0, 1.0), float(np.clip(rng.normal(0.9, 0.25), 0.15, 1.2))
    # In pixels of the aligned crop: eyes near (38, 52) and (74, 52), mouth near y = 92.
    f.half_width = _between(35, 46, p[0])
    f.crown, f.chin = _between(50, 60, p[1]), _between(41, 53, p[2])
    f.jaw, f.cheek = _between(0.62, 1.0, p[3]), _between(1.7, 3.0, p[4])
    f.eye_x, f.eye_y = _between(15, 20.5, p[5]), _between(-10, -6, p[6])
    f.eye_w, f.eye_h = _between(5.2, 8.4, p[7]), _between(2.4, 4.6, p[8])
    f.eye_tilt = _between(-0.22, 0.22, p[9])
    f.brow_gap, f.brow_w = _between(6.5, 12, p[10]), _between(7.5, 11.5, p[11])
    f.brow_thick, f.brow_arch = _between(1.2, 4.2, p[12]), _between(0, 4.5, p[13])
    f.brow_tilt = _between(-0.25, 0.25, p[14])
    f.nose_l, f.nose_w = _between(14, 24, p[15]), _between(4.5, 9.5, p[16])
    f.mouth_y, f.mouth_w = _between(27, 35, p[17]), _between(9, 16.5, p[18])
    f.lip_up, f.lip_down = _between(1.2, 3.8, p[19]), _between(1.8, 5.0, p[20])
    f.skin = _palette(_SKINS, p[21]) + (p[22:25] - 0.5) * 26
    f.hair = _palette(_HAIRS, p[25])
    f.iris = _palette(_IRISES, p[26])
    f.lips = f.skin * 0.55 + np.array([168, 60, 70]) * _between(0.25, 0.5, p[27])
    f.dark = f.skin * 0.62
    f.style, f.hairline = int(p[28] * 5), _between(0.42, 0.78, p[29])
    f.beard = (p[30] - 0.7) / 0.3  # present above 0
    f.glasses = p[31] > 0.82 and rng.random() < 0.85
    f.ear = _between(5, 9.5, p[32])
    f.centre = np.array([SIZE / 2, 60.0]) + f.drift
    f.sin_yaw, f.cos_yaw = math.sin(f.yaw), math.cos(f.yaw)
    f.sin_pitch, f.cos_pitch = math.sin(f.pitch), math.cos(f.pitch)
    f.cos_roll, f.sin_roll = math.cos(f.roll) * f.zoom, math.sin(f.roll) * f.zoom
    radius_x = f.half_width * np.where(
        np.sin(_TURN) > 0, 1 - (1 - f.jaw) * np.abs(np.sin(_TURN)) ** f.cheek, 1.0
    )
    f.outline = _points(
        radius_x * np.cos(_TURN), np.where(np.sin(_TURN) > 0, f.chin, f.crown) * np.sin(_TURN)
    )
    return f


def _project(points: np.ndarray, f: SimpleNamespace) -> np.ndarray:
    """Points of the face as the pose moves them into the crop."""
    x, y = points[:, 0], points[:, 1]
    depth = 34 * np.sqrt(np.clip(1 - (x / 58) ** 2 - (y / 70) ** 2, 0, 1))
    turned = x * f.cos_yaw + depth * f.sin_yaw
    depth = depth * f.cos_yaw - x * f.sin_yaw
    tilted = y * f.cos_pitch + depth * f.sin_pitch
    # The crop follows the eyes and mouth: take back most of the shift of the face's middle.
    turned = turned - 26 * f.sin_yaw
    tilted = tilted - 26 * f.sin_pitch
    return (
        _points(
            turned * f.cos_roll - tilted * f.sin_roll, turned * f.sin_roll + tilted * f.cos_roll
        )
        + f.centre
    )


def _head(canvas: _Canvas, f: SimpleNamespace, rng: np.random.Generator) -> np.ndarray:
    """Neck, clothes, ears and the face; returns the face's mask, uint8."""
    clothes = rng.uniform(20, 235, 3)
    if f.style in (2, 4):
        canvas.ellipse(f.hair, 0, _between(-4, 14, f.p[33]), f.half_width * 1.22, f.crown * 1.14)
    canvas.fill(np.array([[-20, 34], [20, 34], [26, 80], [-26, 80]], float), f.skin * 0.8)
    canvas.fill(np.array([[-22, 62], [22, 62], [80, 84], [-80, 84]], float), clothes)
    for side in (-1, 1):
        canvas.ellipse(f.skin * 0.88, side * f.half_width * 0.99, 1, f.ear * 0.6, f.ear * 1.25)
    canvas.fill(f.outline, f.skin)
    face = np.zeros((_CANVAS, _CANVAS), np.uint8)
    cv2.fillPoly(face, [canvas._fixed(f.outline)], 255, cv2.LINE_AA, _SHIFT)
    return face


def _marks(canvas: _Canvas, f: SimpleNamespace) -> None:
    """Cheeks, moles and a beard."""
    for side in (-1, 1):
        blush = f.skin + (np.array([230, 110, 100]) - f.skin) * _between(0.0, 0.22, f.p[34])
        canvas.ellipse(blush, side * f.half_width * 0.55, 14, 8.5, 6.5)
    for mx, my, size in f.moles:
        canvas.ellipse(f.skin * 0.45, mx * f.half_width * 0.8, my * 36, size, size)
    if f.beard > 0:
        depth = _between(0.25, 0.8, f.p[35])
        lower = f.outline[np.sin(_TURN) > 0.05] * (0.985, 1.0)
        inner = np.array(
            [[-f.half_width * 0.55, 22], [0, f.mouth_y - 6], [f.half_width * 0.55, 22]]
        )
        canvas.fill(np.vstack([lower, inner]), f.skin + (f.hair - f.skin) * depth)


def _eyes(canvas: _Canvas, f: SimpleNamespace) -> None:
    """Eyes and brows."""
    for side in (-1, 1):
        tilt = side * f.eye_tilt
        opening = f.eye_h * f.squint
        canvas.ellipse(
            f.skin * 0.9, side * f.eye_x, f.eye_y - 0.6, f.eye_w * 1.22, f.eye_h * 1.5, tilt
        )
        canvas.ellipse(np.array([242, 240, 236]), side * f.eye_x, f.eye_y, f.eye_w, opening, tilt)
        gaze = side * f.eye_x + 2.2 * math.sin(2.2 * f.yaw)
        pupil = min(opening, f.eye_h * 0.92)
        canvas.ellipse(f.iris, gaze, f.eye_y, pupil, pupil)
        canvas.ellipse(np.array([12, 10, 10]), gaze, f.eye_y, pupil * 0.45, pupil * 0.45)
        lid = _points(_ARC * f.eye_w, -opening * np.sqrt(np.clip(1 - _ARC**2, 0, 1)))
        lid = lid @ np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
        canvas.line(
            lid + np.array([side * f.eye_x, f.eye_y]), f.dark * 0.5, _between(0.6, 1.8, f.p[36])
        )
        arch = _points(
            side * f.eye_x * 1.03 + _ARC * f.brow_w,
            f.eye_y
            - f.brow_gap
            - f.lift
            - f.brow_arch * (1 - _ARC**2)
            + side * _ARC * f.brow_w * math.tan(f.brow_tilt),
        )
        canvas.line(arch, f.hair * 0.8, f.brow_thick)


def _nose(canvas: _Canvas, f: SimpleNamespace) -> None:
    """It stands out, so it moves further with the head than the face behind it."""
    reach = np.array([7.0 * f.sin_yaw, 7.0 * f.sin_pitch])
    tip = np.array([0.0, f.eye_y + f.nose_l]) + reach
    sides = tip + np.array([[-f.nose_w, 0.0], [0.0, 2.2]])
    bridge = np.vstack([[-f.nose_w * 0.35, f.eye_y + 1], sides])
    canvas.line(bridge, f.dark * 1.1, 0.9)
    canvas.ellipse(f.skin * 0.95, tip[0], tip[1] - 1.5, f.nose_w * 0.72, f.nose_w * 0.5)
    for side in (-1, 1):
        canvas.ellipse(
            f.dark * 0.6, tip[0] + side * f.nose_w * 0.55, tip[1] + 0.8, f.nose_w * 0.26, 1.2
        )


def _mouth(canvas: _Canvas, f: SimpleNamespace) -> None:
    """Lips, and what shows between them."""
    width = f.mouth_w * (1 + 0.12 * f.smile)
    bend = -3.2 * f.smile * (_ARC**2 - 0.4)
    middle = _points(_ARC * width, f.mouth_y + bend)
    bulge = (1 - _ARC**2)[:, None] * np.array([[0.0, 1.0]])
    gap = 7.0 * f.gape
    upper, lower_lip = middle - bulge * f.lip_up, middle + bulge * (f.lip_down + gap)
    canvas.fill(np.vstack([upper, lower_lip[::-1]]), f.lips)
    if gap > 1:
        canvas.fill(
            np.vstack([middle + bulge * 0.4, (middle + bulge * (gap + 0.2))[::-1]]),
            np.array([70, 22, 26]) if gap > 3 else np.array([238, 234, 228]),
        )
    else:
        canvas.line(middle, f.lips * 0.55, 0.9)


def _glasses(canvas: _Canvas, f: SimpleNamespace) -> None:
    if f.glasses:
        frame = np.array([30, 28, 34]) + 90 * f.p[37]
        for side in (-1, 1):
            ring = _ellipse(
                side * f.eye_x, f.eye_y + 0.5, f.eye_w * 1.5, f.eye_w * _between(1.0, 1.4, f.p[38])
            )
            canvas.line(np.vstack([ring, ring[:1]]), frame, 1.3)
        canvas.line(
            np.array([[-f.eye_x + f.eye_w * 1.5, f.eye_y], [f.eye_x - f.eye_w * 1.5, f.eye_y]]),
            frame,
            1.3,
        )


def render(identity: Identity, rng: np.random.Generator) -> np.ndarray:
    """One image of a person: uint8 (112, 112, 3) RGB, pose and light drawn from ``rng``."""
    f = _features(identity, rng)
    canvas = _Canvas(_background(rng), partial(_project, f=f))
    face = _head(canvas, f, rng)
    _marks(canvas, f)
    _eyes(canvas, f)
    _nose(canvas, f)
    _mouth(canvas, f)
    if f.style != 0:
        _hair(canvas, f)
    _glasses(canvas, f)
    _occlude(canvas, f, rng)
    return _photograph(canvas.pixels, face, identity, f.yaw, rng)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A smooth random backdrop, uint8 (224, 224, 3)."""
    coarse = rng.uniform(10, 245, 3) + rng.normal(0, 32, (3, 3, 3))
    coarse = np.clip(coarse, 0, 255).astype(np.uint8)
    return cv2.resize(coarse, (_CANVAS, _CANVAS), interpolation=cv2.INTER_LINEAR)


def _hair(canvas: _Canvas, f: SimpleNamespace) -> None:
    """The hair in front of the head: a cap above the hairline, cut by style."""
    top = f.outline[np.sin(_TURN) < -0.02] * (1.06, 1.08)
    top = top[np.argsort(top[:, 0])]
    left, right, crown = top[0, 0], top[-1, 0], top[:, 1].min()
    x = np.linspace(right, left, 21)
    share = (x - left) / (right - left)
    if f.style == 1:  # short: a round hairline
        edge = crown * f.hairline * (1 - 0.45 * (2 * share - 1) ** 2)
    elif f.style == 2:  # long, with a parting
        parting = _between(0.25, 0.75, f.p[39])
        edge = crown * (0.25 + (f.hairline - 0.1) * np.exp(-(((share - parting) / 0.22) ** 2)))
    elif f.style == 3:  # a fringe of waves
        edge = crown * (f.hairline - 0.16 + 0.07 * np.cos(share * _between(9, 30, f.p[39])))
    else:  # a straight fringe
        edge = crown * np.full_like(share, f.hairline - 0.14)
    canvas.fill(np.vstack([top, _points(x, edge)]), f.hair)


def _occlude(canvas: _Canvas, f: SimpleNamespace, rng: np.random.Generator) -> None:
    """In some images: sunglasses, a scarf or mask, or something in front of the face."""
    kind = rng.random()
    colour = rng.uniform(10, 240, 3)
    if kind < 0.04:
        shade = np.array([18, 16, 20])
        for side in (-1, 1):
            canvas.ellipse(shade, side * f.eye_x, f.eye_y + 1, f.eye_w * 1.6, f.eye_w * 1.2)
        canvas.line(np.array([[-f.eye_x, f.eye_y - 1], [f.eye_x, f.eye_y - 1]]), shade, 2)
    elif kind < 0.07:
        low = f.mouth_y - 8
        canvas.fill(
            np.array([[-40, low - 4], [0, low], [40, low - 4], [34, 70], [-34, 70]]), colour
        )
    elif kind < 0.14:
        x, y = rng.uniform(-45, 45), rng.uniform(-40, 50)
        canvas.ellipse(colour, x, y, rng.uniform(6, 15), rng.uniform(6, 22), rng.uniform(0, 3))


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


def person(seed: int, number: int, images: int) -> list[bytes]:
    """``images`` JPEGs of person ``number``; the same for the same arguments, in any order."""
    rng = np.random.default_rng((seed, number))
    identity = Identity.draw(rng)
    return [
        encode_image(render(identity, rng), ".jpg", int(rng.integers(60, 93)))
        for _ in range(images)
    ]


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
        with RecordIOWriter(temporary, (SIZE, SIZE)) as writer, console.bars() as progress:
            advance = console.advance(progress, "drawing faces", people)
            for number in range(people):
                for image in person(seed, number, images_per_person):
                    writer.add(number, image)
                advance(1)
        _write_pairs(temporary, people, seed, pairs_per_fold)
        write_about(
            temporary,
            f"{DRAWN} faces, drawn: figures show that the pipeline works, and nothing about real "
            "faces",
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
