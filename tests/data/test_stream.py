"""Minibatches as a function of the seed and the epoch.

Second opinions: counting, numpy's pad and slices, and one process for many.
"""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st

from biasshift.data import Augment, Scale, TensorStream
from biasshift.data.stream import Batching, epoch_generator


def pictures(
    count: int, dtype: torch.dtype = torch.uint8, channels: int = 3, side: int = 6
) -> torch.Tensor:
    """No pixel is 0, so that the frame differs from the image."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 256, (count, channels, side, side), generator=generator).to(dtype)


def labels(stream: TensorStream, epoch: int, start: int = 0) -> list[list[int]]:
    return [y.tolist() for _, y in stream.epoch(epoch, start)]


def same(first, second) -> bool:
    pairs = list(zip(first, second, strict=True))
    return all(torch.equal(x, u) and torch.equal(y, v) for (x, y), (u, v) in pairs)


# -- the order -------------------------------------------------------------------------------------


@given(
    examples=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(0, 2**40),
    epoch=st.integers(1, 9),
)
def test_an_epoch_shows_every_example_once_with_its_label(examples, batch_size, seed, epoch):
    def inputs(labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([labels * 2.0, labels * 3.0], 1)

    y = torch.arange(examples)
    stream = TensorStream(inputs(y), y, batch_size, seed)
    batches = list(stream.epoch(epoch))
    for x, labels in batches:
        assert torch.equal(x, inputs(labels))
    assert sorted(torch.cat([labels for _, labels in batches]).tolist()) == list(range(examples))
    full, rest = divmod(examples, batch_size)
    assert [len(labels) for _, labels in batches] == [batch_size] * full + [rest] * (rest > 0)
    assert len(stream) == len(batches)


@given(
    images=st.integers(1, 20),
    views=st.integers(1, 5),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_an_epoch_shows_every_image_once_at_one_of_its_views(images, views, batch_size, seed):
    number = torch.arange(images).repeat(views)
    place = torch.arange(views).repeat_interleave(images)
    x = torch.stack([number, place], 1).float()
    stream = TensorStream(x, number, batch_size, seed, views=views)
    numbers, places = torch.cat([x for x, _ in stream.epoch(1)]).unbind(1)
    assert sorted(numbers.tolist()) == list(range(images))
    assert all(0 <= place < views for place in places)
    assert numbers.tolist() == [label for batch in labels(stream, 1) for label in batch]


def test_views_are_chosen_evenly_and_anew():
    place = torch.arange(9).repeat_interleave(1000)
    stream = TensorStream(place[:, None].float(), place, 64, 0, views=9)
    first, second = (torch.cat([y for _, y in stream.epoch(number)]) for number in (1, 2))
    assert not torch.equal(first, second)
    counts = first.bincount(minlength=9)  # binomial: 111 ± 10 each
    assert counts.sum() == 1000 and (counts - 1000 / 9).abs().max() < 50


def test_an_epoch_depends_on_the_seed_and_its_number_alone():
    y = torch.arange(100)
    stream = TensorStream(torch.zeros(100, 1), y, 7, seed=3)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    third = labels(stream, 3)
    assert torch.equal(torch.get_rng_state(), before)
    list(stream.epoch(1))
    next(stream.epoch(3))  # one that is left in the middle
    torch.manual_seed(6)
    assert labels(stream, 3) == third == labels(TensorStream(torch.ones(100, 2), y, 7, seed=3), 3)


def test_epochs_and_seeds_are_unrelated():
    """With seed + epoch as the seed, epoch 2 of seed 0 would be epoch 1 of seed 1."""
    y = torch.arange(100)
    orders = [
        tuple(labels(TensorStream(torch.zeros(100, 1), y, 100, seed), epoch)[0])
        for seed in range(5)
        for epoch in range(1, 6)
    ]
    assert len(set(orders)) == 25 and tuple(range(100)) not in orders
    fixed = sum(place == label for order in orders for place, label in enumerate(order))
    assert fixed < 60  # Poisson: 25 ± 5


def test_the_batch_size_changes_where_the_order_is_cut_not_the_order():
    y = torch.arange(30)
    cut, whole = (labels(TensorStream(torch.zeros(30, 1), y, size, 0), 1) for size in (4, 30))
    assert [[label for batch in cut for label in batch]] == whole


@pytest.mark.parametrize("start", range(6))
def test_a_resumed_epoch_goes_on_where_it_stopped_without_reading_what_is_skipped(start):
    read = []

    def prepare(x: torch.Tensor) -> torch.Tensor:
        read.append(len(x))
        return x.float()

    stream = TensorStream(pictures(23), torch.arange(23), 5, 0, augment=Augment(), prepare=prepare)
    whole = list(stream.epoch(2))
    read.clear()
    assert same(stream.epoch(2, start), whole[start:])
    assert read == [5, 5, 5, 5, 3][start:]


def test_a_short_last_batch_can_be_dropped():
    y = torch.arange(10)
    dropped = TensorStream(torch.zeros(10, 1), y, 4, 0, drop_last=True)
    kept = TensorStream(torch.zeros(10, 1), y, 4, 0)
    assert labels(dropped, 1) == labels(kept, 1)[:2] and len(dropped) == 2
    assert len(TensorStream(torch.zeros(8, 1), y[:8], 4, 0, drop_last=True)) == 2


# -- several processes -----------------------------------------------------------------------------


@given(
    images=st.integers(1, 60),
    batch_size=st.integers(1, 20),
    world=st.integers(1, 5),
    epoch=st.integers(1, 3),
    drop_last=st.booleans(),
)
def test_processes_together_see_what_one_alone_would(images, batch_size, world, epoch, drop_last):
    x, y = pictures(images), torch.arange(images)
    options = {"augment": Augment(pad=2), "drop_last": drop_last}
    full, rest = divmod(images, batch_size)
    sizes = [batch_size] * full + [rest] * (rest > 0 and not drop_last)
    if not sizes or min(sizes) < world:
        with pytest.raises(ValueError, match=r"at most the \d+ examples|have no share"):
            TensorStream(x, y, batch_size, 0, rank=0, world=world, **options)
        return
    alone = list(TensorStream(x, y, batch_size, 0, **options).epoch(epoch))
    shares = [
        list(TensorStream(x, y, batch_size, 0, rank=rank, world=world, **options).epoch(epoch))
        for rank in range(world)
    ]
    together = [
        tuple(torch.cat(parts) for parts in zip(*batch, strict=True))
        for batch in zip(*shares, strict=True)
    ]
    assert same(alone, together)
    for batch in zip(*shares, strict=True):
        sizes = [len(part) for _, part in batch]
        assert max(sizes) - min(sizes) <= 1 <= min(sizes) and sizes == sorted(sizes, reverse=True)


def test_shares_can_be_resumed_too():
    x, y = pictures(23), torch.arange(23)
    stream = TensorStream(x, y, 5, 0, rank=1, world=2, augment=Augment())
    assert same(stream.epoch(4, 3), list(stream.epoch(4))[3:])


# -- augmentation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 5, 7)])
def test_crops_and_flips_are_those_of_numpy(dtype, shape):
    """Every possible draw, against slices of numpy's padded images, mirrored with [::-1]."""
    pad, generator = 2, torch.Generator().manual_seed(0)
    corner = torch.arange(2 * pad + 1)
    draws = torch.cartesian_prod(corner, corner, torch.arange(2))
    x = torch.randint(1, 256, (len(draws), *shape), generator=generator).to(dtype)
    crops = Augment(pad=pad).apply(x, draws)
    assert crops.dtype == dtype and crops.shape == x.shape and crops.is_contiguous()
    framed = np.pad(x.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    for image, (row, column, mirrored), crop in zip(framed, draws.tolist(), crops, strict=True):
        expected = image[:, row : row + shape[1], column : column + shape[2]]
        assert np.array_equal(crop, expected[:, :, ::-1] if mirrored else expected)


def test_draws_are_even_and_independent():
    draws = Augment(pad=4).draw(81_000, torch.Generator().manual_seed(0))
    counts = (draws[:, 0] * 9 + draws[:, 1]).bincount(minlength=81)
    assert counts.sum() == 81_000 and (counts - 1000).abs().max() < 160  # binomial: ± 31 each
    for part in (draws[:, 2] == 1, draws[:, 2][draws[:, 0] > 4] == 1):
        assert part.double().mean().item() == pytest.approx(0.5, abs=0.02)


def test_no_crops_and_no_flips_are_the_images_themselves():
    x, generator = pictures(50), torch.Generator().manual_seed(0)
    still = Augment(pad=0, flip=False)
    assert torch.equal(still.apply(x, still.draw(50, generator)), x)
    flips, crops = Augment(pad=0), Augment(flip=False)
    flipped, cropped = (each.apply(x, each.draw(50, generator)) for each in (flips, crops))
    for image, original in zip(flipped, x, strict=True):
        assert torch.equal(image, original) or torch.equal(image, original.flip(2))
    assert not torch.equal(flipped, x)
    assert not crops.draw(50, generator)[:, 2].any() and (cropped == 0).any()


def test_images_are_augmented_anew_in_every_epoch_and_their_order_is_that_without():
    x, y = pictures(40), torch.arange(40)
    augmented, plain = (TensorStream(x, y, 40, 0, augment=how) for how in (Augment(), None))
    assert labels(augmented, 1) == labels(plain, 1)
    assert torch.equal(x, pictures(40))  # the data set itself stays as it is
    alike = TensorStream(pictures(1).expand(40, 3, 6, 6), y, 40, 0, augment=Augment())
    (first, _), (second, _) = next(alike.epoch(1)), next(alike.epoch(2))
    # One image 40 times: only the draws differ between the epochs.
    assert not torch.equal(first, second)


def test_bytes_are_prepared_after_the_augmentation():
    x, mean = pictures(20), torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    plain, scaled = (
        TensorStream(x, torch.arange(20), 6, 0, augment=Augment(), prepare=how)
        for how in (None, Scale(mean=mean))
    )
    for (raw, _), (prepared, _) in zip(plain.epoch(1), scaled.epoch(1), strict=True):
        assert raw.dtype == torch.uint8 and prepared.dtype == torch.float32
        expected = raw.numpy().astype(np.float64) / 255 - np.array([0.4, 0.5, 0.6]).reshape(3, 1, 1)
        assert np.abs(prepared.numpy() - expected).max() < 1e-6


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch_size": 0}, "at least 1, got 0"),
        ({"views": 3}, "'views' must divide the 10 examples, got 3"),
        ({"views": 0}, "'views' must divide the 10 examples, got 0"),
        ({"views": -1}, "'views' must divide the 10 examples, got -1"),
        ({"seed": -1}, "must not be negative"),
        ({"rank": 2, "world": 2}, "rank 2 with world 2"),
        ({"rank": -1}, "rank -1 with world 1"),
        (
            {"batch_size": 4, "world": 3},
            "a batch of 2 of the 10 examples, in which some of the 3 processes have no share",
        ),
        ({"batch_size": 2, "world": 3, "drop_last": True}, "in which some of the 3"),
        ({"batch_size": 11, "drop_last": True}, "at most the 10 examples, got 11"),
        ({"augment": Augment()}, r"got 'x' of shape \(10, 2\)"),
    ],
)
def test_what_cannot_be_batched_is_one_message(options, word):
    with pytest.raises(ValueError, match=word) as caught:
        TensorStream(torch.zeros(10, 2), torch.arange(10), **{"batch_size": 5, "seed": 0} | options)
    assert "\n" not in str(caught.value)


