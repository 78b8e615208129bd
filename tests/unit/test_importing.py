"""Weights of other projects: names, shapes and outputs that their own code gave, as facts.

``assets/foreign_networks.json`` holds, for each network as its project builds it, the number of its
tensors, a digest of their names and shapes in order, and the first numbers of the unit embeddings
of two random images, with the weights of `seeded`. The two forward passes written here by the
projects' names are of this file alone.
"""

import hashlib
import json
import pickle
import sys
import types
import zlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

from sphereface2 import backbones, cli
from sphereface2.backbones import bundle, foreign, iresnet, sfnet
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.recognition.export import export
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.importing import import_weights

FACTS = json.loads((Path(__file__).parents[1] / "assets" / "foreign_networks.json").read_text())
HALF = {"mean": (127.5,) * 3, "std": (127.5,) * 3}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
IMAGES = np.random.RandomState(0).randint(0, 256, (2, 112, 112, 3)).astype(np.uint8)


def seeded(name, shape):
    draw = np.random.RandomState(zlib.crc32(name.encode()))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    if name.endswith("running_var"):
        return draw.uniform(0.8, 1.2, shape).astype(np.float32)
    if len(shape) > 1:
        return (draw.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
    if name.endswith("weight"):
        return draw.uniform(0.2, 0.9, shape).astype(np.float32)
    return (0.1 * draw.standard_normal(shape)).astype(np.float32)


def weights(shapes, prefix=""):
    return {
        prefix + name: torch.from_numpy(np.asarray(seeded(prefix + name, shape)))
        for name, shape in shapes
    }


# -- the projects' names ---------------------------------------------------------------------------


def norm(name, channels, affine=True):
    return [
        (f"{name}.{part}", () if part == NORM[4] else (channels,))
        for part in NORM
        if affine or part not in NORM[:2]
    ]


def ir(units, channels=(64, 128, 256, 512), dimension=512, side=7):
    """AdaFace's and CVLface's."""
    stem, last = channels[0], channels[3]
    shapes = [("input_layer.0.weight", (stem, 3, 3, 3)), *norm("input_layer.1", stem)]
    shapes += [("input_layer.2.weight", (stem,)), *norm("output_layer.0", last)]
    shapes += [("output_layer.3.weight", (dimension, last * side**2))]
    shapes += [("output_layer.3.bias", (dimension,)), *norm("output_layer.4", dimension, False)]
    inputs, number = stem, 0
    for outputs, count in zip(channels, units, strict=True):
        for _ in range(count):
            body = f"body.{number}."
            if inputs != outputs:
                shapes += [(f"{body}shortcut_layer.0.weight", (outputs, inputs, 1, 1))]
                shapes += norm(f"{body}shortcut_layer.1", outputs)
            shapes += norm(f"{body}res_layer.0", inputs)
            shapes += [(f"{body}res_layer.1.weight", (outputs, inputs, 3, 3))]
            shapes += [
                *norm(f"{body}res_layer.2", outputs),
                (f"{body}res_layer.3.weight", (outputs,)),
            ]
            shapes += [(f"{body}res_layer.4.weight", (outputs, outputs, 3, 3))]
            shapes += norm(f"{body}res_layer.5", outputs)
            inputs, number = outputs, number + 1
    return shapes


def sf(units, batch_norm, channels=(64, 128, 256, 512), dimension=512, side=7):
    """OpenSphere's."""

    def layer(place, number, inputs, outputs):
        conv = [(f"{place}.conv{number}.weight", (outputs, inputs, 3, 3))]
        if batch_norm:
            return [*conv, *norm(f"{place}.bn{number}", outputs)]
        return [*conv, (f"{place}.conv{number}.bias", (outputs,))]

    shapes = norm("features", dimension) if batch_norm else []
    inputs = 3
    for stage, (outputs, count) in enumerate(zip(channels, units, strict=True), 1):
        shapes += layer(f"layer{stage}.0", 1, inputs, outputs)
        for unit in range(1, count + 1):
            for number in (1, 2):
                shapes += layer(f"layer{stage}.{unit}", number, outputs, outputs)
        inputs = outputs
    return [*shapes, ("fc.weight", (dimension, inputs * side**2)), ("fc.bias", (dimension,))]


def shapes_of(case):
    """Layout, and the names and shapes of a network of `FACTS`."""
    layout, name, *rest = case.split()
    if name.startswith("ir") and not name.startswith("iresnet"):
        depth = name.removeprefix("ir").strip("_").replace("101", "100")
        shapes = ir(iresnet.UNITS[f"iresnet{depth}"])
        return layout, [(f"net.{n}" if layout == "cvlface" else n, s) for n, s in shapes]
    if name.startswith("sfnet"):
        return layout, sf(sfnet.UNITS[name], bool(rest))
    with torch.device("meta"), bundle.uninitialised():
        network = backbones.build(name)
    return layout, [(key, tuple(value.shape)) for key, value in network.state_dict().items()]


@pytest.mark.parametrize("case", FACTS)
def test_names_and_shapes_are_the_projects(case):
    _, shapes = shapes_of(case)
    text = "\n".join(f"{name} {shape}" for name, shape in shapes)
    assert len(shapes) == FACTS[case]["tensors"]
    assert hashlib.sha256(text.encode()).hexdigest() == FACTS[case]["names_sha256"]


QUICK = "opensphere sfnet4 bn"


@pytest.mark.parametrize(
    "case", [one if one == QUICK else pytest.param(one, marks=pytest.mark.slow) for one in FACTS]
)
def test_embeds_as_the_projects_own_code(case, tmp_path):
    layout, shapes = shapes_of(case)
    torch.save(weights(shapes), tmp_path / "weights.pt")
    colour = "BGR" if layout == "adaface" else "RGB"
    network = foreign.load(tmp_path / "weights.pt", layout, **HALF, colour=colour).network
    with Embedder(network, flip=False) as embedder:
        found = embedder.embed(list(IMAGES))
    np.testing.assert_allclose(found[:, :8], FACTS[case]["embeddings"], atol=1e-5)


# -- independent forward passes, narrow ------------------------------------------------------------

NARROW = (8, 16, 32, 64)


def batch_norm(w, name, x):
    scale, shift = w.get(f"{name}.weight"), w.get(f"{name}.bias")
    return F.batch_norm(x, w[f"{name}.running_mean"], w[f"{name}.running_var"], scale, shift)


def ir_forward(w, x):
    x = batch_norm(w, "input_layer.1", F.conv2d(x, w["input_layer.0.weight"], padding=1))
    x, number = F.prelu(x, w["input_layer.2.weight"]), 0
    while (unit := f"body.{number}") + ".res_layer.1.weight" in w:
        conv1, conv2 = w[f"{unit}.res_layer.1.weight"], w[f"{unit}.res_layer.4.weight"]
        stride = 2 if number == 0 or conv1.shape[0] != conv1.shape[1] else 1
        short = x[:, :, ::stride, ::stride]
        if f"{unit}.shortcut_layer.0.weight" in w:
            short = F.conv2d(short, w[f"{unit}.shortcut_layer.0.weight"])
            short = batch_norm(w, f"{unit}.shortcut_layer.1", short)
        y = F.conv2d(batch_norm(w, f"{unit}.res_layer.0", x), conv1, padding=1)
        y = F.prelu(batch_norm(w, f"{unit}.res_layer.2", y), w[f"{unit}.res_layer.3.weight"])
        y = batch_norm(w, f"{unit}.res_layer.5", F.conv2d(y, conv2, stride=stride, padding=1))
        x, number = y + short, number + 1
    x = batch_norm(w, "output_layer.0", x).flatten(1)
    x = F.linear(x, w["output_layer.3.weight"], w["output_layer.3.bias"])
    return batch_norm(w, "output_layer.4", x)


def sf_forward(w, x):
    def layer(place, number, x, stride=1):
        conv = f"{place}.conv{number}"
        x = F.conv2d(x, w[f"{conv}.weight"], w.get(f"{conv}.bias"), stride, 1)
        return batch_norm(w, f"{place}.bn{number}", x) if f"{place}.bn1.weight" in w else x

    for stage in range(1, 5):
        x, unit = F.relu(layer(f"layer{stage}.0", 1, x, 2)), 1
        while f"layer{stage}.{unit}.conv1.weight" in w:
            y = layer(f"layer{stage}.{unit}", 2, F.relu(layer(f"layer{stage}.{unit}", 1, x)))
            x, unit = F.relu(x + y), unit + 1
    x = F.linear(x.flatten(1), w["fc.weight"], w["fc.bias"])
    return batch_norm(w, "features", x) if "features.weight" in w else x


@pytest.mark.parametrize("layout", ["adaface", "cvlface", "opensphere", "opensphere bn"])
def test_forward_equals_an_independent_one(layout, tmp_path):
    project, *rest = layout.split()
    side = 3 if project == "cvlface" else 2
    if project == "opensphere":
        shapes, forward = sf((1, 2, 4, 1), bool(rest), NARROW, 24, side), sf_forward
    else:
        shapes, forward = ir((3, 4, 14, 3), NARROW, 24, side), ir_forward
    theirs = weights(shapes)
    torch.save(theirs, tmp_path / "weights.pth")
    network = foreign.load(tmp_path / "weights.pth", project, **HALF, colour="RGB").network
    assert network.embedding_dim == 24 and network.input_size == (16 * side, 16 * side)
    images = torch.randn(3, 3, 16 * side, 16 * side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = forward(theirs, images)
        torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)


# -- the command -----------------------------------------------------------------------------------


def narrow_ir():
    return weights(ir((2, 2, 2, 2), NARROW, 24, 2))


class Hyper(dict):
    """As a framework's own class in a checkpoint."""


def lightning(folder):
    """A checkpoint as Lightning writes one: prefixes, a head, an optimiser, its own classes."""
    Hyper.__module__, Hyper.__qualname__ = "pytorch_lightning.utilities.parsing", "Hyper"
    inside = {f"model.{key}": value for key, value in narrow_ir().items()}
    inside |= {"head.kernel": torch.randn(24, 10), "head.batch_mean": torch.ones(1)}
    path = folder / "adaface.ckpt"
    tree = {
        "state_dict": inside,
        "hyper_parameters": Hyper(lr=np.float64(0.1)),
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(3)}}}],
        "epoch": 3,
    }
    with pytest.MonkeyPatch.context() as patched:  # what is pickled by name must be importable
        parts = Hyper.__module__.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            patched.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[Hyper.__module__].Hyper = Hyper
        torch.save(tree, path)
    return path


