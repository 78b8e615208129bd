"""Folders, lists, tar shards, and recognising which is which."""

import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sphereface2.data import open_source, split_people
from sphereface2.data.convert import _folder_names
from sphereface2.data.folder import FolderSource, images_below
from sphereface2.data.listfile import ListSource
from sphereface2.data.locate import locate
from sphereface2.data.recordio import RecordIOSource, RecordIOWriter
from sphereface2.data.source import Source
from sphereface2.data.webdataset import WebDatasetSource
from sphereface2.errors import UserError
from sphereface2.files import digest


def files(root, contents):
    for name, data in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar(path, members):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def contents(source):
    return [(source.read(i), int(source.labels[i])) for i in range(len(source))]


def test_folder_sorts_people_and_images(tmp_path):
    files(
        tmp_path,
        {
            "zoe/2.jpg": b"z2",
            "zoe/10.JPG": b"z10",
            "anna/deep/er/x.png": b"a",
            "anna/notes.txt": b"no image",
            "nobody/readme.md": b"no image",
            ".hidden/y.jpg": b"no person",
        },
    )
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    assert source.class_names == ["anna", "zoe"]
    assert contents(source) == [(b"a", 0), (b"z10", 1), (b"z2", 1)]
    assert source.name(0) == "anna/deep/er/x.png"
    assert isinstance(source, Source)


def test_a_person_is_one_however_the_name_is_typed(tmp_path):
    """One letter or two for "é", a blank at the end: in folders and lists alike."""
    composed, two, blank = "Ren\u00e9e", "Rene\u0301e", "Ren\u00e9e "
    root = tmp_path / "set"
    files(root, {f"{n}/{i}.jpg": b"%d" % i for i, n in enumerate((composed, "Rudi", two, blank))})
    source = FolderSource(root)
    assert source.class_names == [two, "Rudi"]  # as the first is called
    assert contents(source) == [(b"2", 0), (b"0", 0), (b"3", 0), (b"1", 1)]
    lines = "".join(f"{composed}/0.jpg\t{name}\n" for name in (composed, "Rudi", two, blank))
    (root / "train.txt").write_text(lines)
    listed = ListSource(root / "train.txt")
    assert (listed.class_names, listed.labels.tolist()) == ([composed, "Rudi"], [0, 1, 0, 0])
    # A copy as folders keeps people apart whom a file of names calls alike.
    (root / "train.txt").write_text(f"{composed}/0.jpg\t0\n{two}/2.jpg\t1\n")
    (root / "names.txt").write_text(f"{composed}\n{two}\n")
    assert _folder_names(ListSource(root / "train.txt"), "folder") == ["0", "1"]


def test_pictures_behind_links_count_once_and_hidden_ones_never(tmp_path):
    root = files(
        tmp_path / "set", {"anna/1.gif": b"1", "anna/.2.jpg": b"", "anna/.thumbs/3.jpg": b""}
    )
    elsewhere = files(tmp_path / "elsewhere", {"bob/4.avif": b"4", "more/5.jpg": b"5"})
    (root / "bob").symlink_to(elsewhere / "bob")
    (root / "anna" / "deep").symlink_to(elsewhere / "more")
    for name, target in (("up", ".."), ("here", "."), ("root", "/"), ("dangling.jpg", "none")):
        (root / "anna" / name).symlink_to(target)
    (elsewhere / "more" / "back").symlink_to(root / "anna")
    expected = ["anna/1.gif", "anna/deep/5.jpg", "bob/4.avif"]
    source = FolderSource(root)
    assert [source.name(i) for i in range(len(source))] == expected
    assert images_below(root).images == expected


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there alone")
def test_a_name_that_is_not_utf_8_is_part_of_the_fingerprint(tmp_path):
    (tmp_path / "anna").mkdir()
    odd = os.fsencode(tmp_path) + b"/anna/caf\xe9.jpg"
    prints = set()
    for name in (odd, os.fsencode(tmp_path) + b"/anna/caf\xe8.jpg"):
        with open(name, "wb") as file:
            file.write(b"x")
        prints.add(FolderSource(tmp_path).fingerprint())
        os.unlink(name)
    assert len(prints) == 2
    ordinary = hashlib.sha256()
    for part in ("é".encode(), b"\1"):
        ordinary.update(len(part).to_bytes(8, "little") + part)
    assert digest("é", b"\1") == ordinary.hexdigest()


