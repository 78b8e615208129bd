"""What users have on disk under each format's name: every variant means what it says."""

import json
import os
import pickle
import struct
import sys

import cv2
import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sphereface2.align.folder import align
from sphereface2.data import FaceDataset, load_pairs, open_source
from sphereface2.data.folder import FolderSource
from sphereface2.data.info import info
from sphereface2.data.listfile import ListSource
from sphereface2.data.recordio import RecordIOSource, pack, write_record
from sphereface2.data.sampler import BatchKey
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError

# --- RecordIO without its index ------------------------------------------------------------------


def packed(folder, *, header, people, flag=0, index=True):
    """A set of ``people`` (images a person) with its header record first, last or absent."""
    folder.mkdir()
    labels = [label for label, count in enumerate(people) for _ in range(count)]
    end, records = len(labels) + 1, {}
    image = cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()
    for key, label in enumerate(labels, 1 if header else 0):
        records[key] = pack((label, key) if flag else float(label), image + bytes([key]))
    if header:
        bounds = np.cumsum([1, *people])
        for person in range(len(people)):
            records[end + person] = pack((bounds[person], bounds[person + 1]))
        top = {0: pack((end, end + len(people)))}
        records = {**top, **records} if header == "first" else {**records, **top}
    lines = []
    with (folder / "train.rec").open("wb") as file:
        for key, payload in records.items():
            lines.append(f"{key}\t{file.tell()}\n")
            write_record(file, payload)
    if index:
        (folder / "train.idx").write_text("".join(lines))
    return folder, labels


def lost(folder):
    (folder / "train.idx").unlink()


