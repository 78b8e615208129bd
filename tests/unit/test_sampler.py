"""What an epoch hands out, to whom, and from where it continues."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.data.sampler import BatchSampler
from sphereface2.errors import UserError


def epoch(sampler):
    return list(sampler)


def flat(keys):
    return np.concatenate([key.indices for key in keys])


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 200),
    st.integers(1, 12),
    st.integers(1, 4),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_ranks_together_hand_out_the_whole_epoch_once(count, share, world, shuffle, drop, seed):
    size = share * world
    if drop and count < size:
        with pytest.raises(
            UserError, match=f"a batch of {size} images needs as many, but there are {count}:"
        ):
            BatchSampler(np.zeros(count), size, world_size=world)
        return
    samplers = [
        BatchSampler(
            np.zeros(count), size, rank=r, world_size=world, seed=seed, shuffle=shuffle,
            drop_last=drop,
        )
        for r in range(world)
    ]  # fmt: skip
    by_rank = [epoch(sampler) for sampler in samplers]
    assert {len(keys) for keys in by_rank} == {len(samplers[0])}
    steps = [[(key.epoch, key.step) for key in keys] for keys in by_rank]
    assert steps == [[(0, step) for step in range(len(samplers[0]))]] * world
    everything = []
    for parts in zip(*by_rank, strict=True):
        sizes = {len(key.indices) for key in parts}
        assert len(sizes) == 1
        assert [key.offset for key in parts] == [r * sizes.copy().pop() for r in range(world)]
        everything += [key.indices for key in parts]
    everything = np.concatenate(everything)
    if drop:
        assert len(everything) == count - count % size
        assert len(set(everything.tolist())) == len(everything)
    else:
        assert set(everything.tolist()) == set(range(count))
        assert len(everything) - count < world
    # One process alone sees the same global batches.
    alone = BatchSampler(np.zeros(count), size, seed=seed, shuffle=shuffle, drop_last=drop)
    if count % world == 0 or drop:
        assert np.array_equal(everything, flat(epoch(alone)))


def test_epochs_differ_and_seeds_repeat():
    labels = np.zeros(50)
    one, other = BatchSampler(labels, 10, seed=4), BatchSampler(labels, 10, seed=4)
    first, second = flat(epoch(one)), flat(epoch(one))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, flat(epoch(other)))
    assert np.array_equal(second, flat(epoch(other)))
    assert not np.array_equal(first, flat(epoch(BatchSampler(labels, 10, seed=5))))
    other.start(0)
    assert np.array_equal(first, flat(epoch(other)))


@pytest.mark.parametrize("people", [False, True])
def test_it_starts_at_every_step(people):
    labels = np.repeat(np.arange(8), 5)
    options = {"people_per_batch": 4, "images_per_person": 2} if people else {}

    def make():
        return BatchSampler(labels, 8, seed=1, **options)

    def told(keys):
        return [(key.epoch, key.step, key.indices.tolist()) for key in keys]

    sampler = make()
    whole = [told(sampler) for _ in range(3)]
    assert len(sampler) > 3
    for epoch, step in itertools.product(range(2), range(len(sampler) + 1)):
        resumed = make()
        iter(resumed)  # a loader may make an iterator that it takes nothing of
        resumed.start(epoch, step)
        assert told(resumed) == whole[epoch][step:]
        if step < len(sampler):
            assert told(resumed) == whole[epoch + 1]


def test_breaking_off_begins_the_next_epoch():
    sampler = BatchSampler(np.zeros(40), 10)
    for key in sampler:
        if key.step == 1:
            break
    assert [(key.epoch, key.step) for key in sampler] == [(1, step) for step in range(4)]


sizes = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 6), st.integers(1, 5), st.booleans(), st.integers(0, 2))
def test_people_times_images(sizes, people, k, shuffle, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    if len(sizes) < people:
        with pytest.raises(UserError, match=f"batch of {people} people"):
            BatchSampler(labels, people * k, people_per_batch=people, images_per_person=k)
        return
    sampler = BatchSampler(
        labels, people * k, seed=seed, shuffle=shuffle, people_per_batch=people,
        images_per_person=k,
    )  # fmt: skip
    keys = epoch(sampler)
    assert len(keys) == len(sampler)
    for key in keys:
        groups = labels[key.indices].reshape(people, k)
        assert (groups == groups[:, :1]).all()
        assert len(set(groups[:, 0].tolist())) == people
        for group, who in zip(key.indices.reshape(people, k), groups[:, 0], strict=True):
            assert len(set(group.tolist())) == min(k, sizes[who])
    # No more batches of different people can be made of one epoch's hands.
    hands = [-(-size // k) for size in sizes]
    more = len(keys) + 1
    assert sum(min(hand, more) for hand in hands) < people * more
    # An image comes at most once, but for those that fill a person's last hand.
    counts = np.bincount(flat(keys), minlength=len(labels))
    for who, size in enumerate(sizes):
        assert counts[labels == who].sum() <= hands[who] * k
        assert counts[labels == who].max(initial=0) <= -(-hands[who] * k // size)


def test_people_meet_different_people():
    labels = np.repeat(np.arange(20), 3)
    sampler = BatchSampler(labels, 4, people_per_batch=4, images_per_person=1, seed=0)
    met = {frozenset(labels[key.indices].tolist()) for _ in range(5) for key in sampler}
    assert len(met) > 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer ≥ 1, got 0"),
        ({"batch_size": 8, "world_size": 0}, "world_size must be an integer ≥ 1, got 0"),
        ({"batch_size": 8, "rank": -1}, "rank must be an integer ≥ 0, got -1"),
        ({"batch_size": 8, "people_per_batch": -4, "images_per_person": -2}, "≥ 1, got -4"),
        ({"batch_size": 9, "world_size": 2}, "multiple of the 2"),
        ({"batch_size": 8, "world_size": 2, "rank": 2}, "rank 2"),
        ({"batch_size": 8, "people_per_batch": 4}, "together"),
        ({"batch_size": 8, "people_per_batch": 4, "images_per_person": 3}, "make 12"),
        (
            {"batch_size": 41},
            "41 images needs as many, but there are 40: give a smaller batch size",
        ),
        (
            {"batch_size": 9, "people_per_batch": 9, "images_per_person": 1},
            "9 people needs as many, but there are 8: give fewer people",
        ),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        BatchSampler(np.repeat(np.arange(8), 5), **options)
