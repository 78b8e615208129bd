"""Verification sets: layouts made by hand, damaged ones, and pickles that would run code."""

import os
import pickle
import struct
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.data.opening import load_pairs
from sphereface2.data.pairs import consecutive_folds
from sphereface2.errors import UserError

PAIRS = [True, False] * 10


def images(count=40):
    return [b"image %d" % i for i in range(count)]


def write(path, content, protocol=4):
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("as_array", [False, True])
def test_bin_of_every_protocol(tmp_path, protocol, as_array):
    encoded = images()
    stored = [np.frombuffer(e, np.uint8) for e in encoded] if as_array else encoded
    same = np.array(PAIRS) if as_array else PAIRS
    path = write(tmp_path / "set.bin", (stored, same), protocol)
    found = load_pairs(path)
    assert [found.images[i] for i in found.pairs.ravel()] == encoded
    assert found.same.tolist() == PAIRS
    assert found.people is None
    assert found.folds.tolist() == np.arange(10).repeat(2).tolist()


def test_bin_written_by_python_2(tmp_path):
    """Protocol 2 with `str` images, a list of two lists, verdicts as booleans: made by hand."""
    text = b"".join(b"T" + struct.pack("<I", len(e)) + e for e in images(4))
    path = tmp_path / "old.bin"
    path.write_bytes(b"\x80\x02](" + b"](" + text + b"e](\x88\x89ee.")
    found = load_pairs(path)
    assert list(found.images) == images(4)
    assert found.same.tolist() == [True, False]


def test_bin_with_decoded_images(tmp_path):
    pixels = [np.full((5, 4, 3), i, np.uint8) for i in range(4)]
    pixels[2] = np.asfortranarray(np.arange(60, dtype=np.uint8).reshape(5, 4, 3))
    found = load_pairs(write(tmp_path / "set.bin", (pixels, [True, False])))
    for got, expected in zip(found.images, pixels, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_pixels_of_another_shape_are_another_image(tmp_path):
    black = [np.zeros((4, 6, 3), np.uint8), np.zeros((6, 4, 3), np.uint8)]
    (tmp_path / "set.bin").write_bytes(pickle.dumps((black * 2, [True, False])))
    found = load_pairs(tmp_path / "set.bin")
    assert [image.shape for image in found.images] == [(4, 6, 3), (6, 4, 3)]


def test_an_image_of_several_pairs_is_kept_once(tmp_path):
    path = write(tmp_path / "set.bin", ([b"a", b"b", b"a", b"c"], [True, False]))
    found = load_pairs(path)
    assert list(found.images) == [b"a", b"b", b"c"]
    assert found.pairs.tolist() == [[0, 1], [0, 2]]


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


MARKER = "pickle_ran_this"


def touch():
    open(MARKER, "w").close()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    "content",
    [
        Call(os.system, f"touch {MARKER}"),
        ([Call(eval, f"open({MARKER!r}, 'w')")], [True]),
        ([b"a", b"b"], [Call(exec, f"open({MARKER!r}, 'w')")]),
        Call(getattr, Call(__import__, "os"), "system"),
        (np.array([Call(os.mkdir, MARKER)], dtype=object), [True]),
        Call(np.fromfile, "/dev/zero", "u1", 10),
        Call(np.memmap, MARKER, "u1", "w+", 0, 10),
        ({}, [1.0]),
        ([{1, 2}], []),
    ],
)
def test_a_pickle_that_is_more_than_data_is_refused(tmp_path, monkeypatch, content, protocol):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "set.bin", content, protocol)
    with pytest.raises(UserError) as caught:
        load_pairs(path)
    assert not os.path.exists(MARKER)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "program",
    [
        b"(S'touch pickle_ran_this'\nios\nsystem\n.",  # INST: the call of protocol 0
        b"cos\nsystem\n(S'touch pickle_ran_this'\ntR.",
        b"\x80\x02c__builtin__\neval\nU\x04open\x85R.",
        b"\x80\x04\x8c\x05numpy\x8c\x09os.system\x93.",  # a dotted name under an admitted module
        b"\x80\x04cnumpy\ndtype\n}(\x8c\x05_call\x8c\x01xub.",  # BUILD: change a stand-in
        b"\x80\x04\x8c\x04a\nb\n\x8c\x04os.x\x93.",  # a name of two lines
        b"\x80\x02cnumpy\ndtype\n\x82\x01.",  # extension registry
        b"\x80\x02Pid\n.",  # persistent id
        b"\x80\x02Nr\xff\xff\xff\xff.",  # memo index 2**32 - 1: 32 GB of memo
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x0fabc.",  # bytes longer than the file
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        b"(K\x01K\x05\x85cnumpy\ndtype\nX\x02\x00\x00\x00u1K\x00K\x01\x87R\x89J\xff\xff\xff\x7ftb.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
        b"(K\x01K\x01\x85cnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87R\x89]Natb.",
    ],
)
def test_hand_made_attacks_are_refused(tmp_path, monkeypatch, program):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set.bin").write_bytes(program)
    with pytest.raises(UserError) as caught:
        load_pairs(tmp_path / "set.bin")
    assert "\n" not in str(caught.value)
    assert not os.path.exists(MARKER)