def cut(folder):
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    (folder / "train.idx").write_text("".join(lines[: len(lines) // 2]))


def with_a_hole(folder):
    lines = (folder / "train.idx").read_text().splitlines(keepends=True)
    (folder / "train.idx").write_text("".join(lines[:3] + lines[6:]))


def of_another(folder):
    other, _ = packed(folder.parent / "other", header="first", people=[1, 9])
    (folder / "train.idx").write_bytes((other / "train.idx").read_bytes())


@pytest.mark.parametrize("damage", [None, lost, cut, with_a_hole, of_another])
@pytest.mark.parametrize("flag", [0, 2])
@pytest.mark.parametrize("header", ["first", "last", None])
def test_recordio_in_any_order_with_any_index(tmp_path, header, flag, damage):
    folder, labels = packed(tmp_path / "set", header=header, people=[4] * 6, flag=flag)
    if damage is None:
        source = RecordIOSource(folder)
    else:
        damage(folder)
        with pytest.warns(UserWarning, match="index rebuilt"):
            source = RecordIOSource(folder)
    assert source.labels.tolist() == labels
    assert source.num_classes == 6
    first = 1 if header else 0
    assert [source.read(i)[-1] for i in range(24)] == list(range(first, first + 24))


def test_a_rec_file_that_ends_between_two_records_is_refused(tmp_path):
    folder, _ = packed(tmp_path / "set", header="first", people=[4] * 6)
    data = (folder / "train.rec").read_bytes()
    offset = int((folder / "train.idx").read_text().splitlines()[12].split()[1])
    (folder / "train.rec").write_bytes(data[:offset])
    with (
        pytest.warns(UserWarning, match="outside the file"),
        pytest.raises(UserError, match="declares 24 images but there are 11"),
    ):
        RecordIOSource(folder)


def test_a_rec_file_cut_while_it_is_read_is_an_error_and_no_bus_fault(tmp_path):
    folder, _ = packed(tmp_path / "set", header="first", people=[4] * 6)
    source = RecordIOSource(folder)
    source.read(0)
    os.truncate(folder / "train.rec", 300)
    dataset = FaceDataset(source, augmentation=Augmentation.none(8))
    with pytest.raises(UserError, match=r"ends before byte .* cut since it was opened"):
        source.read(23)
    with pytest.raises(UserError, match="images cannot be read"):
        dataset[BatchKey(0, 0, np.arange(24))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "2147483647,112,112",
            "property gives 2147483647 classes, expected 0 to 67,108,864; correct",
        ),
        ("-3,1,1", "property gives -3 classes, expected 0 to"),
        ("99999999999999999999", "property gives 99999999999999999999 classes, expected 0 to"),
        ("many", "property should read 'classes,height,width'; correct"),
    ],
)
def test_a_property_that_no_set_has_is_a_sentence(tmp_path, text, message):
    folder, _ = packed(tmp_path / "set", header="first", people=[2, 2])
    (folder / "property").write_text(text)
    with pytest.raises(UserError, match=message):
        RecordIOSource(folder)


def test_a_label_near_the_end_of_int32_is_a_sentence(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "list.txt").write_text("a.jpg 0\na.jpg 2147483647\n")
    with pytest.raises(UserError, match=r"label 2147483647 of image 1 .* number the people from 0"):
        ListSource(tmp_path / "list.txt")


# --- folders -------------------------------------------------------------------------------------


pillow_heif.register_heif_opener()  # to write them


def images_in(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


def test_images_under_every_suffix_are_read_and_the_rest_counted(tmp_path, capsys):
    root = tmp_path / "set"
    names = "a.jfif b.jpe c.pgm d.jp2 e.tga f.PNG g.tif h.heic i.qoi".split()  # noqa: SIM905
    images_in(root / "ann", *names)
    (root / "ann" / "j.jif").write_bytes((root / "ann" / "a.jfif").read_bytes())
    for name in ("notes.txt", "clip.mp4", "raw.cr2", "clip2.mp4", "LICENSE"):
        (root / "ann" / name).write_bytes(b"x")
    (root / "beside.jpg").write_bytes(b"x")
    with pytest.warns(UserWarning, match="6 files were not read: 2 .mp4") as told:
        source = open_source(root)
    assert len(source) == len(names) + 1
    assert all(kind in str(told[0].message) for kind in (".cr2", ".txt", "without a suffix"))
    found = info(root, as_json=True)
    assert found.unreadable == 0 and found.unread[".mp4"] == 2
    assert '"unread"' in capsys.readouterr().out
    info(root)
    assert "6 files were not read" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(UserError, match="no face could be cropped"):
        align(root, tmp_path / "crops", workers=1)
    report = json.loads((tmp_path / "crops" / "report.json").read_text())
    assert any("5 files were not read" in note for note in report["passed_over"])


def test_heic_without_its_package_is_counted_with_the_remedy(tmp_path, monkeypatch):
    images_in(tmp_path / "ann", "1.png", "2.heic", "3.heic")
    from sphereface2.data import folder

    monkeypatch.setattr(folder, "SUFFIXES", folder.SUFFIXES - {".heic"})
    with pytest.warns(UserWarning, match=r"2 files were not read: 2 \.heic; pip install .*heif"):
        assert len(FolderSource(tmp_path)) == 1


def test_a_folder_that_is_the_set_itself_or_closed_is_named(tmp_path, monkeypatch):
    root = tmp_path / "set"
    images_in(root, "ann/1.png", "bob/2.png")
    (root / "me").symlink_to(root)
    (root / "bob" / "up").symlink_to("..")
    (root / "bob" / "loop.png").symlink_to("loop.png")
    with pytest.warns(UserWarning, match="not entered|not read") as told:
        source = FolderSource(root)
    assert source.class_names == ["ann", "bob"] and len(source) == 2
    text = " ".join(str(one.message) for one in told)
    assert "link to a folder above them: bob/up, me" in text and "1 broken link" in text
    real = os.scandir

    def closed(path):
        if os.fspath(path).endswith("bob"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(UserError, match=r"bob cannot be entered: Permission denied"):
        FolderSource(root)


# --- lists ---------------------------------------------------------------------------------------

PATHS = ["p q/a,1.jpg", "p q/b.jpg", "r/c.jpg"]
LABELS = [1, 1, 0]


def lines(form):
    rows = zip(range(3), PATHS, LABELS, strict=True)
    return "\n".join(form.format(i=i, path=path, label=label) for i, path, label in rows)


LISTS = {
    "path and label": lines("{path} {label}"),
    "tabs": lines("{path}\t{label}.0"),
    "MXNet": lines("{i}\t{label}.000000\t{path}"),
    "MXNet with boxes": lines("{i}\t{label}\t1.5\t7.25\t{path}"),
    "InsightFace": lines("1\t{path}\t{label}"),
    "InsightFace with boxes": lines("0\t{path}\t{label}\t1\t2\t3\t4"),
    "label first": lines("{label}\t{path}"),
    "CSV": lines('"{path}",{label}'),
    "CSV with a header": "image_path,identity\n" + lines('"{path}",{label}'),
    "CSV with more columns": "id,label,x,filename\n" + lines('{i},{label},0.5,"{path}"'),
    "backslashes": lines("{path}\t{label}").replace("/", "\\"),
    "a mark and Windows' lines": "\ufeff" + lines("{path}\t{label}").replace("\n", "\r\n"),
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_every_layout(tmp_path, form):
    for path in PATHS:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(path.encode())
    (tmp_path / "list.lst").write_bytes(LISTS[form].encode())
    source = ListSource(tmp_path / "list.lst")
    assert [source.read(i) for i in range(3)] == [p.encode() for p in PATHS]
    assert source.labels.tolist() == LABELS
    assert source.class_names is None


def test_labels_that_are_names_are_numbered_and_kept(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "l.csv").write_text("path,name\na.jpg,Zoë\na.jpg,Ann\na.jpg,Nan\na.jpg,Zoë\n")
    source = ListSource(tmp_path / "l.csv")
    assert source.class_names == ["Ann", "Nan", "Zoë"]
    assert source.labels.tolist() == [2, 0, 1, 2]
    (tmp_path / "l.csv").write_text("path,name\na.jpg,Zo\u00eb\na.jpg,Zoe\u0308\n")
    assert ListSource(tmp_path / "l.csv").class_names == ["Zo\u00eb"]


def test_a_mark_in_names_is_no_part_of_a_name(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"x")
    (tmp_path / "train.txt").write_text("a.jpg 0\na.jpg 1\n")
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfAnn\r\nBob\r\n")
    assert open_source(tmp_path).class_names == ["Ann", "Bob"]
    (tmp_path / "names.txt").write_text("Ann\nBob\nCy\n")  # who has no images here
    assert open_source(tmp_path).class_names == ["Ann", "Bob"]
    (tmp_path / "names.txt").write_text("Ann\n")
    with pytest.warns(UserWarning, match=r"names\.txt is not used: it names 1 of 2 people"):
        assert open_source(tmp_path).class_names is None


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_any_text_is_a_list_or_a_sentence(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(text.encode())
    for read in (ListSource, load_pairs):
        with pytest.raises(UserError) as caught:
            read(path)
        assert "\n" not in str(caught.value)


# --- .bin ----------------------------------------------------------------------------------------

PIXELS = [np.full((6, 5, 3), 40 * i, np.uint8) for i in range(4)]
ENCODED = [cv2.imencode(".png", p)[1] for p in PIXELS]
IMAGES = {
    "bytes": [e.tobytes() for e in ENCODED],
    "bytearrays": [bytearray(e.tobytes()) for e in ENCODED],
    "(N,) arrays": [e.reshape(-1) for e in ENCODED],
    "(N, 1) arrays": [e.reshape(-1, 1) for e in ENCODED],
    "(1, N) arrays": [e.reshape(1, -1) for e in ENCODED],
    "pixels": PIXELS,
    "grey pixels": [p[..., 0] for p in PIXELS],
    "one stacked array": np.stack(PIXELS),
    "one stacked grey array": np.stack(PIXELS)[..., 0],
}
VERDICTS = {
    "booleans": [True, False],
    "numpy booleans": [np.True_, np.False_],
    "ints": [1, 0],
    "numpy ints": [np.int64(1), np.int32(0)],
    "floats": [1.0, 0.0],
    "numpy floats": [np.float32(1), np.float64(0)],
    "words": ["True", "0"],
    "a tuple": (True, False),
    "an array of words": np.array(["True", "False"]),
    "an array of bytes": np.array([b"1", b"0"]),
    "a column": np.array([[1], [0]]),
    **{f"an array of {t}": np.array([1, 0], t) for t in ("?", "i1", "u2", ">i4", "i8", "f4", "f8")},
}


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("images", IMAGES)
def test_bin_images_of_every_kind(tmp_path, images, protocol):
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((IMAGES[images], [True, False]), protocol))
    found = load_pairs(path)
    for image, pixels in zip(found.images, PIXELS, strict=True):
        pixels_found = image
        if isinstance(image, bytes):
            pixels_found = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR)
        np.testing.assert_array_equal(pixels_found, pixels)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("verdicts", VERDICTS)
def test_bin_verdicts_of_every_kind(tmp_path, verdicts, protocol):
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((IMAGES["bytes"], VERDICTS[verdicts]), protocol))
    assert load_pairs(path).same.tolist() == [True, False]


@pytest.mark.parametrize("verdict", [0.5, float("nan"), 2, -1, "maybe", None, b"\xff", [True]])
def test_a_verdict_that_is_none_is_named(tmp_path, verdict):
    path = tmp_path / "set.bin"
    path.write_bytes(pickle.dumps((IMAGES["bytes"], [True, verdict])))
    with pytest.raises(UserError, match="verdict of pair 1"):
        load_pairs(path)


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",  # bytearray(2**31 - 1)
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.",
        pickle.dumps(np.zeros(1, "V8"), 2),
        pickle.dumps(np.array([object()], object), 2)[:-30] + b".",
        pickle.dumps(np.zeros(1, "M8[s]"), 2),
        pickle.dumps(np.dtype([("a", "u1"), ("b", "O")]), 2),
    ],
)
def test_the_reader_admits_no_more_than_numbers_and_text(tmp_path, program):
    (tmp_path / "set.bin").write_bytes(program)
    with pytest.raises(UserError) as caught:
        load_pairs(tmp_path / "set.bin")
    assert "\n" not in str(caught.value)


