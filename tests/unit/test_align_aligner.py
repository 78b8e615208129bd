"""Detection on a photograph that every installation has: NASA's, of an astronaut."""

import io
import pickle
import threading

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from sphereface2.align import TEMPLATE, Aligner, NoFaceError, similarity
from sphereface2.errors import UserError


@pytest.fixture(scope="module")
def aligner():
    return Aligner()


@pytest.fixture(scope="module")
def photo():
    return astronaut()[:300, 50:400]  # uint8, the face is about 90 pixels high


@pytest.fixture(scope="module")
def face(aligner, photo):
    (face,) = aligner.detect(photo)
    return face


def in_crop_pixels(face, expected):
    """Mean distance of landmarks from where they should be, in pixels of a 112×112 crop."""
    scale = np.sqrt(np.linalg.det(similarity(expected, TEMPLATE)[:, :2]))
    return scale * np.linalg.norm(face.landmarks - expected, axis=1).mean()


def test_the_landmarks_are_where_one_sees_them(face):
    # Read off the enlarged picture by hand.
    seen = np.array(
        [(153.3, 100.8), (196.7, 103.7), (175.8, 126.7), (154.2, 140.8), (193.3, 141.7)]
    )
    assert np.abs(face.landmarks - seen).max() < 4
    assert np.abs((face.landmarks - seen).mean(axis=0)).max() < 1
    assert face.landmarks.dtype == np.float32 and face.box.shape == (4,)
    assert 0.9 < face.score <= 1


@pytest.mark.parametrize(
    ("angle", "scale"), [(0, 0.4), (0, 0.7), (0, 3.1), (20, 1), (-25, 1.3), (8, 9)]
)
def test_landmarks_follow_the_picture(aligner, photo, face, angle, scale):
    matrix = cv2.getRotationMatrix2D((170, 120), angle, scale)
    matrix[:, 2] += (scale - 1) * np.array([170, 120])
    size = (int(scale * photo.shape[1]), int(scale * photo.shape[0]))
    how = cv2.INTER_LINEAR if scale > 1 else cv2.INTER_AREA
    moved = (
        cv2.resize(photo, size, interpolation=how)
        if angle == 0
        else cv2.warpAffine(photo, matrix, size, borderMode=cv2.BORDER_REPLICATE)
    )
    expected = (
        (face.landmarks + 0.5) * np.array(size) / photo.shape[1::-1] - 0.5
        if angle == 0
        else face.landmarks @ matrix[:, :2].T + matrix[:, 2]
    )
    found = aligner.detect(moved)
    assert in_crop_pixels(found[0], expected) < 3.5


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_photograph_turned_by_whoever_scanned_it(aligner, photo, face, turns):
    photo = photo[:, 20:]  # no square
    turned = np.ascontiguousarray(np.rot90(photo, turns))
    with pytest.raises(NoFaceError):
        aligner.align(turned)
    crop, found = Aligner(rotations=True).align(turned)
    upright, _ = aligner.align(photo)
    assert np.abs(crop.astype(int) - upright).mean() < 2
    # The centre of the face, turned by hand.
    (x, y), (height, width) = face.landmarks.mean(axis=0) - (20, 0), photo.shape[:2]
    expected = {
        1: (y, width - 1 - x), 2: (width - 1 - x, height - 1 - y), 3: (height - 1 - y, x)
    }  # fmt: skip
    assert np.abs(found.landmarks.mean(axis=0) - expected[turns]).max() < 1.5
    left, top, right, bottom = found.box
    assert left < expected[turns][0] < right and top < expected[turns][1] < bottom


def test_a_turned_file_gives_the_same_crop(aligner, photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(np.rot90(photo, 1))).save(buffer, "PNG", exif=exif)
    crop, _ = aligner.align(buffer.getvalue())
    np.testing.assert_array_equal(crop, aligner.align(photo)[0])


def test_a_face_in_the_dark_is_found(aligner, photo, face):
    noise = np.random.default_rng(0).normal(0, 1.5, photo.shape)
    dark = np.clip(photo / 12 + noise, 0, 255).astype(np.uint8)
    assert not aligner._upright(dark, thorough=False)
    crop, found = aligner.align(dark)
    assert in_crop_pixels(found, face.landmarks) < 4
    assert crop.max() < 30  # the photograph's own light
    assert aligner.detect(np.zeros_like(photo)) == []


def test_a_small_face_in_a_large_picture_is_found(aligner, photo, face):
    scale = 0.45
    small = cv2.resize(photo, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    canvas = np.full((1800, 2800, 3), 128, np.uint8)
    canvas[900 : 900 + small.shape[0], 1900 : 1900 + small.shape[1]] = small
    found, crop = aligner.detect(canvas), aligner.align(canvas)[0]
    expected = (face.landmarks + 0.5) * scale - 0.5 + (1900, 900)
    assert in_crop_pixels(found[0], expected) < 5
    assert crop.shape == (112, 112, 3)


def test_the_largest_and_most_central_comes_first(aligner, photo):
    half = cv2.resize(photo, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    both = np.full((300, 800, 3), 128, np.uint8)
    both[: half.shape[0], : half.shape[1]] = half
    both[:, 400:750] = photo
    crops = aligner.align_all(both)
    assert [int(face.box[0] > 400) for _, face in crops] == [1, 0]
    np.testing.assert_allclose(crops[0][1].box, aligner.align(both)[1].box, atol=12)


def test_no_face_is_an_error_of_its_own(aligner, tmp_path):
    path = tmp_path / "wall.png"
    Image.fromarray(np.full((200, 300, 3), 90, np.uint8)).save(path)
    with pytest.raises(NoFaceError, match=r"no face found in .*wall\.png"):
        aligner.align(path)
    assert aligner.align_all(path) == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (5, 5), (40, 2000)])
def test_odd_shapes_have_no_face(aligner, shape):
    noise = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert aligner.detect(noise, thorough=True) == []


def test_threads_and_processes_can_share_it(aligner, photo, face):
    copy = pickle.loads(pickle.dumps(aligner))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(copy.detect(photo)[0])) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    for one in found:
        np.testing.assert_array_equal(one.landmarks, face.landmarks)


def test_settings_are_checked():
    with pytest.raises(UserError, match="16 to 4,096 pixels"):
        Aligner(size=3)
    with pytest.raises(UserError, match="min_score must be a number"):
        Aligner(min_score=7)
