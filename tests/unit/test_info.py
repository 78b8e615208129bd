"""Counts of what is there and what is wrong, against sets with known faults."""

import json
import pickle

import cv2
import numpy as np
import pytest

from sphereface2.data import synthetic
from sphereface2.data.convert import convert
from sphereface2.data.info import _histogram, info
from sphereface2.errors import UserError


def picture(seed, size=(20, 16)):
    image = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", image)[1].tobytes()


@pytest.fixture
def folder(tmp_path):
    """10 images of 3 people: 1 empty, 1 damaged, 2 copies of one of them."""
    root = tmp_path / "faces"
    for person, images in {
        "a": [picture(0), picture(1), picture(0), picture(2)],
        "b": [picture(3, (30, 30)), b"", picture(4), picture(0), b"damaged"],
        "c": [picture(5)],
    }.items():
        (root / person).mkdir(parents=True)
        for number, data in enumerate(images):
            (root / person / f"{number}.jpg").write_bytes(data)
    return root


def test_folder_with_known_faults(folder, capsys):
    info(folder, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert {key: found[key] for key in ("images", "people", "unreadable", "duplicates")} == {
        "images": 10,
        "people": 3,
        "unreadable": 2,
        "duplicates": 2,
    }
    assert found["unreadable_names"] == ["b/1.jpg", "b/4.jpg"]
    assert found["duplicate_names"] == ["a/2.jpg", "b/3.jpg"]
    assert found["person_sizes"] == {"1": 1, "4": 1, "5": 1}
    assert found["image_sizes"] == {"16x20": 7, "30x30": 1}
    assert found["format"] == "folder"


@pytest.mark.parametrize("to", ["list", "recordio", "webdataset"])
def test_other_formats_say_the_same(folder, tmp_path, to, capsys):
    convert(folder, tmp_path / "out", to=to)
    found = info(tmp_path / "out")
    assert (found.images, found.people, found.unreadable, found.duplicates) == (8, 3, 0, 2)
    assert found.person_sizes == {1: 1, 3: 1, 4: 1}
    told = capsys.readouterr().out
    assert "images a person" in told
    assert to in told


def test_verification_bin(tmp_path, capsys):
    same = [True, False, True]
    raw = np.full((12, 10, 3), 9, np.uint8)
    images = [picture(0), picture(1), picture(0), picture(2), b"damaged", raw]
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((images, same)))
    info(path, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 6
    assert found["people"] is None
    assert (found["pairs"], found["genuine"]) == (3, 2)
    assert (found["unreadable"], found["duplicates"]) == (1, 1)
    assert found["unreadable_names"] == ["image 0 of pair 2"]
    assert found["image_sizes"] == {"16x20": 4, "10x12": 1}
    info(path)
    assert "no list of the pairs beside the .bin names them" in capsys.readouterr().out
    (tmp_path / "set_pairs.txt").write_text("not\ta\tlist of these pairs\n")
    assert info(path).people is None
    assert "who is in it is not known: " in capsys.readouterr().out


def test_the_list_beside_a_verification_bin_says_who_is_in_it(tmp_path, capsys):
    synthetic.write(tmp_path / "drawn", people=3, images_per_person=3, pairs_per_fold=2)
    rows = (tmp_path / "drawn" / "synthetic_pairs.txt").read_text().splitlines()[1:]
    names = {name for row in rows for name in row.split() if not name.isdigit()}
    assert info(tmp_path / "drawn" / "synthetic.bin").people == len(names) > 1
    assert "unknown" not in capsys.readouterr().out


def test_no_data_set_is_one_sentence(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    (tmp_path / "evil.bin").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.bin", "absent.bin", "absent"):
        with pytest.raises(UserError) as caught:
            info(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_histogram_ranges():
    rows = _histogram({1: 3, 7: 2, 6: 1, 501: 4})
    assert rows[0] == ("1", 3)
    assert ("6–10", 3) in rows
    assert rows[-1] == ("501 or more", 4)
    assert _histogram({5: 8147}) == [("5", 8147)]
