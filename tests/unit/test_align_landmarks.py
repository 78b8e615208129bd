import cv2
import numpy as np
import pytest

from sphereface2.align.folder import align
from sphereface2.align.landmarks import read_landmarks
from sphereface2.align.template import TEMPLATE
from sphereface2.errors import UserError

GOOD = "1 2 3 4 5 6 7 8 9 10"


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "points.txt"
        path.write_text(text)
        return path

    return write


def test_lines_with_and_without_score(write):
    found = read_landmarks(
        write(
            f"# a comment\na/1.jpg {GOOD}\n\nb.jpg {GOOD} 0.98\nmy photo.png\t"
            + "\t".join(GOOD.split())
        )
    )
    assert list(found.points) == ["a/1.jpg", "b.jpg", "my photo.png"] and not found.bad
    for points in found.points.values():
        np.testing.assert_array_equal(points, np.arange(1, 11).reshape(5, 2))


def test_bad_lines_are_named_and_the_rest_is_kept(write):
    lines = [
        f"good.jpg {GOOD}",
        "nan.jpg 1 2 3 4 nan 6 7 8 9 10",
        "inf.jpg 1 2 3 4 5 6 7 8 9 -inf",
        "short.jpg 1 2 3 4 5 6 7 8 9",
        "word.jpg 1 2 3 four 5 6 7 8 9 10",
        f"../up.jpg {GOOD}",
        f"/etc/passwd {GOOD}",
        "," + GOOD.replace(" ", ","),
        f"./good.jpg {GOOD}",
    ]
    found = read_landmarks(write("\n".join(lines)))
    assert list(found.points) == ["good.jpg"]
    told = {
        "nan.jpg": "line 2: x3 is 'nan'",
        "inf.jpg": "line 3: y5 is '-inf'",
        "short.jpg": "line 4: expected 10 coordinates after the path, found 9",
        "word.jpg": "line 5: y2 is 'four'",
        "../up.jpg": "leads out",
        "/etc/passwd": "leads out",
        ".": "line 8: there is no path",
        "good.jpg": "line 9: the image was named before",
    }
    assert found.bad.keys() == told.keys()
    for name, text in told.items():
        assert text in found.bad[name]


def test_a_file_without_a_usable_line_is_an_error(write, tmp_path):
    with pytest.raises(UserError, match=r"no usable line.*line 1: x1 is 'nan'"):
        read_landmarks(write("a.jpg nan 2 3 4 5 6 7 8 9 10"))
    with pytest.raises(UserError, match="empty"):
        read_landmarks(write(""))
    with pytest.raises(UserError, match="No such file"):
        read_landmarks(tmp_path / "none.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="UTF-16 text"):
        read_landmarks(tmp_path / "binary")


def test_no_two_images_have_one_crop(write, tmp_path):
    names = ["a.jpg", "a.png", "a.png.png", "b.png"]
    (tmp_path / "set").mkdir()
    for shade, name in enumerate(names):
        cv2.imwrite(str(tmp_path / "set" / name), np.full((112, 112, 3), 50 * shade, np.uint8))
    points = " ".join(map(str, TEMPLATE.ravel()))
    lines = write("".join(f"{name} {points}\n" for name in names))
    align(tmp_path / "set", tmp_path / "crops", landmarks=lines, workers=1)
    found = {path.name: cv2.imread(str(path)) for path in (tmp_path / "crops").glob("*.jpg")}
    shades = {name: round(float(crop.mean()) / 50) for name, crop in found.items()}
    assert shades == {"a.jpg.jpg": 0, "a.png.jpg": 1, "a.png.png.jpg": 2, "b.jpg": 3}