# --- pair lists ----------------------------------------------------------------------------------

TRUE = ["p/a.jpg", "p/b.JPG"], ["p/a.jpg", "q/c.png"]
PAIR_LISTS = {
    "label first": "1 {0} {1}\n0 {2} {3}",
    "label last": "{0} {1} 1\n{2} {3} 0",
    "words": "True\t{0}\t{1}\nFalse\t{2}\t{3}",
    "floats": "1.0,{0},{1}\n0.0,{2},{3}",
    "floats last": "{0},{1},1.0\n{2},{3},0.0",
    "minus one": "1 {0} {1}\n-1 {2} {3}",
    "header": "label,path0,path1\n1,{0},{1}\n0,{2},{3}",
    "header, label last": "image1,image2,same\n{0},{1},True\n{2},{3},False",
    "header, more columns": "id,file1,file2,is_same\n7,{0},{1},1\n1,{2},{3},0",
    "an unknown header": "left,right,outcome\n{0},{1},1\n{2},{3},0",
    "mark": "\ufeff1 {0} {1}\n0 {2} {3}",
    "CSV's quotes": '"1","{0}","{1}"\n"0","{2}","{3}"',
}


@pytest.mark.parametrize("form", PAIR_LISTS)
def test_pair_lists_of_every_layout(tmp_path, form):
    files = [name for pair in TRUE for name in pair]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    # The list may know the files under another suffix than they have.
    listed = [name.replace(".JPG", ".jpg").replace(".png", "") for name in files]
    (tmp_path / "list.txt").write_text(PAIR_LISTS[form].format(*listed), encoding="utf-8")
    found = load_pairs(tmp_path / "list.txt")
    assert found.same.tolist() == [True, False]
    assert [found.images[i] for i in found.pairs.ravel()] == [name.encode() for name in files]


