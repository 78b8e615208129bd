"""From keys to batches, with and without workers, past damage and interruptions."""

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sphereface2.data import Augmentation, BatchKey, BatchSampler, FaceDataset
from sphereface2.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*:UserWarning")
PEOPLE, EACH = 6, 8


class MemorySource:
    """Plain colours; image i is unreadable if it is in ``broken`` and missing if in ``gone``."""

    def __init__(self, broken=(), gone=(), size=24, dark=0):
        self.labels = np.repeat(np.arange(PEOPLE), EACH)
        self.num_classes = PEOPLE
        self.class_names = None
        self.broken, self.gone, self.size = set(broken), set(gone), size
        self.dark = dark  # columns on the left

    def __len__(self):
        return len(self.labels)

    def read(self, index):
        if index in self.gone:
            raise FileNotFoundError(f"no file {index}")
        if index in self.broken:
            return b"damaged"
        image = np.full((self.size, self.size, 3), (index, 2 * index, 255 - index), np.uint8)
        image[:, : self.dark] = 0
        return cv2.imencode(".png", image[..., ::-1])[1].tobytes()

    def name(self, index):
        return f"image-{index}"

    def fingerprint(self):
        return "memory"


HEAVY = Augmentation(
    24, affine=0.3, crop=0.5, low_resolution=0.3, photometric=0.5, jpeg=0.3, erase=0.3
)


def make(source=None, augmentation=None, **options):
    options.setdefault("max_unreadable", 0.5)
    return FaceDataset(
        source or MemorySource(), augmentation=augmentation or Augmentation.none(24), **options
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": np.array([True, False])}, r"got bool \(2,\): of a mask give np.flatnonzero"),
        ({"indices": [0.5, 1.5]}, "whole numbers"),
        ({"indices": [0, -1]}, "must lie in 0 … "),
        ({"indices": [0, 10**6]}, "must lie in 0 … "),
        ({"indices": [0], "labels": [-1]}, "labels: label -1 of image 0"),
        ({"indices": [0], "labels": [0.5]}, "labels: label 0.5 of image 0"),
    ],
)
def test_what_is_no_image_or_no_label_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def key(indices, step=0, epoch=0, offset=0):
    return BatchKey(epoch, step, np.asarray(indices), offset)


def test_a_batch_holds_the_images_and_classes_asked_for():
    indices = np.arange(8, 40)
    dataset = make(indices=indices, labels=np.repeat([2, 0, 1, 3], 8))
    assert len(dataset) == 32
    assert dataset.num_classes == 4
    batch = dataset[key([0, 9, 31])]
    assert batch.images.shape == (3, 3, 24, 24)
    assert batch.images.dtype == torch.uint8
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [2, 0, 3]
    assert batch.images[:, :, 5, 5].tolist() == [[i, 2 * i, 255 - i] for i in (8, 17, 39)]
    assert batch.unreadable == []
    with pytest.raises(ValueError, match="equally long"):
        make(indices=indices, labels=[0, 1])


def test_augmentation_depends_on_seed_epoch_step_and_place_alone():
    dataset = make(augmentation=HEAVY, seed=5)
    whole = dataset[key(range(20), step=3, epoch=2)].images
    assert torch.equal(dataset[key(range(20), step=3, epoch=2)].images, whole)
    # Two ranks' shares are the two halves of what one process sees.
    halves = [dataset[key(range(10), 3, 2, 0)].images, dataset[key(range(10, 20), 3, 2, 10)].images]
    assert torch.equal(torch.cat(halves), whole)
    for other in (
        dataset[key(range(20), step=4, epoch=2)],
        dataset[key(range(20), step=3, epoch=1)],
        make(augmentation=HEAVY, seed=6)[key(range(20), step=3, epoch=2)],
    ):
        assert not torch.equal(other.images, whole)


