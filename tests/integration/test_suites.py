"""The field's suites in their official layouts, written here and answered by brute force."""

from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from command_line import ran

from sphereface2 import backbones
from sphereface2.align import TEMPLATE, warp
from sphereface2.backbones import bundle
from sphereface2.data import ijb
from sphereface2.data.opening import load_pairs
from sphereface2.data.suites import SUITES, open_suite
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.recognition.evaluate import evaluate


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("net")
    torch.manual_seed(0)
    bundle.save(backbones.build("sfnet4", embedding_dim=32, input_size=32, width=0.25), folder)
    return folder


def person(rng: np.random.Generator) -> np.ndarray:
    """A face of colour fields, (112, 112, 3)."""
    return cv2.resize(rng.integers(0, 256, (5, 5, 3), np.uint8), (112, 112))


def picture(rng: np.random.Generator, face: np.ndarray, noise: float = 70) -> np.ndarray:
    grain = cv2.resize(rng.normal(0, noise, (14, 14, 3)), (112, 112))
    return (face + grain).clip(0, 255).astype(np.uint8)


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def write_ijb(root: Path, name: str, letter: str = "G", seed: int = 0) -> None:
    """A small IJB: 2 galleries of 12 people, 2 probe templates of each person, all pairs."""
    rng = np.random.default_rng(seed)
    meta, crops = root / name.upper() / "meta", root / name.upper() / "loose_crop"
    meta.mkdir(parents=True)
    crops.mkdir()
    faces, points, templates = [], [], []
    for subject in range(1, 25):
        face = person(rng)
        for role in ("gallery", "probe", "probe"):
            template = 1000 - 7 * len(templates)  # ids neither dense nor ascending
            videos = [1, 3] if role == "probe" else [1, 1]
            for frames in videos:
                medium = int(rng.integers(10**5))
                for _ in range(frames):
                    faces.append((template, medium))
                    # A turned and scaled face in a larger picture.
                    turn, scale = rng.uniform(-0.3, 0.3), rng.uniform(0.7, 1.6)
                    matrix = scale * np.array(
                        [[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0]]
                    )
                    matrix[:, 2] = rng.uniform(30, 60, 2)
                    image = cv2.warpAffine(picture(rng, face, noise=150), matrix, (240, 220))
                    (crops / f"{len(faces)}.jpg").write_bytes(png(image))
                    points.append((TEMPLATE @ matrix[:, :2].T + matrix[:, 2], rng.uniform(0.5, 1)))
            templates.append((template, subject, role))
    order = rng.permutation(len(faces))
    (meta / f"{name}_face_tid_mid.txt").write_text(
        "".join(f"{i + 1}.jpg {faces[i][0]} {faces[i][1]}\n" for i in order)
    )
    (meta / f"{name}_name_5pts_score.txt").write_text(
        "".join(
            f"{i + 1}.jpg {' '.join(f'{v:.4f}' for v in points[i][0].ravel())} {points[i][1]:.6f}\n"
            for i in order
        )
    )
    gallery = [t for t in templates if t[2] == "gallery"]
    probe = [t for t in templates if t[2] == "probe"]
    (meta / f"{name}_template_pair_label.txt").write_text(
        "".join(f"{g[0]} {p[0]} {int(g[1] == p[1])}\n" for g in gallery for p in probe)
    )
    parts = {f"gallery_{letter}1": gallery[:12], f"gallery_{letter}2": gallery[12:]}
    for part, listed in {**parts, "probe_mixed": probe}.items():
        lines = ["TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X"]
        lines += [f'{t},{s},"img/{t},{k}.jpg",,3' for t, s, _ in listed for k in range(3)]
        (meta / f"{name}_1N_{part}.csv").write_text("\n".join(lines) + "\n")


