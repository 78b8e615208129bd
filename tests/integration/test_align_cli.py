"""``sphereface2 align`` as a user runs it: odd files, a kill, landmark files, what fit reads."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import ran
from skimage.data import astronaut

from sphereface2.align import TEMPLATE, warp
from sphereface2.align.folder import _jobs
from sphereface2.align.folder import align as align_folder
from sphereface2.data import open_source
from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.signals import STOPPED

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(*words):
    return [sys.executable, "-m", "sphereface2", "align", *map(str, words)]


def align(*words):
    return subprocess.run(command(*words), capture_output=True, text=True, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 pictures of one face, moved and brightened, two that cannot be read and one wall."""
    root = tmp_path_factory.mktemp("photos")
    image = astronaut()[:300, 50:400, ::-1]
    for number in range(24):
        path = root / f"person{number % 4}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        moved = np.roll(image, number % 20, axis=1)
        cv2.imwrite(str(path), cv2.convertScaleAbs(moved, alpha=1 - number / 100))
    cv2.imwrite(str(root / "person0" / "0.jpg"), image)  # one stem, two pictures
    (root / "person1" / "text.jpg").write_text("not a picture")
    (root / "person1" / "empty.jpg").write_bytes(b"")
    cv2.imwrite(str(root / "person2" / "wall.png"), np.full((90, 90, 3), 77, np.uint8))
    (root / "notes.txt").write_text("no picture")
    return root


def test_crops_do_not_have_names_that_differ_in_capitals_only(tmp_path):
    """Where they make no difference, one crop would replace the other."""
    jobs = _jobs(tmp_path, tmp_path, ["A.jpg", "a.png", "b.jpg"], None)
    assert [job.target.name for job in jobs] == ["A.jpg", "a.png", "b"]


