"""`sphereface2 calibrate`, `verify` and what `evaluate` says of a calibration, on drawn faces."""

import json
import os
import shutil
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from command_line import ran
from skimage.data import astronaut

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data import open_source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.evaluation.calibration import Calibration
from sphereface2.evaluation.pairs import PairsResult
from sphereface2.recognition.calibrate import calibrate
from sphereface2.recognition.card import model_card
from sphereface2.recognition.evaluate import evaluate

PEOPLE, IMAGES = 20, 5


def run(*words, cwd=None):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "sphereface2", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        check=False,
    )


@pytest.fixture
def call(monkeypatch):
    """The same command in this process, which spares the seconds that imports take."""

    def command(*words):
        monkeypatch.setenv("COLUMNS", "80")
        return ran(*words)

    return command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A network, people that differ in colour, two lists of pairs of different people."""
    root = tmp_path_factory.mktemp("verify")
    rng = np.random.default_rng(0)
    for p in range(PEOPLE):
        base = cv2.resize(rng.integers(0, 256, (4, 4, 3), np.uint8), (32, 32))
        (root / "faces" / f"P{p:02}").mkdir(parents=True)
        for k in range(IMAGES):
            noisy = base + rng.normal(0, 50, base.shape)
            path = root / "faces" / f"P{p:02}" / f"{k}.png"
            cv2.imwrite(str(path), noisy.clip(0, 255).astype(np.uint8))
    for name, people in (("fit", range(10)), ("test", range(10, 20))):
        lines = []
        for _ in range(60):
            a, b = rng.choice(people, 2, replace=False)
            for other in (a, b):
                m, n = rng.choice(IMAGES, 2, replace=False)
                lines.append(f"{int(other == a)} P{a:02}/{m}.png P{other:02}/{n}.png")
        (root / f"{name}.txt").write_text("\n".join(lines))
    torch.manual_seed(0)
    net = backbones.build("sfnet4", embedding_dim=32, input_size=32, width=0.25)
    (root / "net").mkdir()
    head = {"name": "sphereface2", "bias": -3.0, "r": 30.0, "t": 3.0, "m": 0.3}
    bundle.save(net, root / "net", extra={"head": head})
    return root


@pytest.fixture
def net(place, tmp_path):
    """A copy of the network without a calibration."""
    return shutil.copytree(place / "net", tmp_path / "net")


def test_calibrate_then_verify(place, net, call, tmp_path):
    faces = place / "faces"
    done = run(*("calibrate", net, "--all-pairs", faces, "--far", "0.1", "--far", "1e-2", "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    stored = json.loads((net / "calibration.json").read_text())
    assert report["calibration"] == stored
    assert stored["data"] == [
        {
            "name": "faces",
            "pairs": 4950,
            "genuine": PEOPLE * IMAGES * (IMAGES - 1) // 2,
            "impostor": 4750,
            "people": PEOPLE,
            "fingerprint": open_source(faces).fingerprint(),
            "unreadable": 0,
        }
    ]
    assert stored["intervals"]["over"] == "people"
    assert report["shared_bias"]["g"] == pytest.approx(0.1)
    assert report["shared_bias"]["similarity"] == pytest.approx(2 * 0.55 ** (1 / 3) - 1)

    done = call("verify", faces / "P03/0.png", faces / "P03/1.png", "--model", net, "--aligned")
    assert done.returncode == 0, done.stderr
    assert "same person" in done.stdout
    assert "threshold for FAR 1e-1" in done.stdout
    words = ("verify", faces / "P03/0.png", faces / "P04/1.png", "--model", net, "--aligned")
    done = call(*words, "--far", "1e-2", "--json", "--plot", tmp_path / "new" / "both.png")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["decision"] == "different"
    calibration = Calibration.load(net, fingerprint=stored["model"])
    assert report["threshold"] == calibration.threshold(1e-2) > report["similarity"]
    assert report["llr"] == pytest.approx(float(calibration.llr(report["similarity"])))
    assert report["probability"] == pytest.approx(1 / (1 + np.exp(-report["llr"])))
    assert report["faces"] == [None, None]
    assert cv2.imread(report["plot"]).shape == (735, 1200, 3)

    done = call(*words, "--far", "1e-3")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no threshold for a FAR of 1e-3, it has 1e-1, 1e-2" in done.stderr


def test_the_verdict_does_not_depend_on_its_plot(place, net, call, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/$caf\xe9_$.png")
    shutil.copy(place / "faces/P03/0.png", odd)
    words = ("verify", odd, place / "faces/P03/1.png", "--model", net, "--aligned", "--plot")
    done = call(*words, tmp_path / "v.png")
    assert done.returncode == 0, done.stderr
    assert f"plot: {tmp_path / 'v.png'}" in done.stdout and (tmp_path / "v.png").exists()
    (tmp_path / "file").touch()
    for bad in ("/proc/v.png", tmp_path / "file" / "v.png"):
        done = call(*words, bad)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert done.stderr.startswith(f"error: {bad} cannot be written: ")
        assert "similarity" in done.stdout and "plot:" not in done.stdout
    done = call(*words, ".")
    assert (done.returncode, done.stdout) == (2, "") and "name it NAME.png" in done.stderr


def test_what_the_system_refuses_is_one_sentence_too(call, tmp_path, monkeypatch):
    def refused(*args, **options):
        os.replace(tmp_path / "a", tmp_path / "b")

    monkeypatch.setattr("sphereface2.data.info.info", refused)
    done = call("data", "info", tmp_path)
    told = f"error: {tmp_path / 'b'}: No such file or directory\n"
    assert (done.returncode, done.stderr) == (2, told)


def test_a_table_tells_thresholds_and_the_shared_bias(place, net, call):
    done = call("calibrate", net, "--pairs", place / "fit.txt", "--images", place / "faces",
               "--far", "0.2", "--method", "isotonic")  # fmt: skip
    assert done.returncode == 0, done.stderr
    for told in ("FAR 2e-1", "-b/r = 0.100", "60 genuine and 60 impostor", "isotonic"):
        assert told in done.stdout
    # The intervals fit into 80 columns.
    assert max(map(len, done.stdout.split("fit: ")[0].splitlines())) <= 80


def test_evaluate_says_how_good_a_calibration_is_and_where_it_was_fitted(
    place, net, call, tmp_path
):
    options = {"pairs": [place / "fit.txt"], "images": place / "faces", "fars": [0.2]}
    found = evaluate(net, **{k: options[k] for k in ("pairs", "images")})
    assert found.of(PairsResult)[0].calibration is None
    calibrate(net, **options)
    both = [place / "fit.txt", place / "test.txt"]
    done = call("evaluate", net, "--pairs", both[0], "--pairs", both[1],
               "--images", place / "faces", "--plots", tmp_path / "plots")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("min-Cllr") == done.stdout.count("FAR at the threshold for 2e-1") == 2
    assert done.stdout.count("fitted on these pairs") == 1
    assert cv2.imread(str(tmp_path / "plots/test_reliability.png")).shape == (660, 960, 3)
    report = evaluate(net, pairs=both, images=place / "faces", as_json=True)
    first, second = (one.calibration for one in report.of(PairsResult))
    assert (first.fitted_here, second.fitted_here) == (True, False)
    assert first.far[0.2] <= 0.2
    assert first.min_cllr <= first.cllr < 1
    # Without the mirror image the scores are others.
    report = evaluate(net, pairs=both, images=place / "faces", flip=False, as_json=True)
    assert report.of(PairsResult)[0].calibration is None


def test_the_training_set_gives_its_held_out_people_alone(place, net):
    source = open_source(place / "faces")
    data = {"fingerprint": source.fingerprint(), "validation_people": 8, "split_seed": 1}
    loaded = bundle.load(net)
    bundle.save(loaded, net, extra={"data": data})
    report = calibrate(net, all_pairs=[place / "faces"], fars=[0.1], as_json=True)
    (used,) = report.calibration.data
    assert (used.people, used.pairs) == (8, 40 * 39 // 2)
    assert "held out" in used.name
    assert report.shared_bias is None and not report.replaced
    bundle.save(loaded, net, extra={"data": data | {"validation_people": 0}})
    with pytest.raises(UserError, match="trained on all people"):
        calibrate(net, all_pairs=[place / "faces"], fars=[0.1])
    for wrong in ({"validation_people": "many"}, {"split_seed": -1}, {"held_out_max_images": 0.5}):
        bundle.save(loaded, net, extra={"data": data | wrong})
        with pytest.raises(UserError, match=rf"{next(iter(wrong))} in the model's config.json"):
            calibrate(net, all_pairs=[place / "faces"], fars=[0.1])


def test_thresholds_are_checked_on_another_set(place, net, call, tmp_path):
    """The same people through fog: FAR and TAR are those of every pair, counted one by one."""
    foggy = shutil.copytree(place / "faces", tmp_path / "foggy")
    for path in foggy.glob("*/*.png"):
        cv2.imwrite(str(path), cv2.imread(str(path)) // 4 + 150)
    words = ("calibrate", net, "--all-pairs", place / "faces", "--far", "0.1", "--far", "1e-2")
    report = json.loads(call(*words, "--check", foggy, "--json").stdout)
    stored = json.loads((net / "calibration.json").read_text())
    assert report["calibration"] == stored
    (checked,) = stored["checked"]
    assert (checked["name"], checked["images"], checked["people"]) == ("foggy", 100, PEOPLE)
    source = open_source(foggy)
    assert checked["fingerprint"] == source.fingerprint()
    with Embedder.load(net) as embedder:
        scores = (rows := embedder.embed_source(source)) @ rows.T
    a, b = np.triu_indices(100, 1)
    same = source.labels[a] == source.labels[b]
    for one, asked in zip(checked["thresholds"], (0.1, 1e-2), strict=True):
        accepted = scores[a, b] >= one["threshold"]
        assert one["far"] == pytest.approx(accepted[~same].mean(), abs=1e-3)
        assert one["tar"] == pytest.approx(accepted[same].mean(), abs=1e-3)
        assert one["asked"] == asked and one["far_ci"][0] <= one["far"] <= one["far_ci"][1]
        assert one["transfer"] == pytest.approx(np.log10(one["far"] / asked), abs=1e-9)
        assert one["transfer"] > 0.3  # fog makes all alike
    with Embedder.load(net) as embedder:
        read = Calibration.load(net, fingerprint=embedder.fingerprint)
    assert json.loads(json.dumps(read.to_dict())) == stored
    card = model_card(bundle.load(net), read.fingerprint, read)
    assert f"| foggy | 100 | {PEOPLE} | 1e-1 | " in card and "is not known" not in card
    table = call(*words, "--check", foggy).stdout
    assert "foggy: all pairs of 100 images of 20 others" in table and "left out" not in table
    assert f"{checked['thresholds'][0]['transfer']:+.2f}" in table
    next(foggy.glob("*/*.png")).write_bytes(b"")
    table = " ".join(call(*words, "--check", foggy).stdout.split())
    assert "99 images of 20 others; 1 unreadable image left out" in table


def test_what_a_set_to_check_on_shares_with_the_calibration(place, net, call, tmp_path):
    """Copies of images are left out, whatever their names; people in both are told of."""
    fitted, other = tmp_path / "fitted", tmp_path / "other"
    names = ["Ann Lee", "Zoë", "12"]  # a number names nobody
    for p in range(10):
        name = names[p] if p < len(names) else f"P{p}"
        shutil.copytree(place / f"faces/P{p:02}", fitted / name)
        shutil.copytree(place / f"faces/P{p + 10:02}", other / name.replace("Ann ", "ann_"))
    shutil.copy(fitted / "P9/0.png", other / "P8/copy.png")
    words = ("calibrate", net, "--all-pairs", fitted, "--far", "0.2")
    done = call(*words, "--check", other, "--json")
    (checked,) = json.loads(done.stdout)["calibration"]["checked"]
    told = "other, without 1 image of the calibration, 3 of its 10 people in the calibration"
    assert (checked["name"], checked["images"]) == (told, 50) and told in done.stderr
    listed = ("calibrate", net, "--pairs", place / "fit.txt", "--images", place / "faces")
    used = set((place / "fit.txt").read_text().split()) - {"0", "1"}  # of the first ten people
    told = call(*listed, "--far", "0.2", "--check", fitted).stderr
    assert f"fitted, without {len(used)} images of the calibration" in told
    done = call(*words, "--check", fitted)
    assert done.returncode == 2 and "has no image but those" in done.stderr
    done = call(*words, "--check", other, "--check", f"{other}/")
    assert done.returncode == 2 and "given twice" in done.stderr
    for path in other.glob("*/*.png"):
        path.write_bytes(b"no image")
    for given in ((*words, "--check", other), ("evaluate", net, "--all-pairs", other)):
        assert "that was tried can be read" in call(*given).stderr


def test_photographs_to_check_on_are_told_of(place, net, call, tmp_path):
    for p, k in np.ndindex(3, 2):
        photo = np.full((60 + 10 * p, 80 + k, 3), 40 * p, np.uint8)
        (tmp_path / "door" / f"P{p}").mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "door" / f"P{p}" / f"{k}.png"), photo)
    words = ("--all-pairs", place / "faces", "--far", "0.1", "--check", tmp_path / "door")
    assert "door seems to hold whole photographs" in call("calibrate", net, *words).stderr
    assert json.loads((net / "calibration.json").read_text())["images"] == "crops"


def test_a_calibration_that_is_replaced_is_mentioned(place, net, call):
    words = ("calibrate", net, "--pairs", place / "fit.txt", "--images", place / "faces")
    first, second = (call(*words, "--far", "0.2").stdout for _ in range(2))
    assert "replacing" not in first
    assert "calibration.json, replacing the calibration that was there" in second


def test_without_a_calibration_there_is_a_similarity_and_advice(place, net, call):
    pictures = [place / "faces/P03/0.png", place / "faces/P03/1.png"]
    done = call("verify", *pictures, "--model", net, "--aligned")
    assert done.returncode == 0, done.stderr
    assert "no decision" in done.stdout
    assert f"sphereface2 calibrate {net}" in done.stdout
    done = call("verify", *pictures, "--model", net, "--aligned", "--far", "1e-2")
    assert done.returncode == 2
    assert "a FAR needs a calibration" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("calibrate", "net"), "nothing to calibrate on"),
        (("calibrate", "net", "--pairs", "absent.bin"), "no verification set absent.bin"),
        (
            ("calibrate", "net", "--all-pairs", "faces", "--far", "1e-3"),
            "4,750 impostor pairs are too few for a FAR of 1e-3: 10,000 are needed",
        ),
        (("calibrate", "net", "--all-pairs", "faces", "--far", "2"), "between 0 and 1"),
        (
            ("verify", "fit.txt", "fit.txt", "--model", "net", "--aligned"),
            "fit.txt",
        ),
        (
            ("verify", "faces/P03/0.png", "faces/P03/1.png", "--model", "net"),
            "no face found in faces/P03/0.png",
        ),
        (
            ("verify", __file__, __file__, "--model", "net", "--plot", "out.jpg"),
            "name it out.png",
        ),
        (("verify", __file__, __file__, "--model", "nowhere"), "nowhere"),
    ],
)
def test_mistakes_end_in_one_sentence(place, call, monkeypatch, words, message):
    monkeypatch.chdir(place)
    done = call(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (place / "net" / "calibration.json").exists()


def test_a_calibration_on_whole_photographs_is_warned_of_and_not_used_for_crops(
    net, call, tmp_path
):
    photo = astronaut()[:300, 50:400].astype(np.float64)
    for person in range(8):
        tint = 0.4 + 0.6 * np.array([person & 1, person >> 1 & 1, person >> 2], float)
        (tmp_path / "photos" / str(person)).mkdir(parents=True)
        for number, light in enumerate((1.0, 0.8)):
            pixels = (photo * tint * light).astype(np.uint8)
            cv2.imwrite(str(tmp_path / f"photos/{person}/{number}.png"), pixels[..., ::-1])
    words = ("calibrate", net, "--all-pairs", tmp_path / "photos", "--far", "0.25")
    a, b = (tmp_path / "photos/3" / name for name in ("0.png", "1.png"))
    for more, images, warnings in (((), "photographs", 1), (("--align",), "aligned", 0)):
        done = call(*words, *more)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("warning: photos seems to hold whole photographs") == warnings
        assert json.loads((net / "calibration.json").read_text())["images"] == images
        verified = call("verify", a, b, "--model", net)
        if warnings:
            assert verified.returncode == 2
            assert "fitted on whole photographs" in verified.stderr
            assert call("verify", a, b, "--model", net, "--aligned").returncode == 0
        else:
            assert verified.returncode == 0, verified.stderr
    similarities = {}
    for more in ((), ("--align",)):
        done = call("evaluate", net, "--all-pairs", tmp_path / "photos", "--json", *more)
        assert done.returncode == 0, done.stderr
        assert ("warning:" in done.stderr) == (not more)
        similarities[more] = json.loads(done.stdout)["all_pairs"]["tar_threshold"]
    assert similarities[()] != similarities[("--align",)]
