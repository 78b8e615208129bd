"""Drawn faces: reproducible, recognisable with effort, laid out like LFW on disk."""

import numpy as np
import pytest

from sphereface2.data import open_source, synthetic
from sphereface2.data.opening import load_pairs
from sphereface2.errors import UserError
from sphereface2.images import decode


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "set"
    return synthetic.write(folder, people=4, images_per_person=3, seed=7, pairs_per_fold=3)


def test_training_set_and_pairs_are_whole(drawn):
    source = open_source(drawn)
    assert len(source) == 12
    assert source.labels.tolist() == np.repeat(np.arange(4), 3).tolist()
    images = [decode(source.read(i)) for i in range(12)]
    assert {image.shape for image in images} == {(112, 112, 3)}
    assert len({source.read(i) for i in range(12)}) == 12
    pairs = load_pairs(drawn / "synthetic.bin", names=drawn / "synthetic_pairs.txt")
    assert len(pairs) == 60
    assert pairs.same.reshape(10, 2, 3).all(axis=2).tolist() == [[True, False]] * 10
    assert np.array_equal(pairs.folds, np.repeat(np.arange(10), 6))
    people = pairs.people[pairs.pairs]
    assert np.array_equal(people[:, 0] == people[:, 1], pairs.same)
    by_fold = [set(people[pairs.folds == fold].ravel().tolist()) for fold in range(10)]
    assert sum(map(len, by_fold)) == len(set().union(*by_fold))
    trained = {source.read(i) for i in range(12)}
    assert not trained & set(pairs.images)


def test_same_arguments_same_bytes_and_other_seed_other_people(drawn, tmp_path, capsys):
    again = synthetic.write(
        tmp_path / "again", people=4, images_per_person=3, seed=7, pairs_per_fold=3
    )
    assert capsys.readouterr().out == ""
    for name in ("train.rec", "train.idx", "property", "synthetic.bin", "synthetic_pairs.txt"):
        assert (again / name).read_bytes() == (drawn / name).read_bytes()
    assert synthetic.person(7, 2, 3) == [open_source(drawn).read(i) for i in range(6, 9)]
    assert synthetic.person(8, 2, 3) != synthetic.person(7, 2, 3)


def test_identity_shows_through_but_not_in_raw_pixels():
    """Nearest neighbour on pixels beats chance by far and is far from solving the task."""
    people, each = 25, 6
    images = [decode(b) for number in range(people) for b in synthetic.person(1, number, each)]
    flat = np.stack(images)[:, ::8, ::8].reshape(len(images), -1).astype(float)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    similarity = flat @ flat.T
    np.fill_diagonal(similarity, -1)
    labels = np.repeat(np.arange(people), each)
    hits = (labels[similarity.argmax(axis=1)] == labels).mean()
    assert 2.5 / people < hits < 0.9


def test_refusals(tmp_path):
    for options, message in (
        ({"people": 0}, "at least one person"),
        ({"people": 1, "pairs_per_fold": 0}, "pairs per fold"),
        ({"people": 1, "images_per_person": 0}, "at least one person"),
    ):
        with pytest.raises(UserError, match=message):
            synthetic.write(tmp_path / "x", **options)
    with pytest.raises(UserError, match="exists already"):
        synthetic.write(tmp_path, people=1)
    assert list(tmp_path.iterdir()) == []
