"""Text and YAML that a user gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sphereface2.errors import UserError
from sphereface2.files import atomic_folder, read_lines, read_text, read_yaml, takes_paths

TEXT = "Zoë 1\r\n# comment\n\nTōkyō\u2028x\ty "


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_utf_8_with_or_without_a_mark_whatever_the_locale(tmp_path, monkeypatch, mark):
    monkeypatch.setenv("LC_ALL", "C")
    path = tmp_path / "a.txt"
    path.write_bytes(mark + TEXT.encode())
    assert read_text(path) == TEXT
    assert read_lines(path) == [(1, "Zoë 1"), (4, "Tōkyō\u2028x\ty")]


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-le", "utf-16-be"])
def test_utf_16_is_recognised_and_named(tmp_path, codec):
    path = tmp_path / "a.txt"
    path.write_bytes("a/1.jpg 0\na/2.jpg 1\n".encode(codec))
    with pytest.raises(UserError, match=r"a\.txt is UTF-16 text; save it as UTF-8"):
        read_text(path)


@given(st.binary(max_size=40))
def test_any_bytes_are_text_or_a_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    try:
        assert read_text(path).encode() == data.removeprefix(b"\xef\xbb\xbf")
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)  # noqa: PT017


def test_what_is_no_text_is_named(tmp_path):
    path = tmp_path / "a.txt"
    for data, message in ((b"a.jpg 0\nb\0c.jpg 1", "byte 9 is NUL"), (b"caf\xe9", "byte 3")):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_text(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_text(tmp_path / "absent")
    with pytest.raises(UserError, match=r"absent cannot be read: .*; give a list$"):
        read_text(tmp_path / "absent", "a list")
    with pytest.raises(UserError, match="cannot be read: embedded null"):
        read_text("a\0b")
    path.write_text("GIF89a/1.gif 0")  # a folder's name is no picture
    assert read_text(path) == "GIF89a/1.gif 0"


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".gif", ".tif", ".avif"])
def test_a_picture_is_called_one_where_a_text_is_wanted(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.effect_noise((32, 32), 50).convert("RGB").save(path)
    with pytest.raises(UserError, match=r"is a picture and not a text file; give a list$"):
        read_text(path, "a list")


def test_an_error_names_the_file_that_was_wanted_and_no_other(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"file/x'$"), atomic_folder(tmp_path / "file" / "x"):
        pass


def test_paths_may_be_given_as_strings():
    @takes_paths
    def parts(one: Path, *, more: Sequence[Path] = (), last: Path | None = None, text: str = ""):
        return one.name, [path.name for path in more], last and last.name, text

    assert parts("a/b", more=["c/d"], last="e/f", text="g/h") == ("b", ["d"], "f", "g/h")
    assert parts(Path("a/b"), more="c/d") == ("b", ["d"], None, "")
    with pytest.raises(TypeError, match=r"parts\(\) missing 1 required"):
        parts(more="c")

    @takes_paths
    def some(them: Sequence[Path] | None = None):
        return them

    assert (some(None), some("a")) == (None, [Path("a")])


def test_yaml_is_plain_data_and_small(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"\xef\xbb\xbfbase: &b {x: 1}\nother: {<<: *b, y: [1, *b]}\n")
    assert read_yaml(path) == {"base": {"x": 1}, "other": {"x": 1, "y": [1, {"x": 1}]}}
    path.write_text("")
    assert read_yaml(path) is None
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    for text, message in (
        (bomb, "aliases repeat"),
        ("a: &a [*a]", "holds itself"),
        ("[" * 5000, "nested too deeply"),
        ("a: 1\n b: 2", "line 2 is not valid YAML"),
        ("a: 1\n---\nb: 1", "not valid YAML"),
        ("when: 2024-99-99", "cannot be read"),
        ("a: 1\nb: {c: 1,\n  c: 2}", "line 3 is not valid YAML: the key 'c' is given twice"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            read_yaml(path)
        assert len(str(caught.value)) < 400