def ijb_by_brute_force(root: Path, name: str, letter: str, net: Path, weighted: bool) -> dict:
    """Every figure from the files, by dictionaries and loops in float64."""
    meta = root / name.upper() / "meta"
    backbone = bundle.load(net)
    score_of, crops = {}, {}
    for line in (meta / f"{name}_name_5pts_score.txt").read_text().splitlines():
        image, *numbers = line.split()
        xy = [float(n) for n in numbers[:10]]
        where = np.array([[xy[0], xy[1]], [xy[2], xy[3]], [xy[4], xy[5]], [xy[6], xy[7]], xy[8:]])
        pixels = cv2.imread(str(root / name.upper() / "loose_crop" / image))[..., ::-1]
        crops[image] = warp(np.ascontiguousarray(pixels), where)
        score_of[image] = float(numbers[10])
    rows = dict(
        zip(crops, Embedder(backbone).embed(crops.values()).astype(np.float64), strict=True)
    )
    media: dict[int, dict[int, list[np.ndarray]]] = {}
    for line in (meta / f"{name}_face_tid_mid.txt").read_text().splitlines():
        image, template, medium = line.split()
        row = rows[image] * (score_of[image] if weighted else 1)
        media.setdefault(int(template), {}).setdefault(int(medium), []).append(row)
    feature = {}
    for template, frames in media.items():
        total = sum(np.mean(some, axis=0) for some in frames.values())
        feature[template] = total / np.sqrt((total**2).sum())

    genuine, impostor = [], []
    for line in (meta / f"{name}_template_pair_label.txt").read_text().splitlines():
        one, other, same = map(int, line.split())
        (genuine if same else impostor).append(float(feature[one] @ feature[other]))
    impostor.sort(reverse=True)
    answer: dict = {"tar": {}}
    for exponent in range(1, 7):
        allowed = int(len(impostor) / 10**exponent + 1e-9)
        answer["tar"][f"1e-{exponent}"] = (
            sum(s > impostor[allowed] for s in genuine) / len(genuine) if allowed else None
        )

    def people(part: str) -> dict[int, int]:
        with (meta / f"{name}_1N_{part}.csv").open() as file:
            return {int(r["TEMPLATE_ID"]): int(r["SUBJECT_ID"]) for r in csv.DictReader(file)}

    galleries = [people(f"gallery_{letter}{n}") for n in (1, 2)]
    for gallery in galleries:
        mates, strangers = [], []
        for probe, subject in people("probe_mixed").items():
            scores = {s: float(feature[probe] @ feature[t]) for t, s in gallery.items()}
            if subject in scores:
                ranked = sorted(scores, key=lambda s: -scores[s])
                mates.append((ranked.index(subject) + 1, scores[subject]))
            else:
                strangers.append(max(scores.values()))
        strangers.sort(reverse=True)
        for k in (1, 5, 10):
            answer.setdefault(f"rank{k}", []).append(np.mean([r <= k for r, _ in mates]))
        for exponent in (1, 2, 3):
            allowed = int(len(strangers) / 10**exponent + 1e-9)
            answer.setdefault(f"tpir-{exponent}", []).append(
                np.mean([r == 1 and s > strangers[allowed] for r, s in mates]) if allowed else None
            )
    return answer


def check_ijb(report: dict, answer: dict) -> None:
    one, many = report["verification"], report["identification"]
    assert one["tar"] == pytest.approx(answer["tar"])
    assert one["tar"]["1e-3"] is not None and one["tar"]["1e-4"] is None
    assert 0.1 < one["tar"]["1e-2"] < one["tar"]["1e-1"] < 1  # a set that tells something
    for k in (1, 5, 10):
        assert many[f"rank{k}"] == pytest.approx(np.mean(answer[f"rank{k}"]))
        assert [g[f"rank{k}"] for g in many["galleries"]] == pytest.approx(answer[f"rank{k}"])
    assert 0.1 < many["rank1"] < many["rank10"] <= 1
    assert [g["tpir"]["1e-1"] for g in many["galleries"]] == pytest.approx(answer["tpir-1"])
    assert many["tpir"]["1e-1"] == pytest.approx(np.mean(answer["tpir-1"]))
    assert (many["tpir"]["1e-2"], answer["tpir-2"]) == (None, [None, None])