def test_list_takes_tabs_commas_and_blanks_in_names(tmp_path):
    files(tmp_path, {"a b.jpg": b"1", "c,d.jpg": b"2", "e.jpg": b"3"})
    text = "# comment\n\na b.jpg 2\nc,d.jpg\t0\ne.jpg, 1\r\n"
    (tmp_path / "my.lst").write_text(text)
    source = open_source(tmp_path / "my.lst")
    assert isinstance(source, ListSource)
    assert contents(source) == [(b"1", 2), (b"2", 0), (b"3", 1)]
    assert source.num_classes == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("e.jpg 3\ne.jpg one\ne.jpg 2\n", "line 2"),
        ("e.jpg anna\ne.jpg 1\ne.jpg bob\n", "line 2"),
        ("e.jpg 0\nlonely\n", "line 2"),
        ("e.jpg -1\n", "label -1"),
        ("e.jpg 1.5\n", "label 1.5"),
        ("", "no images"),
        ("absent.jpg 0\n", "none of the first 1 files"),
        (f"absent.jpg,{'A' * 200_000}\n", "none of the first 1 files"),
    ],
)
def test_bad_lists_name_the_line(tmp_path, text, message):
    files(tmp_path, {"e.jpg": b"3"})
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        ListSource(tmp_path / "l.txt")


def test_a_comma_in_one_path_of_a_list_with_blanks_is_part_of_it(tmp_path):
    files(tmp_path, {"a.jpg": b"1", "King, M.jpg": b"2"})
    (tmp_path / "l.txt").write_text("a.jpg anna\n" * 100 + "King, M.jpg king\n")
    source = ListSource(tmp_path / "l.txt")
    assert source.class_names == ["anna", "king"]
    assert source.read(100) == b"2"


def test_missing_file_of_a_list_is_an_os_error_when_read(tmp_path):
    files(tmp_path, {"e.jpg": b"3"})
    (tmp_path / "train.txt").write_text("e.jpg 0\ngone.jpg 0\n")
    source = open_source(tmp_path)
    with pytest.raises(OSError, match=r"gone\.jpg"):
        source.read(1)


def test_shards_by_cls_and_json_in_any_member_order(tmp_path):
    tar(
        tmp_path / "b.tar",
        [("k/2.json", json.dumps({"label": 4, "x": 1}).encode()), ("k/2.webp", b"two")],
    )
    tar(
        tmp_path / "a.tar",
        [
            ("0.jpg", b"zero"),
            ("0.cls", b"1\n"),
            ("1.cls", b"0"),
            ("1.jpeg", b"one" * 400),
            ("1.txt", b"caption"),
        ],
    )
    source = open_source(tmp_path)
    assert isinstance(source, WebDatasetSource)
    assert contents(source) == [(b"zero", 1), (b"one" * 400, 0), (b"two", 4)]
    assert source.name(2) == "b.tar:k/2"
    again = pickle.loads(pickle.dumps(source))
    assert contents(again) == contents(source)
    assert contents(open_source(tmp_path / "b.tar")) == [(b"two", 4)]