LFW_LISTS = {
    "numbers for names": "12\t1\t2\n12\t1\t1\t2\n1\t1\t2\n0\t1\t1\t1\n",
    "blanks": "Ann 1 2\nAnn 1 Bob 2\nBob 1 2\nCy 1 Bob 1\n",
    "folds": "1\t2\nAnn\t1\t2\nBob\t1\t2\nAnn\t1\tBob\t2\nCy\t1\tBob\t1\n",
    "CSV": "name,imagenum1,imagenum2,\nAnn,1,2,\nBob,1,2,\nAnn,1,Bob,2\nCy,1,Bob,1\n",
    "CSV of impostors": "name,imagenum1,name,imagenum2\nAnn,1,Bob,2\nCy,1,Bob,1\n",
}


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("form", LFW_LISTS)
def test_lfw_lists_with_any_header_people_and_suffix(tmp_path, form, suffix):
    for person in ("12", "1", "0", "Ann", "Bob", "Cy"):
        (tmp_path / person).mkdir()
        for number in (1, 2):
            (tmp_path / person / f"{person}_{number:04d}{suffix}").write_text(f"{person} {number}")
    (tmp_path / "pairs.txt").write_text(LFW_LISTS[form])
    found = load_pairs(tmp_path / "pairs.txt")
    lines = [line.split() for line in LFW_LISTS[form].replace(",", " ").splitlines()]
    lines = [line for line in lines if line[0] != "name" and len(line) > 2]
    for (i, j), same, line in zip(found.pairs, found.same, lines, strict=True):
        other = line[0] if len(line) == 3 else line[2]
        assert found.images[i] == f"{line[0]} {line[1]}".encode()
        assert found.images[j] == f"{other} {line[-1]}".encode()
        assert same == (len(line) == 3)
    assert found.people is not None


