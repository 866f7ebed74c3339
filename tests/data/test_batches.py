"""One epoch of `batches`: shuffled from a generator, every example once, at one of its views."""

import inspect

import pytest
import torch
from hypothesis import given, strategies as st
from jaxtyping import TypeCheckError

from biasshift import data


@given(examples=st.integers(0, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 9))
def test_an_epoch_shows_every_example_once_with_its_label(examples, batch_size, seed):
    def inputs(labels: torch.Tensor) -> torch.Tensor:
        return torch.stack([labels * 2.0, labels * 3.0], 1)

    y, generator = torch.arange(examples), torch.Generator().manual_seed(seed)
    epoch = list(data.batches(inputs(y), y, batch_size, generator))
    for x, labels in epoch:
        assert torch.equal(x, inputs(labels))
    assert sorted(torch.cat([labels for _, labels in epoch]).tolist()) == list(range(examples))
    full, rest = divmod(examples, batch_size)
    sizes = [len(labels) for _, labels in epoch if len(labels)]
    assert sizes == [batch_size] * full + [rest] * (rest > 0)


def test_batches_are_shuffled_anew_from_the_generator_alone(generator):
    x, y = torch.zeros(100, 1), torch.arange(100)
    before = torch.get_rng_state()

    def order(generator: torch.Generator) -> list[list[int]]:
        return [labels.tolist() for _, labels in data.batches(x, y, 7, generator)]

    first, second = order(generator), order(generator)
    again = order(torch.Generator().manual_seed(0))
    assert first == again and first != second and first != [chunk.tolist() for chunk in y.split(7)]
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_refuses_what_cannot_be_batched(generator):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        data.batches(torch.zeros(3, 2), torch.arange(3), 0, generator)
    with pytest.raises(ValueError, match="got 3 examples and 4 labels"):
        inspect.unwrap(data.batches)(torch.zeros(3, 2), torch.arange(4), 2, generator)


def test_shapes_are_checked_under_pytest(generator):
    """By the import hook of conftest.py; users get the ValueError above from the same line."""
    with pytest.raises(TypeCheckError):
        data.batches(torch.zeros(3, 2), torch.arange(4), 2, generator)


# -- views -----------------------------------------------------------------------------------------


@given(
    images=st.integers(0, 20),
    views=st.integers(1, 5),
    batch_size=st.integers(1, 30),
    seed=st.integers(0, 9),
)
def test_an_epoch_shows_every_image_once_at_one_of_its_views(images, views, batch_size, seed):
    number = torch.arange(images).repeat(views)
    place = torch.arange(views).repeat_interleave(images)
    x = torch.stack([number, place], 1).float()
    generator = torch.Generator().manual_seed(seed)
    rows, labels = zip(*data.batches(x, number, batch_size, generator, views), strict=True)
    numbers, places = torch.cat(rows).unbind(1)
    assert sorted(numbers.tolist()) == list(range(images))
    assert all(0 <= place < views for place in places)
    assert torch.equal(torch.cat(labels).float(), numbers)


def test_views_are_chosen_evenly_and_anew(generator):
    place = torch.arange(9).repeat_interleave(1000)
    first, second = (
        torch.cat([y for _, y in data.batches(place[:, None].float(), place, 64, generator, 9)])
        for _ in range(2)
    )
    assert not torch.equal(first, second)
    counts = first.bincount(minlength=9)  # binomial: 111 ± 10 each
    assert counts.sum() == 1000 and (counts - 1000 / 9).abs().max() < 50


def test_one_view_draws_nothing_but_the_order():
    x, y = torch.zeros(10, 1), torch.arange(10)
    drawn, expected = (torch.Generator().manual_seed(3) for _ in range(2))
    list(data.batches(x, y, 4, drawn, 1))
    torch.randperm(10, generator=expected)
    assert torch.equal(drawn.get_state(), expected.get_state())


@pytest.mark.parametrize("views", [0, -1, 3])
def test_views_that_do_not_divide_the_examples_are_refused(generator, views):
    with pytest.raises(ValueError, match=f"'views' must divide the 10 examples, got {views}"):
        data.batches(torch.zeros(10, 1), torch.arange(10), 4, generator, views)