def test_shards_that_are_wrong(tmp_path):
    with pytest.raises(UserError, match="no label"):
        WebDatasetSource(tar(tmp_path / "a.tar", [("0.jpg", b"x")]))
    with pytest.raises(UserError, match=r"0\.cls has a label that is not a whole number"):
        WebDatasetSource(tar(tmp_path / "b.tar", [("0.jpg", b"x"), ("0.cls", b"anna")]))
    with pytest.raises(UserError, match="two images"):
        WebDatasetSource(tar(tmp_path / "c.tar", [("0.jpg", b"x"), ("0.png", b"x")]))
    for label in (b"9" * 400, b"1e999"):
        with pytest.raises(UserError, match="label inf of image 0 is not a whole number"):
            WebDatasetSource(tar(tmp_path / "c.tar", [("0.jpg", b"x"), ("0.cls", label)]))
    for label in (b"9" * 400, b"[" * 100_000):
        with pytest.raises(UserError, match="label that is not a whole number"):
            WebDatasetSource(tar(tmp_path / "c.tar", [("0.jpg", b"x"), ("0.json", label)]))
    members = [("0.jpg", b"x"), ("0.cls", b"1"), ("0.json", b'{"label": 0}')]
    with pytest.raises(UserError, match="sample 0 has two labels"):
        WebDatasetSource(tar(tmp_path / "c.tar", members))
    (tmp_path / "d.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match="not a complete tar"):
        WebDatasetSource(tmp_path / "d.tar")


@pytest.mark.skipif(sys.platform != "linux", reason="counts open files by /proc")
def test_of_thousands_of_shards_few_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("sphereface2.data.source._MOST_OPEN", 5)
    for k in range(20):
        tar(tmp_path / f"{k:02d}.tar", [("0.jpg", b"%d" % k), ("0.cls", b"0")])
    source = WebDatasetSource(tmp_path)
    order = list(np.random.default_rng(0).integers(20, size=400))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [b"%d" % k for k in order]
    shards = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    assert sum(shard.endswith(".tar") for shard in shards) <= 5 + 8
    assert pickle.loads(pickle.dumps(source)).read(7) == b"7"


def test_where_files_cannot_be_read_at_a_place_threads_take_turns(tmp_path, monkeypatch):
    monkeypatch.delattr("os.pread", raising=False)
    tar(
        tmp_path / "a.tar",
        [m for k in range(9) for m in ((f"{k}.jpg", b"%d" % k), (f"{k}.cls", b"0"))],
    )
    source = WebDatasetSource(tmp_path / "a.tar")
    order = list(np.random.default_rng(0).integers(9, size=400))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.read, order)) == [b"%d" % k for k in order]