def test_loading_imports_nothing(tmp_path):
    (tmp_path / "set.bin").write_bytes(b"\x80\x02cthis\ns\n.")
    with pytest.raises(UserError, match=r"the name 'this'\.'s'"):
        load_pairs(tmp_path / "set.bin")
    assert "this" not in sys.modules


VALID = pickle.dumps((images(6), [True, False, True]), protocol=2)


@given(st.integers(0, len(VALID) - 1), st.integers(0, 255), st.booleans())
@settings(max_examples=400, deadline=None)
def test_a_damaged_bin_is_a_user_error_or_a_set(tmp_path_factory, position, byte, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.bin"
    path.write_bytes(
        VALID[:position] if cut else VALID[:position] + bytes([byte]) + VALID[position:]
    )
    try:
        found = load_pairs(path)
    except UserError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert not cut
        assert len(found.pairs) == len(found.same)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ((images(3), [True]), "3 images for 1 pairs"),
        (([], []), "0 images for 0 pairs"),
        ((images(2), [2]), "neither true nor false"),
        (([b"a", "b"], [True]), "image 1 of pair 0"),
        (images(2), "expected"),
        (([b"a"], 5), "two lists"),
    ],
)
def test_a_pickle_of_something_else(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_pairs(write(tmp_path / "set.bin", content))


# --- pairs.txt -----------------------------------------------------------------------------------


def lfw(folds=2, per_fold=3, people=12):
    """A small pairs.txt and its pairs ((person, number), (person, number), same, fold)."""
    rng = np.random.default_rng(0)
    lines, expected = [f"{folds}\t{per_fold}"], []
    for fold in range(folds):
        for k in range(2 * per_fold):
            a, b = (f"Person_{n}" for n in rng.choice(people, 2, replace=False))
            m, n = rng.integers(1, 4, 2)
            if k < per_fold:
                lines.append(f"{a}\t{m}\t{n}")
                expected.append(((a, m), (a, n), True, fold))
            else:
                lines.append(f"{a}\t{m}\t{b}\t{n}")
                expected.append(((a, m), (b, n), False, fold))
    return "\n".join(lines) + "\n", expected


def lay_out(root, expected, suffix=".jpg"):
    for pair in expected:
        for person, number in pair[:2]:
            (root / person).mkdir(parents=True, exist_ok=True)
            (root / person / f"{person}_{number:04d}{suffix}").write_bytes(
                f"{person} {number}".encode()
            )


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_pairs_txt_with_a_folder(tmp_path, suffix):
    text, expected = lfw()
    (tmp_path / "pairs.txt").write_text(text)
    lay_out(tmp_path / "faces", expected, suffix)
    found = load_pairs(tmp_path / "pairs.txt", images=tmp_path / "faces")
    assert found.same.tolist() == [same for *_, same, _ in expected]
    assert found.folds.tolist() == [fold for *_, fold in expected]
    for (i, j), (a, b, same, _) in zip(found.pairs, expected, strict=True):
        assert found.images[i] == f"{a[0]} {a[1]}".encode()
        assert found.images[j] == f"{b[0]} {b[1]}".encode()
        assert (found.people[i] == found.people[j]) == same
    assert len(found.images) == len({image for pair in expected for image in pair[:2]})


def test_pairs_txt_names_the_people_of_a_bin(tmp_path):
    text, expected = lfw(folds=10, per_fold=2)
    (tmp_path / "pairs.txt").write_text(text)
    content = [f"{p} {n}".encode() for pair in expected for p, n in pair[:2]]
    path = write(tmp_path / "set.bin", (content, [same for *_, same, _ in expected]))
    found = load_pairs(path, names=tmp_path / "pairs.txt")
    assert found.folds.tolist() == [fold for *_, fold in expected]
    assert len(found.images) == len(set(content))
    names = [person for pair in expected for person, _ in pair[:2]]
    known = {}
    for index, person in zip(found.pairs.ravel(), names, strict=True):
        assert known.setdefault(found.people[index], person) == person
    assert len(known) == len(set(names))


def test_names_of_another_set_are_refused(tmp_path):
    text, expected = lfw(folds=10, per_fold=2)
    (tmp_path / "pairs.txt").write_text(text)
    verdicts = [same for *_, same, _ in expected]
    path = write(tmp_path / "a.bin", (images(80), [not v for v in verdicts]))
    with pytest.raises(UserError, match="disagree on pair 0"):
        load_pairs(path, names=tmp_path / "pairs.txt")
    path = write(tmp_path / "b.bin", (images(40), PAIRS))
    with pytest.raises(UserError, match="lists 40 pairs"):
        load_pairs(path, names=tmp_path / "pairs.txt")


def test_pairs_txt_problems_are_named(tmp_path):
    text, expected = lfw()
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    lay_out(tmp_path / "faces", expected)
    lost = (
        tmp_path / "faces" / expected[0][0][0] / f"{expected[0][0][0]}_{expected[0][0][1]:04d}.jpg"
    )
    lost.unlink()
    with pytest.raises(UserError, match=lost.name):
        load_pairs(path, images=tmp_path / "faces")
    with pytest.raises(UserError, match="no image folder"):
        load_pairs(path, images=tmp_path / "nowhere")
    path.write_text("\n".join(text.splitlines()[:-1]))
    with pytest.raises(UserError, match="announces 12 pairs"):
        load_pairs(path, images=tmp_path / "faces")
    path.write_text(text.replace("\t", " ", 1) + "A\tx\t2\n")
    with pytest.raises(UserError, match="line 14"):
        load_pairs(path, images=tmp_path / "faces")


# --- lists ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", ["\t", " ", ","])
def test_pair_list(tmp_path, separator):
    pairs = [("1", "p/a.jpg", "p/b.jpg"), ("0", "p/a.jpg", "q/c.jpg"), ("0", "q/c.jpg", "p/b.jpg")]
    for name in {f for pair in pairs for f in pair[1:]}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "list.txt").write_text("\n".join(separator.join(pair) for pair in pairs))
    found = load_pairs(tmp_path / "list.txt")
    assert found.same.tolist() == [True, False, False]
    for (i, j), (_, a, b) in zip(found.pairs, pairs, strict=True):
        assert (found.images[i], found.images[j]) == (a.encode(), b.encode())
    assert found.people[found.pairs[0, 0]] == found.people[found.pairs[0, 1]]


def test_folders_that_are_not_people_give_no_people(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("1 a b\n0 c d\n")
    assert load_pairs(tmp_path / "list.txt").people is None


def test_list_problems_are_named(tmp_path):
    (tmp_path / "list.txt").write_text("1 a b\n0 c\n")
    with pytest.raises(UserError, match="line 2"):
        load_pairs(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("1 a b\n")
    with pytest.raises(UserError, match="2 of the 2 images"):
        load_pairs(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text(f"1,{'A' * 200_000}\n")
    with pytest.raises(UserError, match="line 1"):
        load_pairs(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(UserError, match="UTF-16"):
        load_pairs(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(UserError, match="no pairs"):
        load_pairs(tmp_path / "list.txt")
    with pytest.raises(UserError, match="there is no verification set"):
        load_pairs(tmp_path / "absent.bin")


@given(st.integers(10, 500))
@settings(deadline=None)
def test_folds_are_those_of_scikit_learn(count):
    from sklearn.model_selection import KFold

    folds = consecutive_folds(count)
    for k, (_, test) in enumerate(KFold(10, shuffle=False).split(np.zeros(count))):
        assert (folds[test] == k).all()
