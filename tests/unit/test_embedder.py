"""The Embedder: against the network called by hand, on torch and on ONNX Runtime."""

import copy
import gc
import pickle
import threading

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.backbones.onnx import OnnxNetwork
from sphereface2.backbones.preprocessing import Preprocessing
from sphereface2.data.pairs import PairSet
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.recognition.export import export


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = backbones.build("sfnet4", embedding_dim=24, input_size=32, width=0.25, batch_norm=True)
    with torch.no_grad():  # statistics of its own, so that the mode of batch norm matters
        net.train()(torch.randn(64, 3, 32, 32))
    return net.eval()


@pytest.fixture(scope="module")
def exported(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    bundle.save(net, folder)
    return export(folder, to="onnx").path


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def images(count=11, side=32, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8))


def by_hand(net, batch, flip=True):
    x = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)  # channels last, as images are
    with torch.no_grad():
        e = net(net.preprocessing(x))
        if flip:
            e = e + net(net.preprocessing(x).flip(3))
    return normalize(e).numpy()


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_is_bit_for_bit_the_network_on_image_and_mirror_image(net, flip, batch_size):
    faces = images()
    embedder = Embedder(net, batch_size=batch_size, flip=flip)
    found = embedder.embed(map(png, faces))
    assert found.shape == (11, 24)
    assert found.dtype == np.float32
    batches = [faces[i : i + batch_size] for i in range(0, 11, batch_size)]
    wanted = np.concatenate([by_hand(net, batch, flip) for batch in batches])
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    mirrored = np.concatenate(
        [by_hand(net, [f[:, ::-1] for f in batch], flip) for batch in batches]
    )
    assert np.allclose(found, mirrored, atol=1e-6) == flip


@pytest.mark.parametrize("flip", [True, False])
def test_an_exported_network_gives_the_same(net, exported, flip):
    faces = [*images(5), *images(3, side=48, seed=1), *images(2, side=20, seed=2)]
    with Embedder.load(exported, flip=flip, batch_size=4) as embedder:
        assert isinstance(embedder.network, OnnxNetwork)
        found = embedder.embed(faces)
        assert embedder.embedding_dim == 24
        assert embedder.fingerprint == Embedder(net).fingerprint
        assert embedder.metadata == net.metadata
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, Embedder(net, flip=flip).embed(faces), atol=1e-5)
    with pytest.raises(UserError, match="on the CPU, not on cuda"):
        Embedder.load(exported, device="cuda")


@pytest.mark.parametrize("shape", [(32, 48), (64, 96), (20, 31), (200, 150)])
@pytest.mark.parametrize("order", ["RGB", "BGR"])
def test_preprocessing_without_torch_is_the_same(shape, order):
    prepare = Preprocessing((32, 48), (100.0, 110.0, 120.0), (60.0, 61.0, 62.0), order)
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    wanted = prepare(torch.from_numpy(image).permute(2, 0, 1)[None]).numpy()
    found = prepare.arrays([image])
    assert (found.dtype, found.shape) == (np.float32, (1, 3, 32, 48))
    if shape == (32, 48):
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, atol=1e-3 / 60)


def test_images_of_mixed_sizes(net):
    faces = [*images(3), *images(2, side=48, seed=1), *images(1)]
    found = Embedder(net, batch_size=4).embed(faces)
    for row, face in zip(found, faces, strict=True):
        np.testing.assert_allclose(row, by_hand(net, [face])[0], atol=2e-6)


def test_an_unreadable_image_is_named_or_left_out(net):
    faces = [png(face) for face in images(7)]
    faces[1], faces[5] = b"no image", faces[5][:40]
    embedder = Embedder(net, batch_size=3)
    with pytest.raises(UserError, match="face 1 cannot be read"):
        embedder.embed(faces, name=lambda i: f"face {i}")
    unreadable = []
    found = embedder.embed(faces, unreadable=unreadable)
    assert unreadable == [1, 5]
    kept = [face for i, face in enumerate(faces) if i not in unreadable]
    np.testing.assert_allclose(found, embedder.embed(kept), atol=2e-6)


class Source:
    """Of which image 1 is missing, image 3 is damaged."""

    def __init__(self, faces):
        self.faces = faces

    def __len__(self):
        return len(self.faces)

    def read(self, index):
        assert threading.current_thread() is not threading.main_thread()
        if index == 1:
            raise FileNotFoundError("1.png is gone")
        return b"damaged" if index == 3 else png(self.faces[index])

    def name(self, index):
        return f"{index}.png"


def test_a_source_and_part_of_it(net):
    faces, embedder = images(6), Embedder(net, batch_size=2)
    unreadable, done = [], []
    found = embedder.embed_source(Source(faces), unreadable=unreadable, progress=done.append)
    assert (unreadable, done) == ([1, 3], [2, 2, 2])
    np.testing.assert_allclose(found, embedder.embed([faces[i] for i in (0, 2, 4, 5)]), atol=2e-6)
    part, unreadable = np.array([5, 3, 0]), []
    found = embedder.embed_source(Source(faces), part, unreadable=unreadable)
    assert unreadable == [1]
    np.testing.assert_allclose(found, embedder.embed([faces[5], faces[0]]), atol=2e-6)
    with pytest.raises(UserError, match=r"3\.png cannot be read"):
        embedder.embed_source(Source(faces), part)
    with pytest.raises(UserError, match=r"1\.png cannot be read: 1\.png is gone"):
        embedder.embed_source(Source(faces))


