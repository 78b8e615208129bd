"""Photographs with names: what is drawn where, and which files are written."""

import numpy as np
import pytest
from PIL import Image

from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.recognition.gallery import annotate


def report(image, box, person=None, score=0.8, threshold=0.5):
    match = {"person": person or "nearest", "score": score, "metadata": {}}
    return {"image": str(image), "box": box, "person": person, "threshold": threshold,
            "matches": [match]}  # fmt: skip


def test_boxes_and_names_lie_at_the_faces(tmp_path):
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((400, 600, 3), np.uint8)).save(photo)
    out = tmp_path / "named.png"
    reports = [
        report(photo, [50.0, 60.0, 150.0, 200.0], "Ольга Ågren"),
        report(photo, [480.0, 300.0, 640.0, 430.0]),  # beyond the edge
        {"image": str(tmp_path / "broken.png"), "error": "no image"},
    ]
    assert annotate.write(reports, {str(photo): out}) == [out]
    pixels = read_image(out).astype(int)
    known, unknown = np.array(annotate._KNOWN), np.array(annotate._UNKNOWN)
    assert (pixels[100, 50] == known).all() and (pixels[350, 480] == unknown).all()
    assert not pixels[100, 100].any()  # inside the box the photograph is left alone
    below, corner = pixels[202:225, 50:200], pixels[370:, 470:]
    assert all((part > 180).all(2).sum() > 100 for part in (below, corner))
    assert (read_image(photo) == 0).all()


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (report("a", None, "ann"), ("ann 0.80", True)),
        (report("a", None), ("unknown", False)),
        (report("a", None, threshold=None), ("nearest 0.80?", False)),
        (report("a", None) | {"matches": []}, ("unknown", False)),
    ],
)
def test_what_is_written_beside_a_face(found, text):
    assert annotate._text(found) == text


def test_where_the_copies_go(tmp_path):
    first, second = tmp_path / "x" / "a.png", tmp_path / "y" / "a.webp"
    out = tmp_path / "out"
    assert annotate.places(out, [first, second], [first, second]) == {
        str(first): out / "a.jpg", str(second): out / "a_2.jpg"
    }  # fmt: skip
    other = tmp_path / "z" / "A.png"
    assert annotate.places(out, [first, other], [first, other])[str(other)] == out / "A_2.jpg"
    assert annotate.places(tmp_path / "a.JPG", [first], [first]) == {str(first): tmp_path / "a.JPG"}
    with pytest.raises(UserError, match="is one file for 2 images: give a folder"):
        annotate.places(tmp_path / "a.jpg", [first], [first, second])
    first.parent.mkdir()
    first.touch()
    with pytest.raises(UserError, match="would replace the photograph"):
        annotate.places(first, [first], [first])
    capital = tmp_path / "x" / "A.png"
    capital.hardlink_to(first)  # one file, as where capitals make no difference
    with pytest.raises(UserError, match="would replace the photograph"):
        annotate.places(capital, [first], [first])
    with pytest.raises(UserError, match=r"x is .*x, where its images would count"):
        annotate.places(tmp_path / "y" / ".." / "x", [first, second], [first, second])