def test_no_examples_and_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match="at least one example, got 0"):
        TensorStream(torch.zeros(0, 2), torch.arange(0), 5, 0)
    # As users call it: under pytest the shapes are checked before.
    init = inspect.unwrap(TensorStream.__init__)
    with pytest.raises(ValueError, match="got 3 examples and 4 labels"):
        init(object.__new__(TensorStream), torch.zeros(3, 2), torch.arange(4), 2, 0)


def test_epochs_that_do_not_exist_are_refused_when_they_are_asked_for():
    stream = TensorStream(torch.zeros(10, 2), torch.arange(10), 5, 0)
    with pytest.raises(ValueError, match="at least 1, the first epoch, got 0"):
        stream.epoch(0)
    for start in (-1, 3):
        with pytest.raises(ValueError, match=f"from 0 to 2, the batches of an epoch, got {start}"):
            stream.epoch(1, start)
    assert list(stream.epoch(1, 2)) == []


def test_the_numbers_of_an_image_can_be_asked_for():
    generators = [epoch_generator(0, 1, image) for image in range(50)]
    assert len({tuple(torch.randperm(20, generator=g).tolist()) for g in generators}) == 50
    with pytest.raises(ValueError, match="negative"):
        epoch_generator(0, -1)


def test_shares_of_one_process_are_whole_batches():
    shares = list(Batching(images=5, batch_size=2).shares())
    assert shares == [slice(0, 2), slice(2, 4), slice(4, 5)]


@pytest.mark.gpu
def test_batches_are_equal_on_every_device():
    x, y = pictures(50), torch.arange(50)
    cpu, cuda = (
        TensorStream(x.to(device), y.to(device), 8, 0, augment=Augment(), prepare=Scale()).epoch(1)
        for device in ("cpu", "cuda")
    )
    for (a, b), (u, v) in zip(cpu, cuda, strict=True):
        assert u.device.type == "cuda" and torch.equal(a, u.cpu()) and torch.equal(b, v.cpu())