def test_the_images_of_pairs(net):
    faces, zeros = images(3), np.zeros(1, np.int64)
    pairs = PairSet("few", [png(faces[0]), faces[1], b"?"], np.array([[0, 1]]), zeros == 0, zeros)
    with pytest.raises(UserError, match="image cannot be read"):
        Embedder(net).embed_pairs(pairs)
    pairs.images[2] = png(faces[2])
    np.testing.assert_array_equal(Embedder(net).embed_pairs(pairs), Embedder(net).embed(faces))


def test_modes_and_statistics_are_left_alone_by_several_threads(net):
    """A thread that is done leaves the network in evaluation mode for those that are not."""
    embedder = Embedder(net, batch_size=1)
    wanted = embedder.embed(images(5))
    net.train()
    net.norm.eval()  # frozen by the caller
    before = {k: v.clone() for k, v in net.state_dict().items()}
    entered, left, found = threading.Event(), threading.Event(), []

    def waiting():
        for number, image in enumerate(images(5)):
            if number == 2:  # the first image has been embedded
                entered.set()
                left.wait(20)
            yield image

    other = threading.Thread(target=lambda: found.append(embedder.embed(waiting())))
    try:
        other.start()
        assert entered.wait(20)
        np.testing.assert_array_equal(Embedder(net, batch_size=1).embed(images(5)), wanted)
        left.set()
        other.join()
        assert net.training
        assert net.stages.training
        assert not net.norm.training
    finally:
        net.eval()
    np.testing.assert_array_equal(found[0], wanted)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_float32_is_not_tf32_while_any_thread_embeds(net, monkeypatch):
    seen, inside = [], threading.Barrier(2, timeout=20)

    def embed(pixels):
        seen.append(torch.backends.cudnn.allow_tf32)
        inside.wait()  # both threads are in a forward pass; then one leaves before the other looks
        if threading.current_thread() is not first:
            first.join()
            seen.append(torch.backends.cudnn.allow_tf32)
        return torch.ones(len(pixels), 24)

    monkeypatch.setattr(net, "embed", embed)
    embedder = Embedder(net, flip=False)
    first, second = (threading.Thread(target=embedder.embed, args=(images(2),)) for _ in range(2))
    before = torch.backends.cudnn.allow_tf32
    first.start(), second.start()
    second.join()
    assert before and torch.backends.cudnn.allow_tf32
    assert seen == [False, False, False]


def test_images_are_taken_as_they_are_needed(net):
    """A lazy iterable is never more than two batches ahead of what is done."""
    taken = done = 0
    lead = []

    def lazy():
        nonlocal taken
        for face in images(40):
            taken += 1
            lead.append(taken - done)
            yield png(face)

    def progress(count):
        nonlocal done
        done += count

    assert len(Embedder(net, batch_size=4).embed(lazy(), progress=progress)) == 40
    assert max(lead) <= 8
    assert done == 40


def test_one_pool_of_threads_for_all_calls_which_ends(net):
    def threads():
        return {one for one in threading.enumerate() if one.name.startswith("embedder")}

    gc.collect()
    before = threads()
    embedder = Embedder(net, batch_size=2, threads=2)
    for _ in range(3):
        embedder.embed(images(8))
        assert len(threads() - before) <= 2
    again = pickle.loads(pickle.dumps(embedder))
    np.testing.assert_array_equal(again.embed(images(3)), embedder.embed(images(3)))
    embedder.close()
    again.close()
    assert not threads() - before
    with pytest.raises(RuntimeError):
        embedder.embed(images(1))


def test_after_an_error_nothing_is_being_read(net):
    running = 0

    def read(number):
        nonlocal running
        running += 1
        try:
            if number == 2:
                raise UserError("number 2 cannot be read")
            return images(1)[0]
        finally:
            running -= 1

    embedder = Embedder(net, batch_size=8, threads=1)
    with pytest.raises(UserError, match="number 2"):
        embedder.embed(range(1000), read=read)
    assert running == 0
    assert len(embedder.embed(images(3))) == 3


def test_unusable_weights_no_images_and_wrong_options(net):
    broken = backbones.build("sfnet4", embedding_dim=8, input_size=32, width=0.25)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        Embedder(broken).embed(images(2))
    assert Embedder(net).embed([]).shape == (0, 24)
    for one in (images(1)[0], png(images(1)[0]), "a.jpg"):  # not its rows, bytes or letters
        with pytest.raises(UserError, match="one image was given"):
            Embedder(net).embed(one)
    with pytest.raises(UserError, match=r"weights of torch.float64, .* network\.float\(\)"):
        Embedder(copy.deepcopy(net).double())
    with pytest.raises(UserError, match="batch size must be 1 or more, not 0"):
        Embedder(net, batch_size=0)
