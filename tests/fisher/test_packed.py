"""Sums of outer products against the one line of einsum they stand for."""

import pytest
import torch

from biasshift.fisher import packed

# samples, inputs, units
SHAPES = [(1, 1, 1), (5, 3, 2), (40, 16, 16), (50, 17, 40), (30, 70, 3), (9, 33, 64)]


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def weighted(a: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.einsum("nu,ni,nj->uij", weights.double(), a.double(), a.double())


def added(a: torch.Tensor, weights: torch.Tensor, times: int = 1) -> packed.Rows:
    rows = packed.zeros(weights.shape[1], a.shape[1], a.device)
    for _ in range(times):
        packed.add_weighted(rows, a, weights)
    return rows


@pytest.mark.parametrize("samples, inputs, units", SHAPES)
@pytest.mark.parametrize("times", [1, 3])
def test_weighted_sums(samples, inputs, units, times):
    a, weights = draw(samples, inputs), draw(samples, units, seed=1).square()
    total = packed.dense(added(a, weights, times))
    torch.testing.assert_close(total, times * weighted(a, weights), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples, inputs, units", SHAPES)
def test_results_do_not_depend_on_how_the_work_is_cut(samples, inputs, units, monkeypatch):
    a, weights = draw(150, inputs), draw(150, units, seed=1).square()
    expected = weighted(a, weights)
    monkeypatch.setattr(packed, "TEMPORARY", {"cpu": 7, "cuda": 7})
    monkeypatch.setattr(packed, "MOST_SAMPLES", 70)
    torch.testing.assert_close(packed.dense(added(a, weights)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("samples, inputs, units", SHAPES)
def test_sums_of_vectors(samples, inputs, units):
    vectors = draw(units, samples, inputs)
    rows = packed.zeros(units, inputs, vectors.device)
    packed.add_outer(rows, vectors)
    packed.add_outer(rows, vectors.transpose(0, 1).contiguous().transpose(0, 1))  # any layout
    expected = 2 * vectors.transpose(1, 2) @ vectors
    torch.testing.assert_close(packed.dense(rows), expected, rtol=1e-12, atol=1e-12)


def test_symmetric_products():
    x, y = draw(3, 37), draw(3, 37, seed=1)
    rows = packed.copied(packed.zeros(3, 37, x.device))
    packed.add_symmetric(rows, x, y)
    outer = x[:, :, None] * y[:, None, :]
    torch.testing.assert_close(packed.dense(rows), outer + outer.transpose(1, 2))


def test_an_empty_sum_is_zero_and_takes_no_memory():
    rows = packed.zeros(1000, 1000, torch.device("cpu"))
    assert len({block.data_ptr() for block in rows}) == 1
    assert rows[0].untyped_storage().nbytes() == 8
    assert not packed.dense(rows, slice(0, 2)).any()
    assert not any(block.any() for block in packed.copied(packed.zeros(2, 20, torch.device("cpu"))))


def test_one_batch_keeps_its_dtype_and_the_second_makes_float64():
    a = draw(30, 20, dtype=torch.float32)
    weights = draw(30, 2, dtype=torch.float32, seed=1).square()
    assert {block.dtype for block in added(a, weights)} == {torch.float32}
    assert {block.dtype for block in added(a, weights, times=2)} == {torch.float64}
    vectors, rows = draw(2, 30, 90, dtype=torch.float32), packed.zeros(2, 90, torch.device("cpu"))
    packed.add_outer(rows, vectors)
    assert {block.dtype for block in rows} == {torch.float32}
    # Memory of its own: not a view that keeps the lower triangle alive.
    assert all(block.is_contiguous() for block in rows)
    packed.add_outer(rows, vectors)
    assert {block.dtype for block in rows} == {torch.float64}


def test_copies_do_not_change_with_the_original():
    a, weights = draw(9, 20), draw(9, 2, seed=1).square()
    rows = added(a, weights, times=2)
    copy = packed.copied(rows)
    packed.add_weighted(rows, a, weights)
    torch.testing.assert_close(packed.dense(copy), 2 * weighted(a, weights))


def test_many_batches_lose_no_more_than_one():
    """Sums in float32 throughout would be off by 1e-5 after so many batches of one sign."""
    a = draw(64, 20, dtype=torch.float32).abs()
    weights = draw(64, 3, dtype=torch.float32, seed=1).square()
    expected = weighted(a, weights) * 1000
    total = packed.dense(added(a, weights, times=1000))
    assert ((total - expected).norm() / expected.norm()).item() < 2e-7


def test_a_long_batch_is_added_up_in_float64():
    """Equal numbers are the worst case: all roundings have one sign, and add up with the length."""
    a = torch.full((30 * packed.MOST_SAMPLES, 1), 1.1)
    weights = torch.full((30 * packed.MOST_SAMPLES, 1), 0.7)
    rows, expected = added(a, weights), weighted(a, weights).item()
    assert rows[0].dtype == torch.float64
    assert abs(packed.dense(rows).item() / expected - 1) < 5e-5
    assert abs((a.T @ (weights * a)).item() / expected - 1) > 5e-4  # what one product does


def test_units_can_be_chosen_and_stacked():
    a, weights = draw(9, 40), draw(9, 5, seed=1).square()
    rows = added(a, weights)
    chosen = torch.tensor([3, 0])
    assert torch.equal(packed.dense(rows, chosen), packed.dense(rows)[chosen])
    both = packed.dense(packed.stack([rows, added(a, weights[:, :2])]))
    torch.testing.assert_close(both[5:], both[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("samples, inputs, units", SHAPES)
def test_on_the_gpu(samples, inputs, units):
    a, weights = draw(samples, inputs).cuda(), draw(samples, units, seed=1).square().cuda()
    torch.testing.assert_close(
        packed.dense(added(a, weights)), weighted(a, weights), rtol=1e-12, atol=1e-12
    )
