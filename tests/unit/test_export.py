"""Exported networks against the networks they came from, read by ONNX Runtime and torch alone."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from sphereface2 import backbones
from sphereface2.align.template import TEMPLATE
from sphereface2.backbones import bundle
from sphereface2.backbones.onnx import METADATA_KEY, OnnxNetwork
from sphereface2.data import synthetic
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.recognition import export as module
from sphereface2.recognition.export import export
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.importing import import_weights

# OpenCV 4.11 does not read how torch 2.7 writes a flattening.
OPENCV_READS = int(cv2.__version__.partition(".")[0]) >= 5


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def network(name, **options):
    """Untrained, but with statistics and slopes that no folding may lose."""
    torch.manual_seed(0)
    net = backbones.build(name, embedding_dim=32, **options).train()
    for module_ in net.modules():
        if isinstance(module_, torch.nn.PReLU):
            torch.nn.init.uniform_(module_.weight, 0.0, 0.5)
        if isinstance(module_, torch.nn.BatchNorm2d | torch.nn.BatchNorm1d):
            torch.nn.init.uniform_(module_.weight, 0.8, 1.2)
            torch.nn.init.normal_(module_.bias, std=0.1)
            module_.momentum = None
    net(net.preprocessing(torch.from_numpy(np.stack(faces(8))).permute(0, 3, 1, 2)))
    return net.eval()


def faces(count, seed=1):
    rng = np.random.default_rng(seed)
    return [synthetic.render(synthetic.Identity.draw(rng), rng) for _ in range(count)]


def saved(net, folder):
    folder.mkdir()
    bundle.save(net, folder, extra={"note": "trained on drawings"})
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    net = network(
        "sfnet4", width=0.25, input_size=(32, 48), batch_norm=True,
        mean=(100.0, 110.0, 120.0), std=(60.0, 61.0, 62.0), colour_order="BGR",
    )  # fmt: skip
    return saved(net, tmp_path_factory.mktemp("export") / "net")


@pytest.fixture(scope="module")
def float32(checkpoint):
    return export(checkpoint, to="onnx").path


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A training set of 24 drawings, one file unreadable."""
    root = tmp_path_factory.mktemp("drawn")
    for i, image in enumerate(faces(24)):
        (root / f"p{i // 4}").mkdir(exist_ok=True)
        cv2.imwrite(str(root / f"p{i // 4}" / f"{i}.png"), image[..., ::-1])
    (root / "p0" / "broken.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize(
    ("name", "options", "int8"),
    [
        ("sfnet10", {"width": 0.125, "activation": "relu", "dropout": 0.5}, False),
        ("sfnet10", {"width": 0.125, "batch_norm": True}, True),
        ("iresnet18", {"width": 0.125}, True),
        ("mobilefacenet", {"width": 0.125}, False),
    ],
)
def test_every_family_in_both_runtimes_and_in_8_bits(name, options, int8, tmp_path, drawn):
    net = network(name, input_size=32, **options)
    folder = saved(net, tmp_path / "net")
    path = export(folder, to="onnx").path
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    opencv = cv2.dnn.readNetFromONNX(str(path)) if OPENCV_READS else None
    convolutions = [node for node in onnx.load(path).graph.node if node.op_type == "Conv"]
    told = [{attribute.name for attribute in node.attribute} for node in convolutions]
    assert told and all("kernel_shape" in names for names in told)  # which OpenCV 4 asks for
    for batch in (1, 5, 2):
        images = torch.randn(batch, 3, 32, 32)
        (found,) = session.run(None, {"images": images.numpy()})
        wanted = net(images).detach().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())
        if opencv is not None:
            opencv.setInput(images.numpy())
            np.testing.assert_allclose(opencv.forward(), found, atol=1e-5 * np.abs(found).max())
    if int8:
        quantised = export(folder, to="onnx", int8=True, calibration=drawn)
        assert quantised.bytes < 0.6 * path.stat().st_size
        rows = Embedder(OnnxNetwork(quantised.path)).embed(faces(6, seed=2))
        assert (rows * Embedder(net).embed(faces(6, seed=2))).sum(1).min() > 0.95