def crops(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.jpg")}


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.fixture(scope="module")
def whole(photos, tmp_path_factory):
    """The crops of all of them, by one process."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    align_folder(photos, folder, workers=1)
    return crops(folder)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts processes by /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_ended_and_run_again_it_ends_as_if_never_ended(photos, whole, tmp_path, how):
    cut = tmp_path / "cut"
    running = subprocess.Popen(
        command(photos, cut, "--workers", 2),
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )
    journal = cut / "faces.jsonl"
    limit = time.monotonic() + 60
    # A line is the job's, and two may be of damaged pictures, which are tried again.
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 10):
        assert running.poll() is None and time.monotonic() < limit
        time.sleep(0.01)
    workers = children(running.pid)
    if how == signal.SIGKILL:
        os.kill(running.pid, how)
    else:
        os.killpg(running.pid, how)  # as a terminal does
    _, told = running.communicate()
    if how == signal.SIGINT:
        assert (running.returncode, told) == (130, f"{STOPPED}\n")
    limit = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < limit, "workers outlive their parent"
        time.sleep(0.05)
    assert all(read_image(p).shape == (112, 112, 3) for p in cut.rglob("*.jpg"))
    with journal.open("a") as file:
        file.write('{"image": "person3/3.png", "sta')  # as a crash might leave it
    align_folder(photos, cut, workers=1)
    report = json.loads((cut / "report.json").read_text())
    assert 8 <= report["skipped"] < 28
    assert crops(cut) == whole
    assert not list(cut.rglob("*.tmp"))

    assert [report[k] for k in ("images", "aligned", "crops", "no_face", "unreadable")] == [
        28, 25, 25, 1, 2,
    ]  # fmt: skip
    assert report["images_without_face"] == ["person2/wall.png"]
    assert "is empty" in report["reasons"]["person1/empty.jpg"]
    assert "as an image" in report["reasons"]["person1/text.jpg"]
    assert {"person0/0.png.jpg", "person0/0.jpg.jpg"} <= crops(cut).keys()
    source = open_source(cut)
    assert len(source) == 25 and source.class_names == [f"person{i}" for i in range(4)]

    other = ran("align", photos, cut, "--size", 96)
    assert other.returncode == 2
    assert "other settings" in other.stderr and other.stderr.count("\n") == 1


def test_by_a_landmark_file(photos, tmp_path):
    points = TEMPLATE * 1.1 + 60
    told = " ".join(repr(float(v)) for v in points.ravel())
    lines = [
        f"person0/0.png {told} 0.9",
        f"person3/3.png {told}",
        "person1/1.png " + told.replace(told.split()[4], "nan"),
        f"person9/none.png {told}",
        "person2/2.png " + "7 " * 10,
    ]
    (tmp_path / "points.txt").write_text("\n".join(lines))
    out = tmp_path / "out"
    done = align(photos, out, "--landmarks", tmp_path / "points.txt", "--png")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    counts = [report[k] for k in ("images", "aligned", "unreadable", "bad_landmarks")]
    assert counts == [5, 2, 1, 2]
    assert "x3 is 'nan'" in report["reasons"]["person1/1.png"]
    assert "coincide" in report["reasons"]["person2/2.png"]
    np.testing.assert_array_equal(
        read_image(out / "person3" / "3.png"),
        warp(read_image(photos / "person3" / "3.png"), points),
    )


@pytest.fixture
def few(tmp_path):
    """Three photographs: one with two faces, one with one, one damaged."""
    root = tmp_path / "few"
    root.mkdir()
    image = astronaut()[:300, 50:400, ::-1]
    cv2.imwrite(str(root / "one.png"), image)
    cv2.imwrite(str(root / "two.png"), np.hstack([image, image]))
    (root / "bad.png").write_bytes(b"no picture")
    return root


def skipped(few, out, **options):
    return align_folder(few, out, workers=1, **options)["skipped"]


def test_what_changed_is_done_anew(few, tmp_path):
    out = tmp_path / "out"
    align_folder(few, out, workers=1, all_faces=True)
    assert crops(out).keys() == {"one_face1.jpg", "two_face1.jpg", "two_face2.jpg"}
    assert skipped(few, out, all_faces=True) == 2  # a damaged picture is tried again
    for name in ("two.png", "bad.png"):
        (few / name).write_bytes((few / "one.png").read_bytes())
    report = align_folder(few, out, workers=1, all_faces=True)
    assert (report["skipped"], report["crops"], report["unreadable"]) == (1, 3, 0)
    assert crops(out).keys() == {"one_face1.jpg", "two_face1.jpg", "bad_face1.jpg"}
    (out / "bad_face1.jpg").unlink()
    assert skipped(few, out, all_faces=True) == 2
    assert len(crops(out)) == 3 and skipped(few, out, all_faces=True) == 3
    # The same names below another folder are other pictures.
    other = few.rename(tmp_path / "other")
    with pytest.raises(UserError, match=rf"holds crops of {few}, not of {other}"):
        align_folder(other, out, workers=1, all_faces=True)


def test_rotations_find_what_lies_on_its_side(few, tmp_path):
    turned = np.ascontiguousarray(np.rot90(cv2.imread(str(few / "one.png"))))
    cv2.imwrite(str(few / "bad.png"), turned)
    plain, tried = tmp_path / "plain", tmp_path / "tried"
    assert align_folder(few, plain, workers=1)["images_without_face"] == ["bad.png"]
    # What an earlier version wrote, which knew of no rotations, is gone on with.
    journal = plain / "faces.jsonl"
    text = journal.read_text()
    assert text.count(', "rotations": false') == 1
    journal.write_text(text.replace(', "rotations": false', ""))
    assert align_folder(few, plain, workers=1)["skipped"] == 3
    assert align_folder(few, tried, workers=1, rotations=True)["aligned"] == 3
    found, upright = (read_image(tried / name).astype(int) for name in ("bad.jpg", "one.jpg"))
    assert np.abs(found - upright).mean() < 3


def test_corrected_landmarks_make_another_crop(few, tmp_path):
    points, out = tmp_path / "points.txt", tmp_path / "out"
    for shift, expected in ((60, 0), (60, 1), (80, 0)):
        told = " ".join(repr(float(v)) for v in (TEMPLATE * 1.1 + shift).ravel())
        points.write_text(f"one.png {told}\n")
        assert skipped(few, out, landmarks=points, png=True) == expected
    np.testing.assert_array_equal(
        read_image(out / "one.png"), warp(read_image(few / "one.png"), TEMPLATE * 1.1 + 80)
    )
    points.write_text(f"one.png nan\ntwo.png {told}\n")
    assert align_folder(few, out, workers=1, landmarks=points, png=True)["bad_landmarks"] == 1
    assert not (out / "one.png").exists()


def test_nothing_but_crops_is_replaced(few, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"precious")
    (photos / ".mine.tmp").touch()
    with pytest.raises(UserError, match=r"photos holds files and no faces\.jsonl"):
        align_folder(few, photos, workers=1)
    (photos / "faces.jsonl").write_text('{"of": "another program"}')
    with pytest.raises(UserError, match=r"faces\.jsonl is damaged or not of this command"):
        align_folder(few, photos, workers=1)
    assert (photos / "faces.jsonl").read_text() == '{"of": "another program"}'
    assert (photos / "one.jpg").read_bytes() == b"precious" and (photos / ".mine.tmp").exists()
    assert not (photos / "report.json").exists()


def test_one_process_at_a_time(few, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    out = tmp_path / "out"
    align_folder(few, out, workers=1)
    (out / ".0123.tmp").touch()
    with (out / "faces.jsonl").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is at work in"):
            align_folder(few, out, workers=1)
        assert (out / ".0123.tmp").exists()
    align_folder(few, out, workers=1)
    assert not (out / ".0123.tmp").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes there alone")
def test_odd_names_stop_nothing(few, tmp_path):
    odd = os.fsdecode(os.fsencode(few) + b"/caf\xe9.png")
    image = (few / "one.png").read_bytes()
    for name in (odd, few / ("ж" * 125 + ".png"), few / ("x" * 251 + ".png")):
        Path(name).write_bytes(image)
    (few / "two.png").rename(odd.replace("caf", "bad"))
    Path(odd.replace("caf", "bad")).write_bytes(b"no picture")
    out = tmp_path / "out"
    done = align(few, out, "--workers", 1, "--all-faces")
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert (report["aligned"], report["unreadable"], report["not_written"]) == (2, 2, 2)
    assert (
        r"bad\udce9.png cannot be read as an image" in done.stdout
        and "name is too long" in done.stdout
    )
    assert Path(os.fsdecode(os.fsencode(out) + b"/caf\xe9_face1.jpg")).exists()
    assert skipped(few, out, all_faces=True) == 4
    # Without a longer end to their names they fit.
    assert align_folder(few, tmp_path / "main", workers=1)["aligned"] == 4


def test_mistakes_are_one_sentence(photos, tmp_path):
    (tmp_path / "bare").mkdir()
    for source, target, told in [
        (tmp_path / "none", tmp_path / "out", "none does not exist; give a folder of images"),
        (tmp_path / "bare", tmp_path / "out", "holds no images"),
        (photos, photos / "out", "lies inside"),
        (photos, tmp_path / "bare" / "file" / "out", "cannot write"),
    ]:
        (tmp_path / "bare" / "file").write_text("")
        with pytest.raises(UserError, match=told):
            align_folder(source, target, workers=1)
    assert not (photos / "out").exists()