@pytest.mark.parametrize("text", ["9" * 5000 + "\nx 1 2\n", f"x {'9' * 5000} 2\nx 1 3\n"])
def test_a_number_too_long_for_one_is_a_sentence(tmp_path, text):
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(UserError, match="line 1: expected"):
        load_pairs(tmp_path / "pairs.txt")


def test_a_training_list_is_no_verification_set(tmp_path):
    (tmp_path / "train.txt").write_text("a.jpg 11\nb.jpg 11\na.jpg 0\nb.jpg 0\n")
    with pytest.raises(UserError, match="line 1: the label of a pair is 0, 1 or its fold up to 10"):
        load_pairs(tmp_path / "train.txt")


def test_people_called_by_numbers_name_a_bin_too(tmp_path):
    (tmp_path / "set.bin").write_bytes(pickle.dumps((IMAGES["bytes"], [True, False])))
    (tmp_path / "set_pairs.txt").write_text("1 1 2\n1 1 0 1\n")
    found = load_pairs(tmp_path / "set.bin", names=tmp_path / "set_pairs.txt")
    assert found.people is not None and len(set(found.people.tolist())) == 2


def test_nothing_here_needs_torch():
    import subprocess

    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import sphereface2.data.info, sphereface2.data.convert, sphereface2.data.suites\n"
        "import sphereface2.data.fetch, sphereface2.align, sphereface2.images\n"
        "from sphereface2.data import PairSet, load_pairs, open_source, split_people\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_longer_than_the_file_are_refused(tmp_path):
    (tmp_path / "train.rec").write_bytes(struct.pack("<II", 0xCED7230A, 5000) + bytes(24))
    with pytest.raises(UserError, match="ends inside the record"):
        RecordIOSource(tmp_path)