def test_a_transformer_exports(tmp_path):
    net = backbones.build("timm/vit_tiny_patch16_224", embedding_dim=8, input_size=32, depth=1)
    assert export(saved(net, tmp_path / "net"), to="onnx").cosine_min >= module.PARITY


def test_what_the_file_says_about_itself(checkpoint, float32):
    net = bundle.load(checkpoint)
    meta = onnxruntime.InferenceSession(float32).get_modelmeta().custom_metadata_map
    said = json.loads(meta[METADATA_KEY])
    assert said["preprocessing"] == {
        "size": [32, 48], "mean": [100.0, 110.0, 120.0], "std": [60.0, 61.0, 62.0],
        "colour_order": "BGR",
    }  # fmt: skip
    assert (said["embedding_dim"], said["precision"]) == (32, "float32")
    assert said["fingerprint"] == said["checkpoint_fingerprint"] == bundle.fingerprint(net)
    assert np.array_equal(said["aligner"]["template"], TEMPLATE)
    assert said["metadata"] == {"note": "trained on drawings"}
    assert said["backbone"]["name"] == "sfnet4"
    model = onnx.load(float32)
    assert not model.graph.initializer[0].external_data
    assert not any(node.op_type == "BatchNormalization" for node in model.graph.node)
    assert str(os.getcwd()).encode() not in float32.read_bytes()
    shape = model.graph.input[0].type.tensor_type.shape.dim
    assert [shape[0].dim_param, *(d.dim_value for d in shape[1:])] == ["batch", 3, 32, 48]


def test_it_stands_in_for_the_backbone(checkpoint, float32):
    net, exported = bundle.load(checkpoint), OnnxNetwork(float32)
    assert exported.preprocessing == net.preprocessing
    assert exported.metadata == net.metadata
    assert exported.fingerprint == bundle.fingerprint(net)
    images = [*faces(3), faces(1)[0][:90]]
    np.testing.assert_allclose(
        Embedder(exported).embed(images), Embedder(net).embed(images), atol=1e-5
    )
    rows = FaceEmbedder.from_pretrained(float32).embed(images[:3], aligned=True)
    np.testing.assert_allclose(rows, Embedder(net).embed(images[:3]), atol=1e-5)
    with pytest.raises(UserError, match="shape"):
        exported(np.zeros((1, 3, 112, 112), np.float32))
    with pytest.raises(TypeError):
        bundle.save(exported, checkpoint)


def test_it_pickles(float32):
    exported = OnnxNetwork(float32)
    again = pickle.loads(pickle.dumps(exported))
    images = np.random.default_rng(0).normal(size=(3, 3, *exported.input_size)).astype(np.float32)
    np.testing.assert_array_equal(again(images), exported(images))
    assert again.fingerprint == exported.fingerprint


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts the kernel's threads")
def test_a_pass_takes_the_threads_it_is_given(float32):
    exported = OnnxNetwork(float32, threads=1)
    embedder, images = Embedder(exported), faces(3)
    wanted = embedder.forward(images)

    def started():
        return len(os.listdir("/proc/self/task"))

    before = started()
    for extra, threads in enumerate((None, 1, 2, 2, 1)):
        np.testing.assert_allclose(embedder.forward(images, threads=threads), wanted, atol=1e-6)
        assert started() - before == (extra > 1)  # one more for two at work, and no third


def test_torch_export_archive(checkpoint):
    report = export(checkpoint, to="torch_export")
    said = {module.EXTRA_FILE: ""}
    program = torch.export.load(report.path, extra_files=said)
    assert json.loads(said[module.EXTRA_FILE]) == report.description
    images = torch.randn(3, 3, 32, 48)
    torch.testing.assert_close(program.module()(images), bundle.load(checkpoint)(images))


