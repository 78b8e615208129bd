"""Embedding images: against the network called by hand."""

import cv2
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from sphereface2 import backbones
from sphereface2.errors import UserError
from sphereface2.evaluation.embedding import embed


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = backbones.build("sfnet4", embedding_dim=24, input_size=32, width=0.25, batch_norm=True)
    with torch.no_grad():  # statistics of its own, so that the mode of batch norm matters
        net.train()(torch.randn(64, 3, 32, 32))
    return net.eval()


def png(image):
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def pictures(count=11, side=32, seed=0):
    return list(np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), np.uint8))


def by_hand(net, image, flip=True):
    x = torch.from_numpy(image.transpose(2, 0, 1).copy())[None]
    with torch.no_grad():
        e = net(net.preprocessing(x))
        if flip:
            e = e + net(net.preprocessing(torch.from_numpy(x.numpy()[..., ::-1].copy())))
    return normalize(e)[0].numpy()


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_is_the_network_on_image_and_mirror_image(net, flip, batch_size):
    images = pictures()
    found = embed(net, map(png, images), batch_size=batch_size, flip=flip)
    assert found.shape == (11, 24)
    assert found.dtype == np.float32
    for row, image in zip(found, images, strict=True):
        np.testing.assert_allclose(row, by_hand(net, image, flip), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)


def test_decoded_images_and_mixed_sizes(net):
    images = [*pictures(3), *pictures(2, side=48, seed=1), *pictures(1)]
    found = embed(net, images, batch_size=4)
    for row, image in zip(found, images, strict=True):
        np.testing.assert_allclose(row, by_hand(net, image), atol=2e-6)


def test_an_unreadable_image_is_named_or_left_out(net):
    images = [png(image) for image in pictures(7)]
    images[1], images[5] = b"no image", images[5][:40]
    with pytest.raises(UserError, match="face 1 cannot be read"):
        embed(net, images, batch_size=3, name=lambda i: f"face {i}")
    unreadable = []
    found = embed(net, images, batch_size=3, unreadable=unreadable)
    assert unreadable == [1, 5]
    kept = [image for i, image in enumerate(images) if i not in unreadable]
    np.testing.assert_allclose(found, embed(net, kept), atol=2e-6)


def test_mode_and_statistics_are_left_alone(net):
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    try:
        embed(net, pictures(5))
        assert net.training
    finally:
        net.eval()
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_images_are_taken_as_they_are_needed(net):
    """A lazy iterable is never more than two batches ahead of what is done."""
    taken = done = 0
    lead = []

    def lazy():
        nonlocal taken
        for image in pictures(40):
            taken += 1
            lead.append(taken - done)
            yield png(image)

    def progress(count):
        nonlocal done
        done += count

    assert len(embed(net, lazy(), batch_size=4, progress=progress)) == 40
    assert max(lead) <= 8
    assert done == 40


def test_unusable_weights_and_no_images(net):
    broken = backbones.build("sfnet4", embedding_dim=8, input_size=32, width=0.25)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        embed(broken, pictures(2))
    assert embed(net, []).shape == (0, 24)
