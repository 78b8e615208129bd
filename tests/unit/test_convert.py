"""Conversions keep bytes, labels and names, in any direction, or leave nothing behind."""

import itertools
import os
import pickle
import sys
import tarfile

import cv2
import numpy as np
import pytest
import webdataset

from sphereface2.data import open_source
from sphereface2.data.convert import Encoding, convert, extension_of
from sphereface2.data.locate import ABOUT, DRAWN, locate
from sphereface2.data.opening import load_pairs
from sphereface2.errors import UserError
from sphereface2.images import decode

FORMATS = ("folder", "list", "recordio", "webdataset")
PEOPLE = {"anna": 3, "bela bach": 1, "zoë": 12}


def picture(seed, extension="jpg"):
    image = np.random.default_rng(seed).integers(0, 256, (20, 16, 3), dtype=np.uint8)
    return cv2.imencode(f".{extension}", image)[1].tobytes()


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "original"
    seeds = itertools.count()
    for person, count in PEOPLE.items():
        for number in range(count):
            extension = "png" if number == 2 else "jpg"
            path = root / person / f"{number:02d}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(next(seeds), extension))
    return root


def contents(path):
    source = open_source(path)
    return [(source.read(i), int(source.labels[i])) for i in range(len(source))]


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMATS, FORMATS)))
def test_every_direction_keeps_bytes_labels_and_names(folder, tmp_path, first, second):
    expected = contents(folder)
    done = convert(folder, tmp_path / "one", to=first)
    assert (done.images, done.people, done.unreadable) == (16, 3, [])
    convert(tmp_path / "one", tmp_path / "two", to=second)
    assert contents(tmp_path / "two") == expected
    convert(tmp_path / "two", tmp_path / "three", to="folder")
    assert open_source(tmp_path / "three").class_names == list(PEOPLE)
    assert sorted(p.suffix for p in (tmp_path / "three").rglob("*.*")).count(".png") == 2


@pytest.mark.parametrize("to", FORMATS)
def test_a_drawn_set_stays_known_as_one(folder, tmp_path, to):
    (folder / ABOUT).write_text(f"{DRAWN} faces\n")
    convert(folder, tmp_path / "copy", to=to)
    assert locate(str(tmp_path / "copy")).is_synthetic
    assert len(open_source(tmp_path / "copy")) == 16


def test_shards_are_what_the_webdataset_library_reads(folder, tmp_path):
    convert(folder, tmp_path / "shards", to="webdataset")
    shard = str(tmp_path / "shards" / "shard-000000.tar")
    samples = list(webdataset.WebDataset(shard, shardshuffle=False, empty_check=False))
    got = [(s.get("jpg") or s["png"], int(s["cls"])) for s in samples]
    assert got == contents(folder)


def test_shards_that_the_webdataset_library_wrote(folder, tmp_path):
    expected = contents(folder)
    with webdataset.ShardWriter(str(tmp_path / "s-%03d.tar"), maxcount=5, verbose=0) as sink:
        for i, (image, label) in enumerate(expected):
            extra = {"cls": label} if i % 2 else {"json": {"label": label}}
            sink.write({"__key__": f"{i:06d}", "jpg": image, **extra})
    assert len(list(tmp_path.glob("s-*.tar"))) == 4
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in tmp_path.glob("s-*.tar"):
        path.rename(shards / path.name)
    assert contents(shards) == expected
    with tarfile.open(shards / "s-001.tar") as archive:
        assert len(archive.getnames()) == 10


def test_labels_without_names_keep_their_numbers(tmp_path):
    (tmp_path / "x.jpg").write_bytes(picture(0))
    (tmp_path / "l.txt").write_text("".join(f"x.jpg {label}\n" for label in (11, 2, 11, 0)))
    for to in ("recordio", "webdataset", "list"):
        convert(tmp_path / "l.txt", tmp_path / to, to=to)
        assert open_source(tmp_path / to).labels.tolist() == [0, 2, 11, 11]
        assert open_source(tmp_path / to).class_names is None
    convert(tmp_path / "recordio", tmp_path / "folder", to="folder")
    assert open_source(tmp_path / "folder").class_names == ["00", "02", "11"]