@pytest.mark.parametrize(
    ("options", "side"),
    [
        (
            {"input_size": (48, 32), "mean": (100.0, 110.0, 120.0), "std": (60.0, 61.0, 62.0),
             "colour_order": "BGR"},
            112,
        ),
        ({"input_size": 128}, 224),
    ],
)  # fmt: skip
def test_what_insightface_crops_and_normalises(options, side, tmp_path, capsys):
    net = network("sfnet4", width=0.125, **options)
    path = export(saved(net, tmp_path / "net"), to="insightface").path
    assert path.name == "model.insightface.onnx"
    assert f"(batch, 3, {side}, {side}) float32, RGB, mean 127.5, std" in capsys.readouterr().out
    nodes = onnx.load(path).graph.node
    # Which would make insightface feed it with pixels of 0 to 255.
    assert not any(node.name.startswith(("Sub", "_minus")) for node in nodes[:8])
    crops = [cv2.resize(image, (side, side)) for image in faces(3)]
    blob = cv2.dnn.blobFromImages(
        [crop[..., ::-1] for crop in crops], 1 / 127.5, (side, side), (127.5,) * 3, swapRB=True
    )
    wanted = Embedder(net, flip=False).embed(crops)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    opencv = cv2.dnn.readNetFromONNX(str(path)) if OPENCV_READS else None
    answers = [session.run(None, {session.get_inputs()[0].name: blob})[0]]
    if opencv is not None:
        opencv.setInput(blob)
        answers.append(opencv.forward())
    for found in answers:
        found = found / np.linalg.norm(found, axis=1, keepdims=True)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    with pytest.raises(UserError, match="exported already"):
        export(path, to="onnx")
    again = Embedder(OnnxNetwork(path), flip=False)
    np.testing.assert_allclose(again.embed(crops), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["mobilefacenet", pytest.param("iresnet18", marks=pytest.mark.slow)]
)
def test_weights_of_arcface_torch(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "_BATCHES", (1, 2))
    net = backbones.build(name, std=(128.0, 100.0, 90.0), colour_order="BGR")
    folder = saved(net.eval(), tmp_path / "net")
    path = export(folder, to="arcface_torch").path
    assert path == folder / "model.pt"
    assert "RGB, mean 127.5, std 127.5" in capsys.readouterr().out
    theirs = torch.load(path, weights_only=True)
    facts = json.loads((Path(__file__).parents[1] / "assets/foreign_networks.json").read_text())
    named = "\n".join(f"{key} {tuple(value.shape)}" for key, value in theirs.items())
    wanted = facts[f"arcface_torch {name}"]
    assert len(theirs) == wanted["tensors"]
    assert hashlib.sha256(named.encode()).hexdigest() == wanted["names_sha256"]
    out = import_weights(path, tmp_path / "again", from_="arcface_torch")
    images = faces(2, seed=3)
    rows = Embedder(bundle.load(out)).embed(images)
    np.testing.assert_allclose(rows, Embedder(net).embed(images), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sfnet4", {"width": 0.125}, "no such network as this sfnet4: it has iresnet18, "),
        ("iresnet18", {"width": 0.125}, "no such network as this iresnet18"),
        ("mobilefacenet", {"activation": "relu"}, "of width 1 with prelu"),
        ("mobilefacenet", {"input_size": 96}, "for images of 112 × 112"),
        ("mobilefacenet", {"mean": (0.0, 0.0, 0.0)}, "trained with a mean of 0, 0, 0"),
    ],
)
def test_networks_that_arcface_torch_has_not(name, options, message, tmp_path):
    folder = saved(backbones.build(name, embedding_dim=8, **options), tmp_path / "net")
    before = set(folder.iterdir())
    with pytest.raises(UserError, match=message):
        export(folder, to="arcface_torch")
    assert set(folder.iterdir()) == before


def test_int8_keeps_embeddings_float_and_tells_its_own_fingerprint(checkpoint, drawn, tmp_path):
    first, again = (
        export(checkpoint, to="onnx", int8=True, calibration=drawn, images=9, out=tmp_path / name)
        for name in ("a.onnx", "b.onnx")
    )
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    original = bundle.fingerprint(bundle.load(checkpoint))
    assert again.description["fingerprint"] != original
    assert first.description["checkpoint_fingerprint"] == original
    assert first.description["calibration"]["images"] == 9
    graph = onnx.load(tmp_path / "a.onnx").graph
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    assert {w.dtype for w in weights.values() if w.ndim > 1} == {np.dtype(np.int8)}
    assert max(np.abs(w.astype(int)).max() for w in weights.values() if w.ndim > 1) <= 64
    assert graph.node[-1].op_type == "Gemm"
    assert not any(node.op_type == "PRelu" for node in graph.node)