def test_each_image_is_mirrored_in_every_other_pass():
    source = MemorySource(dark=5)
    dataset = make(source, augmentation=Augmentation(24, alternate_flip=True), seed=3)
    plain = make(source)
    mirrored = np.zeros((4, 48), bool)
    for epoch in range(4):
        order = np.random.default_rng(epoch).permutation(48)
        images, expected = dataset[key(order, epoch=epoch)].images, plain[key(order)].images
        same = (images == expected).flatten(1).all(1)
        assert torch.equal(images[~same], expected[~same].flip(3))
        mirrored[epoch, order] = ~same.numpy()
    assert (mirrored[0] != mirrored[1]).all() and (mirrored[:2] == mirrored[2:]).all()
    # Of a person, whose images stand together, about half.
    assert abs(mirrored[0].reshape(-1, 8).sum(1) - 4).max() <= 1


def test_unreadable_images_are_replaced_named_and_counted():
    source = MemorySource(broken=[3, 4, 47], gone=[10])
    dataset = make(source, labels=source.labels + 10)
    batch = dataset[key([2, 3, 4, 10, 11, 47])]
    assert batch.unreadable == [3, 4, 10, 47]
    # Each takes the next readable image of the batch, the last one starts over.
    assert batch.images[:, 0, 0, 0].tolist() == [2, 11, 11, 11, 11, 2]
    assert batch.labels.tolist() == [10, 11, 11, 11, 11, 10]
    assert dataset.unreadable_names() == ["image-3", "image-4", "image-10", "image-47"]
    dataset[key([3, 5])]
    assert len(dataset.unreadable_names()) == 4
    with pytest.raises(UserError, match="no image of a batch"):
        dataset[key([3, 4])]


def test_a_batch_in_use_is_never_overwritten():
    dataset = make()
    kept = [dataset[key([i, i + 1])] for i in range(6)]
    views = [kept[0].images[1], kept[1].images.numpy(), kept[2].images.flatten(2)[:, 1:]]
    expected = [view[:].tolist() for view in views]
    batches = [batch.images.tolist() for batch in kept[3:]]
    place = kept[3].images.data_ptr()
    kept = kept[4:]
    addresses = set()
    for i in range(20):
        batch = dataset[key([i + 10, i + 11])]
        addresses.add(batch.images.data_ptr())
        assert batch.images[:, 0, 0, 0].tolist() == [i + 10, i + 11]
    assert [view[:].tolist() for view in views] == expected
    assert [batch.images.tolist() for batch in kept] == batches[1:]
    assert place in addresses  # the one that nobody holds serves again


def test_too_many_unreadable_images_are_an_error():
    source = MemorySource(broken=range(4))
    dataset = make(source, max_unreadable=3 / 48)
    dataset[key([0, 1, 2, 20])]
    with pytest.raises(UserError, match=r"4 of 48 images cannot be read \(image-0"):
        dataset[key([3, 20])]
    # The main process, told by its workers' batches, draws the line over all of them.
    main = make(source, max_unreadable=3 / 48)
    main.note_unreadable([0, 1])
    main.note_unreadable([1, 2])
    with pytest.raises(UserError, match="max_unreadable"):
        main.note_unreadable([3])


def test_other_errors_are_not_swallowed():
    class Wrong(MemorySource):
        def read(self, index):
            raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        make(Wrong())[key([0])]


def loader(workers, **options):
    dataset = make(MemorySource(broken=[7]), HEAVY, seed=2)
    sampler = BatchSampler(dataset.labels, 6, seed=2)
    return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=workers, **options)


def told(batches):
    return [(b.images.sum((1, 2, 3)).tolist(), b.labels.tolist(), b.unreadable) for b in batches]


def test_worker_count_and_loader_change_nothing():
    alone = loader(0)
    expected = [told(alone) for _ in range(3)]
    assert expected[0] != expected[1]
    two = loader(2)
    assert [told(two) for _ in range(3)] == expected
    lasting = loader(2, persistent_workers=True)
    assert [told(lasting) for _ in range(3)] == expected
    resumed = loader(1)
    resumed.sampler.start(1, 3)
    assert told(resumed) == expected[1][3:]
