"""What newcomers and hostile strangers type: a sentence, status 2 and nothing left behind."""

import pickle
import re
import shutil
import socket
import sqlite3
from pathlib import Path

import cv2
import numpy as np
import pytest
from command_line import ran
from skimage.data import astronaut

from sphereface2 import backbones
from sphereface2.files import atomic_folder, atomic_write
from sphereface2.recognition.face_embedder import FaceEmbedder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``people/``, a ``model/``, ``pairs.bin`` and files that are none of these."""
    root = tmp_path_factory.mktemp("mistakes")
    rng = np.random.default_rng(0)
    for person in "abcd":
        (root / "people" / person).mkdir(parents=True)
        for number in "12":
            pixels = rng.integers(0, 255, (112, 112, 3), np.uint8)
            cv2.imwrite(str(root / "people" / person / f"{number}.png"), pixels)
    FaceEmbedder(backbones.build("sfnet4", embedding_dim=8, width=0.25)).save_pretrained(
        root / "model"
    )
    (root / "pairs.bin").write_bytes(pickle.dumps(([b"x"] * 4, [True, False])))
    (root / "file").write_text("a file")
    (root / "few.csv").write_text("a,x\nb,x\nnobody,x\n")
    (root / "one.csv").write_text("a,x\nb,y\n")
    with sqlite3.connect(root / "foreign.db") as other:
        other.execute("create table accounts (id)")
    assert ran("gallery", "add", root / "g.db", "--folder", root / "people", *use(root)) == (
        0,
        f"added 8 images of 4 people to {root / 'g.db'}\n",
        "",
    )
    return root


def use(root: Path) -> list[object]:
    return ["--model", root / "model", "--aligned"]


def contents(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


CALLS = {
    # An empty word is not the current folder, and no setting left out.
    "embed model people --out=": "--out: an empty argument",
    "verify people/a/1.png people/a/2.png --model=": "--model: an empty argument",
    "fit --data.train people --start-from=": "--start-from: an empty argument",
    # A fraction of a whole number is not rounded.
    "embed model people --out x.parquet --batch-size 2.6": "--batch-size: 2.6 is not a whole",
    "serve model --gallery g.db --port 80.7": "--port: 80.7 is not a whole number",
    "verify a b c": "unexpected argument 'c'; `sphereface2 verify --help`",
    # What is written into a set would be read as a part of it.
    "data convert people people/e --to folder": "people/e lies inside .*people",
    "data audit people --out people/e --model model": "people/e lies inside",
    "data cluster people --out people/e --model model": "people/e lies inside",
    "evaluate model --all-pairs people --plots people/e": "people/e lies inside",
    "fit --data.train people --run-folder people/e": "people/e lies inside",
    "align people people/e": "people/e lies inside",
    "gallery search g.db people --annotate people": "people is people",
    "gallery search g.db people --annotate people/a/e.jpg": "is one file for 8 images",
    "gallery search g.db people/a --annotate people/a/e": "people/a/e lies inside people/a",
    "gallery search g.db people/a/1.png people/a/2.png --annotate people/a": "people/a is people/a",
    # A model's folder, a file and another program's database are no place either.
    "fit --data.train people --run-folder model": "is a model's folder",
    "fit --data.train people --run-folder file/run": "cannot be a folder, as .*file is a file",
    "evaluate model --pairs pairs.bin --plots file": "cannot be a folder, as .*file is a file",
    "evaluate model --pairs pairs.bin --pairs pairs.bin --plots p": "sets are called 'pairs'",
    "data convert people file/x --to folder": "file/x cannot be a folder, as file is a file",
    "data convert pairs.bin file/x.bin --to bin": "file cannot be a folder, as file is a file",
    "data convert people l.txt --to list": "l.txt is a file's name, and --to list makes a folder",
    "data fetch drawn file/x": "file/x cannot be a folder, as file is a file",
    "embed model people --aligned --out file/x.parquet": "give --out a file in a folder that",
    "keys add ann --file file/keys.json": "file cannot be a folder, as file is a file",
    "gallery list foreign.db": "database of another program, with a table 'accounts'",
    # Options that would have no effect, and values that no option has.
    "fit --data.train people --training.gamma 0.5": "no effect with training.schedule cosine",
    "data convert people x --to recordio --quality 10": "--quality is that of images encoded",
    "data audit people --out x --model model --move nan": "--move must be a number",
    "gallery search g.db people/a/1.png --aligned --threshold nan": "--threshold must be a number",
    "gallery search g.db people/a/1.png --aligned --threshold 7": "a number ≥ -1 and ≤ 1",
    "gallery index g.db --index-from -1": "--index-from must be an integer ≥ 0",
    "gallery verify g.db a": "give images that are said to show the person",
    "align people x --max-pixels -1": "--max-pixels must be a number ≥ 1",
    "serve model --gallery new.db --far 0.1": "--far needs a calibrated model",
    "serve model --gallery g.db --allow-origin intranet": "--allow-origin takes an origin",
    "serve model --gallery g.db --allow-host http://x/": "--allow-host takes a name",
    "fit --data.train people --ranks 9999": "--ranks 9999 is more than this machine bears",
    "verify people/a/1.png people/a/2.png --device gpu": "'gpu' cannot be used here; use",
    # Things that are of another kind.
    "evaluate model --pairs people": "people is a folder, and a verification set is a file",
    "evaluate model --pairs people/a/1.png": "1.png is a picture .*; give a pairs.txt, or a list",
    "evaluate model --pairs pairs.bin --names nosuch": "nosuch cannot be read: .*; give the pairs",
    "evaluate model --all-pairs people --groups nosuch": "nosuch cannot be read: .*; give a CSV of",
    "evaluate model --all-pairs people --groups people": "people cannot be read: .*; give a CSV of",
    "align people x --landmarks nosuch": "nosuch cannot be read: .*; give a list of 'path x1 y1",
    "data cluster people --out x --write y --apply nosuch": "read: .*; give the people.txt that",
    "data audit people --out x --write y --apply nosuch": "read: .*; give the findings.csv that",
    "study run people/a/1.png": "1.png is a picture .*; give the YAML file of a study",
    "fit --config nosuch.yaml": "there is no file and no recipe 'nosuch.yaml'",
    "fit --config model/model.safetensors": "is not a text file: .*; give the YAML file of a conf",
    "data info pairs.bin --json": "",  # what a .bin is, `info` knows
    "embed model pairs.bin --out x.parquet": "a .bin holds pairs, for --pairs",
    "embed model people/a/1.png --out x.parquet": "give the folder that holds the image",
    "fit --resume people": "people/config.yaml does not exist, so people is no run",
    "evaluate model --all-pairs people --groups one.csv": "group 'x' of .*one.csv cannot be judged",
    "data audit nosuch --out x --model model": "nosuch does not exist",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_mistake_is_a_sentence(place: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = contents(place)
    done = ran(*call.split())
    if CALLS[call]:
        assert done.returncode == 2
        last = done.stderr.splitlines()[-1]
        assert last.startswith("error: ")
        assert re.search(CALLS[call], last), last
    assert contents(place) == before


def test_several_faces_and_photographs_given_as_crops_are_told(place: Path, tmp_path: Path) -> None:
    one = np.ascontiguousarray(astronaut()[:300, 50:400, ::-1])
    cv2.imwrite(str(tmp_path / "one.png"), one)
    cv2.imwrite(str(tmp_path / "two.png"), np.hstack([one, one]))
    pair = tmp_path / "one.png", tmp_path / "two.png"
    done = ran("verify", *pair, "--model", place / "model")
    assert f"{pair[1]} shows 2 faces" in done.stderr and f"{pair[0]} shows" not in done.stderr
    told = "hold whole photographs and not aligned crops .*: leave out --aligned"
    assert re.search(told, ran("verify", *pair, *use(place)).stderr)
    assert re.search(told, ran("gallery", "add", tmp_path / "g", "Ann", *pair, *use(place)).stderr)
    search = ran("gallery", "search", tmp_path / "g", pair[0], "--aligned")
    assert re.search(told, search.stderr)
    (tmp_path / "people" / "ann").mkdir(parents=True)
    shutil.copy(pair[0], tmp_path / "people" / "ann")
    out = ["--out", tmp_path / "x.parquet", "--aligned"]
    assert re.search(told, ran("embed", place / "model", tmp_path / "people", *out).stderr)


def test_names_do_not_steer_a_terminal(place: Path, tmp_path: Path) -> None:
    image = place / "people" / "a" / "1.png"
    # Persian and Hindi names need joiners, which are left alone.
    names = {
        "a\nb": r"a\nb",
        "a\x1b[2J": r"a\x1b[2J",
        "a\u202eb": r"a\u202eb",
        "ا\u200cب": "ا\u200cب",
    }
    for name in names:
        ran("gallery", "add", tmp_path / "g", name, image, *use(place))
    listed = ran("gallery", "list", tmp_path / "g").stdout
    found = ran("gallery", "search", tmp_path / "g", image, "--aligned").stdout
    for shown in names.values():
        assert shown in listed and shown in found
    assert len(found.splitlines()) == 1


def test_a_folder_of_one_persons_images_is_enrolled(place: Path, tmp_path: Path) -> None:
    done = ran("gallery", "add", tmp_path / "a.db", "Ann", place / "people" / "a", *use(place))
    assert done.stdout.startswith("added 2 images of 1 person")


def test_a_port_in_use_is_told_before_the_model_is_loaded(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ran("serve", place / "nosuch", "--gallery", place / "g.db", "--port", port)
    assert done.returncode == 2 and f"127.0.0.1 port {port}: Address already in use" in done.stderr


def test_the_groups_that_a_file_leaves_out_are_counted(place: Path) -> None:
    people = place / "people"
    done = ran("evaluate", place / "model", "--all-pairs", people, "--groups", place / "few.csv")
    assert done.stderr.endswith("calibrate on the model, or give a larger set\n")
    assert "gives 4 of the 8 images a group; 1 of its 3 names are no person" in done.stderr
    assert "the first 'nobody'" in done.stderr


def test_images_beside_folders_of_people_are_told(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "people", tmp_path / "mixed")
    shutil.copy(place / "people" / "a" / "1.png", tmp_path / "mixed")
    out = tmp_path / "x.parquet"
    done = ran("embed", place / "model", tmp_path / "mixed", "--out", out, "--aligned")
    assert done.returncode == 0 and "all are taken for images of nobody" in done.stderr


def test_a_home_is_expanded_where_the_shell_leaves_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(place))
    done = ran("data", "info", "~/people", "--json")
    assert f'"path": "{place / "people"}"' in done.stdout


def test_errors_name_the_file_that_was_wanted_and_no_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for wanted in (tmp_path / "file" / "x", tmp_path / ("n" * 250) / ("n" * 300)):
        with pytest.raises(OSError, match=r"directory|long") as caught, atomic_folder(wanted):
            pass
        assert caught.value.filename == str(wanted)
        with pytest.raises(OSError, match=r"directory|long") as caught:
            atomic_write(wanted, b"")
        assert caught.value.filename == str(wanted)
