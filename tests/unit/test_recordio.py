"""RecordIO against bytes put together by hand, following the layout and not our writer."""

import pickle
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.data.recordio import RecordIOSource, RecordIOWriter
from sphereface2.errors import UserError

MAGIC = 0xCED7230A
MAGIC_BYTES = b"\x0a\x23\xd7\xce"


def part(data: bytes, kind: int = 0) -> bytes:
    head = struct.pack("<II", MAGIC, (kind << 29) | len(data))
    return head + data + b"\0" * (-len(data) % 4)


def header(label: float, labels: tuple[float, ...] = ()) -> bytes:
    return struct.pack("<IfQQ", len(labels), label, 0, 0) + struct.pack(f"<{len(labels)}f", *labels)


def write(folder, records, *, keys=None, index=True, suffix="train"):
    offsets, content = [], b""
    for record in records:
        offsets.append(len(content))
        content += record
    (folder / f"{suffix}.rec").write_bytes(content)
    if index:
        keys = range(len(records)) if keys is None else keys
        lines = "".join(f"{k}\t{o}\n" for k, o in zip(keys, offsets, strict=True))
        (folder / f"{suffix}.idx").write_text(lines)
    return folder


def with_header_record(people):
    """Records of {label: [image, …]} with key 0 and one record a person."""
    images = [(label, image) for label, images in people.items() for image in images]
    end = len(images) + 1
    records = [part(header(0, (end, end + len(people))))]
    records += [part(header(label) + image) for label, image in images]
    first = 1
    for members in people.values():
        records.append(part(header(0, (first, first + len(members)))))
        first += len(members)
    return records


def test_header_record_bounds_the_images(tmp_path):
    people = {0: [b"one", b"three"], 1: [b"a longer one"], 2: [b"", b"x"]}
    source = RecordIOSource(write(tmp_path, with_header_record(people)))
    assert len(source) == 5
    assert source.labels.tolist() == [0, 0, 1, 2, 2]
    assert source.labels.dtype == np.int64
    assert source.num_classes == 3
    assert [source.read(i) for i in range(5)] == [b"one", b"three", b"a longer one", b"", b"x"]
    assert "key 3" in source.name(2)


def test_without_header_record_every_key_is_an_image(tmp_path):
    # Key 0 has flag 2 here as well, but image bytes behind its labels: it is an image.
    records = [part(header(9, (3, 7)) + b"first"), part(header(1) + b"second")]
    write(tmp_path, records, keys=[0, 5])
    (tmp_path / "property").write_text("6,112,112\n")
    source = RecordIOSource(tmp_path / "train.rec")
    assert source.labels.tolist() == [3, 1]
    assert source.num_classes == 6
    assert [source.read(i) for i in range(2)] == [b"first", b"second"]


def test_split_record_gets_its_magic_back(tmp_path):
    # header 24 bytes, so the image's byte 4 is aligned: the writer drops the magic there.
    image = b"abcd" + MAGIC_BYTES + b"efgh" + MAGIC_BYTES + b"ij"
    first, middle, last = header(1) + b"abcd", b"efgh", b"ij"
    split = part(first, 1) + part(middle, 2) + part(last, 3)
    source = RecordIOSource(write(tmp_path, [part(header(0) + b"whole"), split]))
    assert source.read(1) == image
    assert source.read(0) == b"whole"
    assert source.labels.tolist() == [0, 1]


@pytest.mark.parametrize("label", ["nan", "inf", "-inf"])
def test_a_header_that_says_no_number_promises_none(tmp_path, label):
    records = [header(0, (float(label), 2.0)), header(0) + b"a", header(1) + b"b"]
    (tmp_path / "train.rec").write_bytes(b"".join(map(part, records)))
    with pytest.warns(UserWarning, match="index rebuilt"):
        source = RecordIOSource(tmp_path)
    assert [source.read(i) for i in range(2)] == [b"a", b"b"]


def test_record_split_inside_its_header(tmp_path):
    payload = header(2)[:8] + MAGIC_BYTES + header(2)[12:] + b"image"
    split = part(payload[:8], 1) + part(payload[12:], 3)
    source = RecordIOSource(write(tmp_path, [split]))
    assert source.labels.tolist() == [2]
    assert source.read(0) == b"image"


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_text(""),
        lambda path: path.write_text("0\t0\n1\tnonsense\n"),
        lambda path: path.write_text("".join(path.read_text().splitlines(True)[:-2])),
        lambda path: path.write_text(path.read_text()[:-3]),
        lambda path: path.write_text(path.read_text().replace("\t40\n", "\t44\n")),
        lambda path: path.write_text(path.read_text().replace("\t40\n", "\t41\n")),
        lambda path: path.write_text(path.read_text().replace("\t40\n", "\t0\n")),
        lambda path: path.write_text(path.read_text().replace("\t40\n", "\t-4\n")),
        lambda path: path.write_text(path.read_text().replace("\t40\n", "\t99999999999\n")),
    ],
)
def test_damaged_index_is_rebuilt(tmp_path, damage):
    write(tmp_path, with_header_record({0: [b"one"], 1: [b"two", b"three"]}))
    damage(tmp_path / "train.idx")
    with pytest.warns(UserWarning, match=r"train\.idx.*rebuilt"):
        source = RecordIOSource(tmp_path)
    assert source.labels.tolist() == [0, 1, 1]
    assert [source.read(i) for i in range(3)] == [b"one", b"two", b"three"]