def test_command_makes_a_folder_that_all_takes(tmp_path, capsys):
    out = tmp_path / "model"
    assert cli.main(["import", str(lightning(tmp_path)), str(out), "--from", "adaface"]) == 0
    printed = capsys.readouterr().out
    assert "iresnet18" in printed and "head (2)" in printed and "BGR" in printed
    model = FaceEmbedder.from_pretrained(out)
    image = np.random.default_rng(0).integers(256, size=(32, 32, 3)).astype(np.uint8)
    pixels = (torch.from_numpy(image[:, :, ::-1].copy()).permute(2, 0, 1)[None] - 127.5) / 127.5
    expected = sum(ir_forward(narrow_ir(), one) for one in (pixels, pixels.flip(3)))[0]
    np.testing.assert_allclose(
        model.embed(image, aligned=True), F.normalize(expected, dim=0), atol=1e-5
    )
    assert "Imported from weights of adaface" in (out / "README.md").read_text()
    assert cli.main(["import", "x.pt", str(out), "--from", "adaface"]) == 2
    assert "exists already" in capsys.readouterr().err


def test_prefixes_heads_and_missing_counters(tmp_path):
    plain = sf((0, 0, 0, 0), True, NARROW, 24, 2)
    theirs = {k: v for k, v in weights(plain).items() if not k.endswith("num_batches_tracked")}
    reference = foreign.load(_saved(tmp_path, theirs), "opensphere", **HALF, colour="RGB")
    expected = reference.network.state_dict()
    assert reference.ignored == {}
    for tree in (
        {"backbone": theirs, "head": {"w": torch.ones(5, 24), "b": torch.ones(1)}},
        {f"module.{key}": value for key, value in theirs.items()},
        {"model": {"backbone": theirs, "head": {"w": torch.ones(5, 24)}}, "step": 7},
    ):
        found = foreign.load(_saved(tmp_path, tree), "opensphere", **HALF, colour="RGB")
        for key, value in found.network.state_dict().items():
            assert torch.equal(value, expected[key])
        assert set(found.ignored) <= {"head"}