def test_a_hard_link_in_a_shard_is_the_file_it_links_to(tmp_path):
    files(tmp_path / "set", {"1.jpg": b"one", "1.cls": b"0", "2.cls": b"1.0"})
    os.link(tmp_path / "set" / "1.jpg", tmp_path / "set" / "2.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "set", ".")
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert sum(member.islnk() for member in archive) == 1
    assert contents(open_source(tmp_path / "a.tar")) == [(b"one", 0), (b"one", 1)]


def test_shards_damaged_cut_or_joined_are_told(tmp_path):
    members = [
        (f"{k}.{end}", data) for k in range(3) for end, data in (("jpg", b"x"), ("cls", b"1"))
    ]
    whole = tar(tmp_path / "whole.tar", members).read_bytes()
    for name, data, message in (
        ("damaged", whole[:4096] + b"\xff" * 100 + whole[4196:], "behind byte 4,096 is no member"),
        ("joined", whole + whole, "several tar files in one"),
    ):
        (tmp_path / f"{name}.tar").write_bytes(data)
        with pytest.raises(UserError, match=message):
            WebDatasetSource(tmp_path / f"{name}.tar")
    (tmp_path / "cut.tar").write_bytes(whole[:4096])
    with pytest.warns(UserWarning, match="cut.tar lacks tar's mark of its end"):
        assert len(WebDatasetSource(tmp_path / "cut.tar")) == 2
    tar(tmp_path / "bare.tar", [*members, ("8.cls", b"0"), ("9.mp4", b""), ("9.cls", b"0")])
    with pytest.warns(UserWarning, match="2 labels have no image that can be read, 8 first"):
        assert len(WebDatasetSource(tmp_path / "bare.tar")) == 3


def test_files_that_macos_hides_beside_a_set_are_no_part_of_it(tmp_path, monkeypatch):
    tar(tmp_path / "shards" / "a.tar", [("0.jpg", b"x"), ("0.cls", b"0")])
    (tmp_path / "rec").mkdir()
    with RecordIOWriter(tmp_path / "rec") as writer:
        writer.add(0, b"x")
    (tmp_path / "rec" / "train.rec").rename(tmp_path / "rec" / "my.rec")
    (tmp_path / "rec" / "train.idx").rename(tmp_path / "rec" / "my.idx")
    for name in ("shards/._a.tar", "rec/._my.rec", "rec/._lfw.bin"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    for name in ("shards", "rec"):
        assert contents(open_source(tmp_path / name)) == [(b"x", 0)]
    monkeypatch.setenv("SPHEREFACE2_DATA", str(tmp_path / "rec"))
    assert locate().pairs == []


def test_open_source_recognises_recordio_and_refuses_the_rest(tmp_path):
    rec = tmp_path / "rec"
    rec.mkdir()
    with RecordIOWriter(rec) as writer:
        writer.add(0, b"x")
    assert isinstance(open_source(rec), RecordIOSource)
    assert isinstance(open_source(rec / "train.rec"), RecordIOSource)
    (rec / "train.rec").rename(rec / "other.rec")
    (rec / "train.idx").rename(rec / "other.idx")
    assert isinstance(open_source(rec), RecordIOSource)
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, message in (
        (tmp_path / "absent", "does not exist"),
        (empty, "holds no data set"),
        (files(tmp_path, {"x.dat": b"x"}) / "x.dat", "not a set of images"),
        (
            files(tmp_path / "f", {"p/readme.md": b"x"}),
            r"holds no images \(.jpg, .png, …\) in folders, one a person",
        ),
    ):
        with pytest.raises(UserError, match=message):
            open_source(path)


def test_split_people_by_label(tmp_path):
    sizes = [1, 3, 2, 0, 4, 1, 2]  # label 3 does not occur
    lines = [f"x.jpg {label}\n" for label, n in enumerate(sizes) for _ in range(n)]
    np.random.default_rng(0).shuffle(lines)
    files(tmp_path, {"x.jpg": b"x", "train.txt": "".join(lines).encode()})
    source = open_source(tmp_path)
    train, val, test = split_people(source, 2, seed=1, test_people=1)
    assert sorted([*train, *val, *test]) == list(range(13))
    whose = [set(source.labels[part].tolist()) for part in (train, val, test)]
    assert [len(people) for people in whose] == [3, 2, 1]
    assert not whose[0] & whose[1] | whose[0] & whose[2] | whose[1] & whose[2]
    assert all(sizes[person] >= 2 for person in whose[1] | whose[2])
    # Setting test people aside leaves the validation people who they were.
    assert np.array_equal(split_people(source, 2, seed=1).validation, val)
    assert len({tuple(split_people(source, 2, seed=s).validation) for s in range(20)}) > 1
    assert len(split_people(source, 0, seed=0).train) == 13
    # People with many images can be left out of what is judged, and the others stay where they are.
    fewer = split_people(source, 2, seed=1, test_people=1, max_images=3)
    assert np.array_equal(fewer.train, train)
    for part, before in ((fewer.validation, val), (fewer.test, test)):
        assert set(part) == {i for i in before if sizes[source.labels[i]] <= 3}
    assert len(fewer.validation) + len(fewer.test) < len(val) + len(test)
    with pytest.raises(UserError, match="all held-out people have more than 1 images"):
        split_people(source, 2, seed=1, max_images=1)
    with pytest.raises(UserError, match="= 5 must leave people to train on"):
        split_people(source, 4, seed=0, test_people=1)