def test_truncated_or_foreign_file_is_one_clear_error(tmp_path):
    write(tmp_path, with_header_record({0: [b"one" * 50], 1: [b"two" * 50]}))
    whole = (tmp_path / "train.rec").read_bytes()
    (tmp_path / "train.rec").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="ends inside the record at byte"):
        RecordIOSource(tmp_path)
    (tmp_path / "train.rec").write_bytes(b"not a record file at all")
    with pytest.raises(UserError, match="no record starts at byte 0"):
        RecordIOSource(tmp_path)
    (tmp_path / "train.rec").write_bytes(b"")
    with pytest.raises(UserError, match="empty"):
        RecordIOSource(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        RecordIOSource(tmp_path / "absent.rec")


@pytest.mark.parametrize("label", [-1.0, 0.5, float("nan")])
def test_label_that_is_no_class_is_refused(tmp_path, label):
    with pytest.raises(UserError, match="label"):
        RecordIOSource(write(tmp_path, [part(header(0) + b"x"), part(header(label) + b"y")]))


def test_record_that_declares_more_labels_than_it_holds(tmp_path):
    liar = struct.pack("<IfQQ", 1000, 0.0, 0, 0) + b"image"
    with pytest.raises(UserError, match="key 1 declares 1000 labels"):
        RecordIOSource(write(tmp_path, [part(header(0) + b"x"), part(liar)]))


def test_writer_makes_the_bytes_of_the_layout(tmp_path):
    people = {0: [b"one", b"three"], 1: [b"a longer one"]}
    with RecordIOWriter(tmp_path, (64, 48)) as writer:
        for label, images in people.items():
            for image in images:
                writer.add(label, image)
    ids = [0, 1, 2, 3, 4, 5]
    expected = b""
    for number, record in zip(ids, with_header_record(people), strict=True):
        # Our writer also notes the key as `id`, like InsightFace's tools.
        at = 8 + 8
        expected += record[:at] + struct.pack("<Q", number) + record[at + 8 :]
    assert (tmp_path / "train.rec").read_bytes() == expected
    assert (tmp_path / "property").read_text() == "2,64,48\n"
    assert (tmp_path / "train.idx").read_text().splitlines()[1] == "1\t40"


def test_writer_keeps_labels_apart_from_gaps_and_refuses_disorder(tmp_path):
    with RecordIOWriter(tmp_path) as writer:
        writer.add(1, b"a")
        writer.add(4, b"b")
        with pytest.raises(ValueError, match="ascend"):
            writer.add(3, b"c")
    source = RecordIOSource(tmp_path)
    assert source.labels.tolist() == [1, 4]
    assert source.num_classes == 5


chunks = st.lists(st.sampled_from([MAGIC_BYTES, b"abcd", b"x", b"\x0a\x23", b""]), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(chunks.map(b"".join), min_size=1, max_size=6))
def test_round_trip_of_payloads_full_of_magic(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("magic")
    with RecordIOWriter(folder) as writer:
        for image in images:
            writer.add(0, image)
    source = RecordIOSource(folder)
    assert [source.read(i) for i in range(len(images))] == images
    # The point of splitting: the magic stands at a multiple of four only where a part starts.
    data = (folder / "train.rec").read_bytes()
    starts, at = [], 0
    while at < len(data):
        starts.append(at)
        length = struct.unpack_from("<I", data, at + 4)[0] & (1 << 29) - 1
        at += 8 + length + -length % 4
    assert [i for i in range(0, len(data), 4) if data[i : i + 4] == MAGIC_BYTES] == starts


def test_offsets_past_four_gib_and_keys_in_any_order(tmp_path):
    longest = 2**29 - 4
    offsets = []
    with (tmp_path / "train.rec").open("wb") as file:  # sparse: it takes a few pages
        for label in range(9):
            offsets.append(file.tell())
            file.write(struct.pack("<II", MAGIC, longest) + header(label))
            file.seek(offsets[-1] + 8 + longest)
        offsets.append(file.tell())
        file.write(part(header(9) + b"last"))
    assert offsets[-1] > 2**32
    keys = [4, 3, 7, 1, 9, 8, 2, 6, 5, 0]
    lines = [f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=True)]
    (tmp_path / "train.idx").write_text("".join(lines[::-1]))
    source = RecordIOSource(tmp_path)
    assert source.labels.tolist() == np.argsort(keys).tolist()
    assert source.read(0) == b"last"
    assert source.name(0).endswith("key 0")


def test_labels_that_float32_does_not_tell_apart_are_refused(tmp_path):
    write(tmp_path, [part(header(0) + b"x"), part(header(2**24 + 1) + b"x")])
    with pytest.raises(UserError, match=r"label 16777216 is past 2\*\*24"):
        RecordIOSource(tmp_path)


def test_pickles_without_its_map(tmp_path):
    source = RecordIOSource(write(tmp_path, with_header_record({0: [b"one"], 1: [b"two"]})))
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.read(1) == b"two"
    assert copy.fingerprint() == source.fingerprint()


def test_fingerprint_tells_labels_apart(tmp_path):
    one, other = tmp_path / "a", tmp_path / "b"
    one.mkdir()
    other.mkdir()
    write(one, [part(header(0) + b"x"), part(header(1) + b"y")])
    write(other, [part(header(1) + b"x"), part(header(0) + b"y")])
    assert RecordIOSource(one).fingerprint() != RecordIOSource(other).fingerprint()