def test_a_result_that_differs_is_not_written(checkpoint, tmp_path, monkeypatch):
    traced = module.trace

    def wrong(net):
        other = network("sfnet4", width=0.25, input_size=(32, 48), batch_norm=True)
        torch.nn.init.normal_(other.fc.weight)
        return traced(other)

    monkeypatch.setattr(module, "trace", wrong)
    for to, name in (("onnx", "x.onnx"), ("torch_export", "x.pt2")):
        with pytest.raises(UserError, match="differs from PyTorch"):
            export(checkpoint, to=to, out=tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_an_import_sees_images_as_the_exported_file_says(checkpoint, float32, tmp_path):
    """Not square, BGR, three means: nothing of it is a default of `import`."""
    out = import_weights(float32, tmp_path / "model", from_="onnx", size=(32, 48), colour="BGR")
    with Embedder.load(float32) as theirs, Embedder.load(out) as ours:
        assert ours.network.preprocessing == bundle.load(checkpoint).preprocessing
        assert ours.fingerprint == theirs.fingerprint
        np.testing.assert_array_equal(ours.embed(faces(3)), theirs.embed(faces(3)))
    for wrong in ({"size": (32,)}, {"mean": (127.5,)}, {"std": (60, 61, 63)}, {"colour": "RGB"},
                  {"output": "norm"}):  # fmt: skip
        (name,) = wrong
        with pytest.raises(UserError, match=f"says that its {name} is .*: leave --{name} out"):
            import_weights(float32, tmp_path / "again", from_="onnx", **wrong)
        assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "onxx"}, "did you mean 'onnx'"),
        ({"to": "onnx", "int8": True}, "give --calibration SET"),
        ({"to": "onnx", "calibration": "x"}, "belongs to --int8"),
        ({"to": "torch_export", "int8": True, "calibration": "x"}, "int8 is for ONNX"),
        ({"to": "onnx", "int8": True, "calibration": "absent"}, "absent does not exist"),
        ({"to": "onnx", "int8": True, "calibration": "few"}, "has 4 readable images"),
        ({"to": "onnx", "out": "model.bin"}, "must end in .onnx"),
        ({"to": "onnx", "out": "file/model.onnx"}, "file cannot be a folder"),
        ({"to": "onnx", "out": "few.onnx"}, "few.onnx is a folder"),
        ({"to": "torch_export", "out": "/proc/x.pt2"}, "/proc/x.pt2 cannot be written: No such"),
    ],
)
def test_mistakes_are_named(checkpoint, drawn, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / "p1").symlink_to(drawn / "p1")
    (tmp_path / "few.onnx").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        export(checkpoint, **options)


def test_missing_packages_and_foreign_files(checkpoint, float32, tmp_path, monkeypatch):
    plain = onnx.load(float32)
    del plain.metadata_props[:]
    onnx.save(plain, tmp_path / "foreign.onnx")
    said = json.loads(onnx.load(float32).metadata_props[0].value)
    onnx.helper.set_model_props(plain, {METADATA_KEY: json.dumps(said | {"embedding_dim": 5})})
    onnx.save(plain, tmp_path / "contradictory.onnx")
    (tmp_path / "damaged.onnx").write_bytes(float32.read_bytes()[:5000])
    (tmp_path / "empty.onnx").touch()
    for name, message in [
        ("foreign", "written by `sphereface2 export`"),
        ("contradictory", "is inconsistent"),
        ("damaged", "damaged or not an ONNX file"),
        ("empty", "damaged or not an ONNX file|does not describe"),
        ("absent", "does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            OnnxNetwork(tmp_path / f"{name}.onnx")
    with pytest.raises(UserError, match="exported already"):
        export(float32, to="onnx")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        with pytest.raises(
            UserError, match=r"ONNX Runtime cannot be imported .*: pip install onnxruntime"
        ):
            OnnxNetwork(float32)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"exports to ONNX need onnxscript.*sphereface2\[export\]"):
        export(checkpoint, to="onnx")


def test_the_command(checkpoint, tmp_path):
    out = tmp_path / "net.onnx"
    # Without torchvision, of which torch's exporter would warn, as in a plain install.
    main = (
        "import sys; sys.modules['torchvision'] = None;"
        "from sphereface2.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", main, "export", str(checkpoint), "--to", "onnx", "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "float32" in done.stdout and "cosine with PyTorch 1.0000000" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