def test_ijb_is_what_brute_force_says(net: Path, tmp_path: Path) -> None:
    write_ijb(tmp_path, "ijbc")
    done = ran("evaluate", net, "--suite", "ijbc", "--root", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    (report,) = json.loads(done.stdout)["templates"]
    check_ijb(report, ijb_by_brute_force(tmp_path, "ijbc", "G", net, weighted=False))
    assert (report["name"], report["images"], report["templates"]) == ("ijbc", 240, 72)
    assert (report["verification"]["genuine"], report["verification"]["pairs"]) == (48, 1152)
    assert report["verification"]["intervals"]["over"] == "people"
    low, high = report["verification"]["tar_ci"]["1e-1"]
    assert low < report["verification"]["tar"]["1e-1"] < high
    first = report["identification"]["galleries"][0]
    assert (first["name"], first["people"], first["probes"], first["enrolled"]) == (
        "G1",
        12,
        48,
        24,
    )


def test_ijb_weighted_by_detector_scores_and_names_of_ijbb(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    write_ijb(tmp_path, "ijbb", letter="S", seed=1)
    report = evaluate(net, suites=["ijbb"], root=tmp_path / "IJBB", detector_weights=True)
    (weighted,) = report.results
    check_ijb(weighted.to_dict(), ijb_by_brute_force(tmp_path, "ijbb", "S", net, weighted=True))
    shown = capsys.readouterr().out
    assert "72 templates of 240 images, weighted by the detector's scores" in shown
    assert "rank-10" in shown and "TPIR at FPIR 1e-1" in shown
    assert "TAR at FAR 1e-4 and below cannot be measured with 1,104 impostor pairs" in shown


def test_ijb_tells_what_is_missing_or_wrong(net: Path, tmp_path: Path) -> None:
    done = ran("evaluate", net, "--suite", "ijbb", "--root", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    for place in ("", "meta/", "protocols/", "IJBB/", "IJBB/meta/", "IJBB/protocols/"):
        assert f"{tmp_path}/{place}ijbb_face_tid_mid.txt" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1

    write_ijb(tmp_path, "ijbb")
    meta = tmp_path / "IJBB" / "meta"
    pairs, probes = meta / "ijbb_template_pair_label.txt", meta / "ijbb_1N_probe_mixed.csv"
    kept = pairs.read_text()
    pairs.write_text(kept + "5 1000 0\n")
    with pytest.raises(UserError, match=r"pair_label.txt names template 5, of which .* no image"):
        ijb.load("ijbb", tmp_path)
    pairs.write_text(kept + "1000 993 2\n")
    with pytest.raises(UserError, match="label that is neither 0 nor 1"):
        ijb.load("ijbb", tmp_path)
    pairs.write_text(kept + "1000 993\n")
    with pytest.raises(UserError, match="its columns are t1 t2 same"):
        ijb.load("ijbb", tmp_path)
    pairs.write_text(kept)
    listed = probes.read_bytes()
    probes.write_bytes(b"\xff\xfe" + listed)
    with pytest.raises(UserError, match="no columns TEMPLATE_ID"):
        ijb.load("ijbb", tmp_path)
    probes.write_bytes(listed)
    probes.write_text(probes.read_text() + "993,77,a.jpg,,3\n")
    with pytest.raises(UserError, match="gives template 993 to two people"):
        ijb.load("ijbb", tmp_path)
    probes.unlink()
    alone = ijb.load("ijbb", tmp_path)
    assert (alone.galleries, alone.probes) == ([], None)
    assert alone.notes == [f"no 1:N figures: there is no {probes}"]
    pairs.unlink()
    with pytest.raises(UserError, match=r"ijbb_template_pair_label.txt, .*G1.csv \(found\)"):
        ijb.load("ijbb", tmp_path)
    pairs.write_text(kept)
    points = meta / "ijbb_name_5pts_score.txt"
    lines = points.read_text().splitlines()
    points.write_text("\n".join([lines[0].rsplit(" ", 1)[0] + " inf", *lines[1:]]))
    with pytest.raises(UserError, match=r"line 1 of .*5pts_score.txt is damaged: .* score"):
        ijb.load("ijbb", tmp_path)
    points.write_text("\n".join([lines[0].rsplit(" ", 1)[0] + " NA", *lines[1:]]))
    with pytest.raises(UserError, match="its column score has empty entries"):
        ijb.load("ijbb", tmp_path)
    points.write_text("\n".join(lines[::-1]))
    with pytest.raises(UserError, match="same images in the same order"):
        ijb.load("ijbb", tmp_path)
    (tmp_path / "IJBB/loose_crop/1.jpg").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"loose_crop/1.jpg cannot be read as an image"):
        alone.image(alone.names.index("1.jpg"))


def test_megaface_is_what_brute_force_says(
    net: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(5)
    for p in range(6):
        face = person(rng)
        (tmp_path / "probes" / f"P{p}").mkdir(parents=True)
        for k in range(1 if p == 5 else 4):  # the last has no mate
            image = png(picture(rng, face, noise=90))
            (tmp_path / "probes" / f"P{p}" / f"{k}.png").write_bytes(image)
    for d in range(130):
        folder = tmp_path / "distractors" / f"{d % 3}" / f"{d % 7}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{d}.png").write_bytes(png(picture(rng, person(rng))))
    (tmp_path / "distractors" / "broken.png").write_bytes(b"nothing")
    report = evaluate(net, suites=["megaface"], root=tmp_path).results[0]
    assert "rank-1 by number of distractors" in capsys.readouterr().out
    assert (report.images, report.people, report.searches) == (21, 6, 60)
    assert (report.distractors, report.unreadable) == (130, 1)
    rank1 = {rate.at: rate.value for rate in report.rank1}
    assert list(rank1) == [10, 100, 130]

    files = sorted((tmp_path / "probes").rglob("*.png"))
    crowd = [p for p in (tmp_path / "distractors").rglob("*.png") if p.name != "broken.png"]
    backbone = bundle.load(net)
    e, d = (
        Embedder(backbone).embed([p.read_bytes() for p in ps]).astype(float)
        for ps in (files, crowd)
    )
    hits = [
        max(e[i] @ other for other in d) < e[i] @ e[j]
        for i in range(21)
        for j in range(21)
        if i != j and files[i].parent == files[j].parent
    ]
    assert rank1[130] == pytest.approx(np.mean(hits))
    assert 0.1 < rank1[130] < rank1[10]
    assert evaluate(net, suites=["megaface"], root=tmp_path).results[0] == report


def write_pairs(root: Path, seed: int) -> None:
    """LFW, AgeDB, CALFW and CPLFW with 20 pairs each, in four layouts."""
    rng = np.random.default_rng(seed)
    faces = [person(rng) for _ in range(8)]
    same = np.arange(20) % 2 == 0
    who = [
        (a, a) if s else (a, (a + 3) % 8)
        for a, s in zip(rng.integers(8, size=20), same, strict=True)
    ]
    images = [[png(picture(rng, faces[a])) for a in pair] for pair in who]
    flat = [image for pair in images for image in pair]
    for file in ("lfw.bin", "agedb_30.bin"):
        (root / file).write_bytes(pickle.dumps((flat, same.tolist())))
    for name in ("CALFW", "CPLFW"):
        folder = root / name.lower() / "aligned images"
        folder.mkdir(parents=True)
        genuine, impostor = [], []
        for k, (pair, people) in enumerate(zip(images, who, strict=True)):
            files = [f"P{a}_{2 * k + side:04d}.jpg" for side, a in enumerate(people)]
            for file, image in zip(files, pair, strict=True):
                (folder / file).write_bytes(image)
            # CALFW marks genuine pairs with their fold and lists them first; CPLFW writes 1.
            mark = (len(genuine) + 1 if name == "CALFW" else 1) if same[k] else 0
            lines = [f"{file} {mark}\n" for file in files]
            (genuine if same[k] else impostor).append("".join(lines))
        (root / name.lower() / f"pairs_{name}.txt").write_text("".join(genuine + impostor))


def test_combined_is_the_union_of_four_sets(net: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    report = evaluate(net, suites=["combined", "lfw", "calfw", "cplfw"], root=tmp_path)
    combined, lfw, calfw, cplfw = report.results
    assert [s.name for s in report.results] == ["combined", "lfw", "calfw", "cplfw"]
    assert (combined.pairs, combined.folds, combined.people) == (80, 10, None)
    assert (calfw.people, cplfw.people, lfw.people) == (8, 8, None)
    # The same pairs four times: what does not depend on folds is what one of them gives.
    for other in (combined, calfw, cplfw):
        assert other.auc.value == pytest.approx(lfw.auc.value)
        assert other.tar[0].value == lfw.tar[0].value
    union = open_suite("combined", tmp_path)
    parts = [open_suite(name, tmp_path) for name in ("lfw", "agedb30", "calfw", "cplfw")]
    assert union.folds.tolist() == [f for part in parts for f in part.folds]
    assert [union.images[i] for i in union.pairs[:, 1]] == [
        part.images[i] for part in parts for i in part.pairs[:, 1]
    ]
    assert "aligned images" in union.image_name(len(union.images) - 1)
    for part in parts[2:]:  # each fold has a genuine and an impostor pair
        assert part.folds.tolist() == [*range(10), *range(10)]
        assert part.same.tolist() == [True] * 10 + [False] * 10

    (tmp_path / "agedb_30.bin").unlink()
    done = ran("evaluate", net, "--suite", "combined", "--root", tmp_path)
    assert done.returncode == 2
    assert f"looked for {tmp_path}/agedb_30.bin, or {tmp_path}/agedb30.bin" in done.stderr
    assert "calfw" not in done.stderr  # it is there


def write_cfp(root: Path) -> None:
    rng = np.random.default_rng(4)
    lists: dict[str, list[str]] = {"F": [], "P": []}
    for p in range(1, 7):
        for kind, count in (("frontal", 3), ("profile", 2)):
            folder = root / "Data" / "Images" / f"{p:03d}" / kind
            folder.mkdir(parents=True)
            for k in range(1, count + 1):
                (folder / f"{k:02d}.jpg").write_bytes(png(picture(rng, person(rng))))
                numbered = lists[kind[0].upper()]
                numbered.append(f"{len(numbered) + 1} ../Data/Images/{p:03d}/{kind}/{k:02d}.jpg")
    for kind, lines in lists.items():
        (root / "Protocol").mkdir(exist_ok=True)
        (root / "Protocol" / f"Pair_list_{kind}.txt").write_text("\r\n".join(lines))
    for protocol, others in (("FF", 3), ("FP", 2)):
        for fold in range(1, 11):
            folder = root / "Protocol" / "Split" / protocol / f"{fold:02d}"
            folder.mkdir(parents=True)
            p = (fold - 1) % 6
            second = others * p + others  # the last image of the same person
            (folder / "same.txt").write_text(f"{3 * p + 1},{second}\n")
            (folder / "diff.txt").write_text(
                f"{3 * p + 1},{(second - 1 + others) % (6 * others) + 1}\n"
            )


def test_cfp_in_its_authors_layout(tmp_path: Path) -> None:
    write_cfp(tmp_path / "cfp-dataset")
    for name, second in (("cfp_ff", "frontal/03"), ("cfp_fp", "profile/02")):
        found = open_suite(name, tmp_path)
        assert (found.name, len(found), found.people.max()) == (name, 20, 5)
        assert found.folds.tolist() == [f for f in range(10) for _ in range(2)]
        assert found.same.tolist() == [True, False] * 10
        one, other = (found.image_name(i) for i in found.pairs[2])
        assert one.endswith("cfp-dataset/Data/Images/002/frontal/01.jpg")
        assert other.endswith(f"cfp-dataset/Data/Images/002/{second}.jpg")
        one, other = (found.image_name(i) for i in found.pairs[3])
        assert other.endswith(f"cfp-dataset/Data/Images/003/{second}.jpg")
    same = tmp_path / "cfp-dataset/Protocol/Split/FP/03/same.txt"
    same.write_text("1,99\n")
    with pytest.raises(UserError, match=r"same.txt line 1: expected two numbers of the pair lists"):
        open_suite("cfp_fp", tmp_path)


@pytest.mark.parametrize("name", [s for s in SUITES if not s.startswith("ijb")])
def test_a_suite_that_is_not_there_tells_where_it_was_looked_for(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="looked for") as error:
        open_suite(name, tmp_path)
    assert str(error.value).count(str(tmp_path)) >= 3
    with pytest.raises(UserError, match="did you mean 'calfw'"):
        open_suite("calwf", tmp_path)
    with pytest.raises(UserError, match="no folder"):
        open_suite(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match="needs --root"):
        evaluate(Path("net"), suites=[name])
    with pytest.raises(UserError, match="--detector-weights belongs to --suite ijbb"):
        evaluate(Path("net"), suites=[name], root=tmp_path, detector_weights=True)
    with pytest.raises(UserError, match="--root belongs to --suite"):
        evaluate(Path("net"), pairs=[Path("a.bin")], root=tmp_path)


def test_lists_of_two_lines_a_pair_that_are_wrong(tmp_path: Path) -> None:
    for name in ("A_0001.jpg", "A_0002.jpg"):
        (tmp_path / name).write_bytes(b"x")
    path = tmp_path / "list.txt"
    path.write_text("A_0001.jpg 1\nA_0002.jpg 1\nA_0001.jpg 0\n")
    with pytest.raises(UserError, match="3 lines: expected two a pair"):
        load_pairs(path)
    path.write_text("A_0001.jpg 1\nA_0002.jpg 0\n")
    with pytest.raises(UserError, match=r"line 1: .*labels equal"):
        load_pairs(path)
    path.write_text("A_0001.jpg 1\nB_0002.jpg 1\n")
    with pytest.raises(UserError, match="1 of the 2 images"):
        load_pairs(path)
