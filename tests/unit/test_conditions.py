import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphereface2.data.conditions import LabelNoise, Subset, choose, corrupt
from sphereface2.errors import UserError
from sphereface2.training.config import load

LABELS = np.random.default_rng(3).permutation(np.repeat(np.arange(10, 60), range(1, 51)))


def sizes(positions):
    return np.bincount(LABELS[positions], minlength=60)


@given(
    st.none() | st.integers(2, 50),
    st.none() | st.integers(1, 60),
    st.floats(0, 2),
    st.integers(0, 5),
)
def test_a_subset_keeps_what_it_says(people, most, tail, seed):
    kept = choose(LABELS, Subset(people, most, tail, seed))
    assert np.array_equal(kept, np.unique(kept))
    counts = np.sort(sizes(kept)[sizes(kept) > 0])[::-1]
    assert len(counts) == (people or 50)
    who = np.flatnonzero(sizes(kept))
    # Oracle: rank the people by what they have and cut each off by the formula.
    have = np.sort([person - 9 for person in who])[::-1]
    cap = [max(1, np.rint((most or 50) * (k + 1) ** -tail)) for k in range(len(have))]
    assert np.array_equal(counts, np.sort(np.minimum(have, cap))[::-1])


def test_nothing_asked_for_keeps_everything():
    labels = np.array([5, 2, 2, 9, 5])
    assert choose(labels, Subset()).tolist() == choose(labels, Subset(people=3)).tolist()
    assert choose(labels, Subset()).tolist() == [0, 1, 2, 3, 4]


def test_smaller_subsets_lie_within_larger_ones():
    small, large = (choose(LABELS, Subset(n, m)) for n, m in ((10, 5), (20, 8)))
    assert set(small) < set(large)
    assert not np.array_equal(choose(LABELS, Subset(10, seed=1)), choose(LABELS, Subset(10)))
    assert np.array_equal(choose(LABELS, Subset()), np.arange(len(LABELS)))
    with pytest.raises(UserError, match="must be ≤ 50"):
        choose(LABELS, Subset(51))


@given(st.floats(0, 0.9), st.sampled_from(["uniform", "pairs"]), st.integers(0, 5))
def test_so_many_labels_are_wrong(share, kind, seed):
    classes = LABELS - 10
    noisy = corrupt(classes, LabelNoise(share, kind, seed))
    assert (noisy != classes).sum() == round(share * len(classes))
    assert noisy.min() >= 0
    assert noisy.max() < 50
    if kind == "pairs":
        swapped = {(a, b) for a, b in zip(classes, noisy, strict=True) if a != b}
        assert len({a for a, _ in swapped}) == len(swapped)  # one partner a person
        partners = dict(swapped)
        assert all(partners.get(b, a) == a for a, b in swapped)


def test_more_wrong_labels_than_people_with_partners_have_are_refused():
    classes = np.repeat([0, 1, 2], [1, 1, 98])
    with pytest.raises(UserError, match="50 wrong labels, but only 2 images show people with a"):
        corrupt(classes, LabelNoise(0.5, "pairs", seed=1))


def test_uniform_noise_reaches_everybody_else_alike():
    noisy = corrupt(np.zeros(60_000, int) + np.repeat([0, 4], 30_000), LabelNoise(0.5))
    of_first = np.bincount(noisy[:30_000], minlength=5)[1:] / 15_000
    assert np.allclose(of_first, 0.25, atol=0.02)


@pytest.mark.parametrize(
    "setting",
    [
        "subset.people=1",
        "subset.images_per_person=0",
        "subset.tail=-1",
        "subset.tail=.nan",
        "subset.seed=-1",
        "label_noise.share=1",
        "label_noise.share=.nan",
    ],
)
def test_settings_out_of_range_are_named_when_they_are_read(setting):
    with pytest.raises(UserError, match=rf"data\.{setting.partition('=')[0]} must be"):
        load(None, [f"--data.{setting}"])