def test_unreadable_and_missing_images_are_left_out_and_named(folder, tmp_path, capsys):
    (folder / "anna" / "01.jpg").write_bytes(b"damaged")
    (folder / "bela bach" / "00.jpg").write_bytes(b"")
    lines = [f"{p.relative_to(folder).as_posix()}\t{0}\n" for p in sorted(folder.rglob("*.jpg"))]
    (folder / "train.txt").write_text("".join(lines) + "zoë/99.jpg\t1\n")
    done = convert(folder / "train.txt", tmp_path / "out", to="recordio")
    assert done.unreadable == ["anna/01.jpg", "bela bach/00.jpg", "zoë/99.jpg"]
    assert done.images == len(lines) - 2
    error = capsys.readouterr().out
    assert "3 unreadable" in error
    assert "zoë/99.jpg" in error


def test_failures_leave_no_target(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="exists already"):
        convert(folder, folder, to="recordio")
    with pytest.raises(UserError, match="choose one of folder, list"):
        convert(folder, tmp_path / "out", to="tfrecord")
    for path in folder.rglob("*.*g"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="none of the 16"):
        convert(folder, tmp_path / "out", to="folder")

    def interrupted(data):
        raise KeyboardInterrupt

    monkeypatch.setattr("sphereface2.data.convert.decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(folder, tmp_path / "out", to="webdataset")
    with pytest.raises(UserError, match=r"/x\.rec is a file's name.*: name it .*/x$"):
        convert(str(folder), str(tmp_path / "x.rec"), to="recordio")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def smooth(seed, side=48):
    """A picture that survives compression: a few random colours, blurred."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize(("encode", "most"), [("webp", 8), ("jpg", 12), ("png", 2)])
def test_a_smaller_copy_shows_the_same_images(tmp_path, encode, most):
    for seed in range(6):
        path = tmp_path / "faces" / "ab"[seed % 2] / f"{seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), smooth(seed))
    for name in ("one", "two"):
        quality = None if encode == "png" else 90
        options = {"to": "recordio", "encode": encode, "quality": quality, "size": 32}
        convert(tmp_path / "faces", tmp_path / name, **options)
    files = [(tmp_path / name / "train.rec").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    assert (tmp_path / "one" / "property").read_text().strip() == "2,32,32"
    for (ours, label), (original, expected) in zip(
        contents(tmp_path / "one"), contents(tmp_path / "faces"), strict=True
    ):
        assert (label, extension_of(ours)) == (expected, encode)
        small = cv2.resize(decode(original), (32, 32), interpolation=cv2.INTER_AREA)
        assert np.abs(decode(ours).astype(int) - small).mean() < most
    # Nothing is enlarged.
    convert(tmp_path / "faces", tmp_path / "large", to="list", encode=encode, size=99)
    assert {decode(image).shape for image, _ in contents(tmp_path / "large")} == {(48, 48, 3)}


def test_a_verification_set_becomes_a_smaller_bin(tmp_path, folder):
    images = [cv2.imencode(".png", smooth(seed))[1].tobytes() for seed in range(5)]
    pairs = [(0, 1), (2, 3), (0, 4), (1, 3)]
    same = [True, False, True, False]
    content = ([images[i] for pair in pairs for i in pair], same)
    (tmp_path / "set.bin").write_bytes(pickle.dumps(content))
    done = convert(tmp_path / "set.bin", tmp_path / "small.bin", to="bin", encode="png", size=24)
    assert done.images == 5
    small = load_pairs(tmp_path / "small.bin")
    assert small.same.tolist() == same
    assert len(small.images) == 5
    for (i, j), (first, second) in zip(small.pairs, pairs, strict=True):
        for ours, original in ((i, first), (j, second)):
            expected = cv2.resize(decode(images[original]), (24, 24), interpolation=cv2.INTER_AREA)
            assert np.array_equal(decode(small.images[ours]), expected)
    (tmp_path / "bad.bin").write_bytes(pickle.dumps(([*content[0][:7], b"damaged"], same)))
    for encode in ("webp", None):
        with pytest.raises(UserError, match="image 1 of pair 3 cannot be read"):
            convert(tmp_path / "bad.bin", tmp_path / "x.bin", to="bin", encode=encode)
    assert not (tmp_path / "x.bin").exists()


def test_a_bin_has_the_folds_of_the_list_that_it_is_made_from(tmp_path):
    for k in range(80):
        (tmp_path / f"p_{k}.jpg").write_bytes(picture(k))
    labels = np.repeat([1, 0], 20)  # CALFW's list: the genuine pairs may all stand first
    lines = [f"p_{2 * k + side}.jpg {labels[k]}\n" for k in range(40) for side in range(2)]
    (tmp_path / "list.txt").write_text("".join(lines))
    convert(tmp_path / "list.txt", tmp_path / "set.bin", to="bin")
    listed, packed = load_pairs(tmp_path / "list.txt"), load_pairs(tmp_path / "set.bin")

    def folds(found):
        first = [found.images[index] for index in found.pairs[:, 0]]
        return sorted(zip(first, found.folds.tolist(), found.same.tolist(), strict=True))

    assert folds(packed) == folds(listed)
    assert sorted(packed.same[packed.folds == 3]) == [False, False, True, True]
    (tmp_path / "list.txt").write_text("".join(lines[:22] + lines[40:44]))
    with pytest.warns(UserWarning, match="will be read in ten of equal length"):
        convert(tmp_path / "list.txt", tmp_path / "odd.bin", to="bin")


@pytest.mark.parametrize("wrong", [{"format": "gif"}, {"quality": 0}, {"size": 2}])
def test_an_encoding_out_of_range(wrong):
    with pytest.raises(UserError, match=r"'webp', 'png', got 'gif'|≥ 1 and ≤ 100, got 0|≥ 8"):
        Encoding(**wrong)


def test_names_from_a_file_cannot_lead_out_of_the_target(folder, tmp_path):
    convert(folder, tmp_path / "rec", to="recordio")
    (tmp_path / "rec" / "names.txt").write_text("../escaped\nb\nc\n")
    convert(tmp_path / "rec", tmp_path / "out", to="folder")
    assert open_source(tmp_path / "out").class_names == ["0", "1", "2"]
    assert not (tmp_path / "escaped").exists()


def test_names_that_differ_in_capitals_only_become_numbers(folder, tmp_path):
    """Many file systems would have one folder for both people."""
    convert(folder, tmp_path / "rec", to="recordio")
    (tmp_path / "rec" / "names.txt").write_text("Ann\nann\nb\n")
    convert(tmp_path / "rec", tmp_path / "out", to="folder")
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [*"012"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there alone")
@pytest.mark.parametrize("to", FORMATS)
def test_names_that_text_cannot_hold_are_escaped(tmp_path, to):
    for name in (b"an\xff", b"b\rob", "c\x85y".encode()):
        place = os.path.join(os.fsencode(tmp_path), b"set", name)
        os.makedirs(place)
        with open(os.path.join(place, b"1.jpg"), "wb") as file:
            file.write(picture(0))
    convert(tmp_path / "set", tmp_path / "out", to=to)
    found = open_source(tmp_path / "out")
    assert found.labels.tolist() == [0, 1, 2]
    names = ["an\\udcff", "b\\rob", "c\\x85y"]
    assert found.class_names == (["0", "1", "2"] if to == "folder" else names)


@pytest.mark.parametrize("extension", ["jpg", "png", "webp", "bmp", "tif", "ppm"])
def test_extension_by_content(extension):
    assert extension_of(picture(0, extension)) == extension