def _saved(folder, tree):
    torch.save(tree, folder / "tree.pth")
    return folder / "tree.pth"


class Bomb:
    def __reduce__(self):
        return (open, ("boom", "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch, legacy):
    monkeypatch.chdir(tmp_path)
    tree = {"state_dict": narrow_ir(), "extra": Bomb()}
    torch.save(tree, "bomb.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        UserError, match=r"bomb\.pt is more than weights: .* call (_?io|builtins)\.open"
    ):
        import_weights(Path("bomb.pt"), Path("out"), from_="adaface")
    Path("bare.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match=r"bare\.pt is"):
        import_weights(Path("bare.pt"), Path("out"), from_="adaface")
    assert not Path("boom").exists() and not Path("out").exists()


def test_other_networks_are_refused(tmp_path):
    def refuses(tree, layout, match):
        with pytest.raises(UserError, match=match):
            import_weights(_saved(tmp_path, tree), tmp_path / "out", from_=layout)
        assert not (tmp_path / "out").exists()

    ours = narrow_ir()
    refuses(
        ours, "arcface_torch", "holds no network of arcface_torch: it looks like adaface or cvl"
    )
    squeezed = {**ours, "body.0.res_layer.se_block.fc1.weight": torch.ones(1, 8, 1, 1)}
    refuses(squeezed, "adaface", "squeeze-and-excitation")
    refuses({**ours, "attention.weight": torch.ones(3)}, "adaface", "unknown tensor 'attention")
    refuses({"a": ours, "b": ours}, "adaface", "holds 2 networks")
    refuses({k: v for k, v in ours.items() if "res_layer.4" not in k}, "adaface", "it lacks 8 tens")
    refuses({"fc.weight": torch.ones(3)}, "opensphere", "holds no network of opensphere;")
    refuses({k: 0 * v for k, v in ours.items()}, "adaface", "gives embeddings of 0")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(UserError, match="is damaged"):
        import_weights(tmp_path / "text.pt", tmp_path / "out", from_="adaface")
    (tmp_path / "net.onnx").touch()
    with pytest.raises(UserError, match="is an ONNX file, not a checkpoint"):
        import_weights(tmp_path / "net.onnx", tmp_path / "out", from_="adaface")


# -- ONNX ------------------------------------------------------------------------------------------


def graph(file, *, batch, last=False, size=16, reshape=True, extra=False, frozen=False):
    """A convolution, ReLU, a reshaping to (batch, -1) and a linear layer, by onnx's own helper."""
    rng = np.random.default_rng(3)
    tensors = {
        "kernel": rng.normal(size=(4, 3, 4, 4)).astype(np.float32),
        "matrix": rng.normal(size=(4 * 16, 24)).astype(np.float32),
        "rows": np.array([batch if isinstance(batch, int) else 0, -1], np.int64),
    }
    sides = [size, size] if size else ["h", "w"]
    shape = [batch, *sides, 3] if last else [batch, 3, *sides]
    nodes = [helper.make_node("Transpose", ["images"], ["x"], perm=[0, 3, 1, 2])] if last else []
    nodes += [
        helper.make_node("Conv", ["x" if last else "images", "kernel"], ["c"], strides=[4, 4]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Reshape", ["r", "rows"], ["f"]) if reshape
        else helper.make_node("Flatten", ["r"], ["f"]),
        helper.make_node("MatMul", ["f", "matrix"], ["out"]),
    ]  # fmt: skip
    if frozen:  # the batch cannot be freed: an addend of its shape
        tensors["addend"] = np.ones((batch, 24), np.float32)
        tensors["shape"] = np.array([batch, 24], np.int64)
        nodes += [helper.make_node("Expand", ["half", "shape"], ["wide"])]
        tensors["half"] = np.full((1, 1), 0.5, np.float32)
        nodes[-2].output[0] = "before"
        nodes += [helper.make_node("Concat", ["before", "wide"], ["both"], axis=0)]
        nodes += [helper.make_node("Slice", ["both", "zero", "end"], ["out"])]
        tensors |= {"zero": np.array([0]), "end": np.array([batch])}
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 24])]
    if extra:
        nodes.append(helper.make_node("ReduceL2", ["out"], ["norm"], axes=[1], keepdims=1))
        outputs.append(helper.make_tensor_value_info("norm", TensorProto.FLOAT, [batch, 1]))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            outputs,
            [numpy_helper.from_array(value, name) for name, value in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, file)
    return tensors


def expected_of(tensors, images):
    """The same in torch, with (x - 100) / 50 on RGB."""
    x = (torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) - 100.0) / 50.0
    x = F.conv2d(x, torch.from_numpy(tensors["kernel"]), stride=4).relu().flatten(1)
    return F.normalize(x @ torch.from_numpy(tensors["matrix"]), dim=1).numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"batch": "N", "reshape": False},
        {"batch": 1},
        {"batch": 1, "last": True, "extra": True},
        {"batch": 4},
        {"batch": 1, "size": None},
        {"batch": 1, "frozen": True},
    ],
)
def test_onnx_networks(tmp_path, options):
    tensors = graph(tmp_path / "theirs.onnx", **options)
    size = (16,) if options.get("size", 16) is None else ()
    out = import_weights(
        tmp_path / "theirs.onnx",
        tmp_path / "model",
        from_="onnx",
        mean=(100,),
        std=(50,),
        size=size,
    )
    rng = np.random.default_rng(5)
    images = [rng.integers(256, size=(16, 16, 3)).astype(np.uint8) for _ in range(7)]
    with Embedder.load(out, flip=False, batch_size=3) as embedder:
        np.testing.assert_allclose(embedder.embed(images), expected_of(tensors, images), atol=1e-5)
        free = embedder.network._session(None).get_inputs()[0].shape[0]
        assert free == (1 if options.get("frozen") else "batch")
    with pytest.raises(UserError, match="is exported already"):
        export(out, to="onnx")


def test_onnx_networks_that_are_refused(tmp_path, monkeypatch):
    file, out = tmp_path / "theirs.onnx", tmp_path / "model"

    def refuses(match, **options):
        with pytest.raises(UserError, match=match):
            import_weights(file, out, from_="onnx", **options)
        assert not out.exists()

    graph(file, batch=1)
    refuses("one direction .*--mean", mean=(-1e7,))
    refuses("takes images of 16 × 16: leave --size out", size=(32,))
    refuses("has no embedding 'norm'", output="norm")
    graph(file, batch=1, size=None)
    refuses("give --size")
    graph(file, batch=4, frozen=True)
    refuses("embeds 4 images at a time")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxruntime", None)
        refuses("ONNX Runtime cannot be imported")
    file.write_bytes(b"no graph")
    refuses("is damaged or not an ONNX file")
    with pytest.raises(UserError, match="one number or three"):
        import_weights(file, out, from_="onnx", mean=(1, 2))
