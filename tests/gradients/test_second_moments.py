"""Second moments and the scales from them, in plain numbers: without a model."""

from __future__ import annotations

import pytest
import torch

from lark_store.gradients.corrections.second_moments import (
    Moments,
    MomentSums,
    ScaleCorrector,
    moment_corrector,
    moments_in,
    tensors_of,
)

CPU = torch.device("cpu")
V = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 9.0]])  # squares of a matrix; rows' means 2, 6; columns' 2.5, 3.5, 6
BIAS = torch.tensor([1.0, 3.0])
PARAMETERS = [("w", torch.zeros(2, 3)), ("b", torch.zeros(2)), ("unused", torch.zeros(2, 2))]


def close(actual, expected):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), rtol=1e-5, atol=1e-5
    )


def test_matrix_is_reduced_to_means_and_a_vector_kept():
    matrix, vector = Moments.of(V), Moments.of(BIAS)
    close(matrix.rows, [2.0, 6.0])
    close(matrix.columns, [2.5, 3.5, 6.0])
    assert (vector.rows.tolist(), vector.columns) == ([1.0, 3.0], None)
    stack = Moments.of(torch.stack([V, 2 * V]))
    close(stack.rows, [[2.0, 6.0], [4.0, 12.0]])
    close(stack.columns, [[2.5, 3.5, 6.0], [5.0, 7.0, 12.0]])
    assert {matrix.rows.dtype, matrix.columns.dtype, vector.rows.dtype} == {torch.float64}
    both = matrix.plus(Moments.of(3 * V)).over(2)
    close(both.rows, [4.0, 12.0])
    close(both.columns, [5.0, 7.0, 12.0])
    close(vector.plus(vector).over(4).rows, [0.5, 1.5])
    assert vector.plus(vector).columns is None


@pytest.mark.parametrize(
    ("moments", "shape"),
    [(Moments.of(V), (2, 3)), (Moments.of(BIAS), (2,)), (Moments.of(torch.ones(4, 2, 3)), (4, 2, 3))],
)
def test_moments_fit_parameters_of_one_shape(moments, shape):
    shapes = [(2, 3), (3, 2), (2,), (3,), (), (4, 2, 3), (4, 3, 2), (2, 2, 3), (2, 4), (3, 3)]
    assert [other for other in shapes if moments.fits(other)] == [shape]


def test_moments_of_another_stack_do_not_fit():
    odd = Moments(torch.ones(4, 2), torch.ones(5, 3))
    assert not any(odd.fits(shape) for shape in ((4, 2, 3), (5, 2, 3)))


@pytest.mark.parametrize("power", [0.25, 0.5])
def test_scale_is_an_inverse_power_of_damped_moments(power):
    """V is approximated by rows × columns / mean, each damped by half of the mean of V, 4."""
    scale = Moments.of(V).scale(power, 0.5, 99.0)
    rows, columns = torch.tensor([2.0, 6.0]) + 2, torch.tensor([2.5, 3.5, 6.0]) + 2
    approximate = rows[:, None] * columns[None, :] / 6  # the damped rows' mean
    gradient = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.0, 4.0]])
    close(scale.whole(gradient), gradient / approximate**power)
    vector = Moments.of(BIAS).scale(power, 0.5, 99.0)  # the mean is 2
    close(vector.whole(torch.tensor([1.0, -1.0])), torch.tensor([1.0, -1.0]) / torch.tensor([2.0, 4.0]) ** power)
    assert vector.right is None


def test_moments_of_zero_are_damped_by_the_floor():
    zero = Moments.of(torch.zeros(2, 2)).scale(0.5, 0.5, 4.0)
    close(zero.whole(torch.ones(2, 2)), torch.full((2, 2), 0.5))
    stack = Moments.of(torch.stack([torch.zeros(2, 3), V])).scale(0.5, 0.5, 4.0)
    close(stack.whole(torch.ones(2, 2, 3))[0], torch.full((2, 3), 0.5))
    close(stack.whole(torch.ones(2, 2, 3))[1], Moments.of(V).scale(0.5, 0.5, 9.0).whole(torch.ones(2, 3)))


def test_small_moments_are_damped_by_their_own_mean():
    small = Moments.of(V / 1000).scale(0.5, 0.5, 99.0)
    close(small.whole(torch.ones(2, 3)) / 1000**0.5, Moments.of(V).scale(0.5, 0.5, 99.0).whole(torch.ones(2, 3)))


def test_floor_is_the_mean_of_all_rows():
    moments = {"w": Moments.of(V), "b": Moments.of(torch.zeros(3))}
    corrector = moment_corrector(moments, 0.5, 0.5, CPU)
    floor = (2 + 6) / 5
    close(corrector.whole("b", torch.ones(3)), torch.ones(3) / floor**0.5)
    nothing = moment_corrector({"b": Moments.of(torch.zeros(3))}, 0.5, 0.5, CPU)
    close(nothing.whole("b", torch.ones(3)), torch.ones(3))  # no moment above 0 leaves gradients as they are


def test_factors_and_whole_gradients_are_scaled_alike():
    corrector = ScaleCorrector({"w": Moments.of(V).scale(0.25, 0.1, 1.0), "b": Moments.of(BIAS).scale(0.25, 0.1, 1.0)})
    torch.manual_seed(0)
    left, right = torch.randn(4, 2), torch.randn(4, 3)
    whole = corrector.whole("w", left.T @ right)
    close(corrector.left("w", left).T @ corrector.right("w", right), whole)
    rows = torch.zeros(2, 3).index_add_(0, torch.tensor([1, 0, 1, 1]), right)
    added = corrector.rows("w", torch.tensor([1, 0, 1, 1]), right)
    close(torch.zeros(2, 3).index_add_(0, torch.tensor([1, 0, 1, 1]), added), corrector.whole("w", rows))
    sums = torch.randn(3, 2)
    close(corrector.vector("b", sums), torch.stack([corrector.whole("b", row) for row in sums]))
    for method in ("left", "right", "vector", "whole"):  # a parameter without moments is unchanged
        assert getattr(corrector, method)("other", left) is left
    assert corrector.rows("other", torch.tensor([0]), right) is right


def sums_of(*gradients):
    sums = MomentSums(PARAMETERS, CPU)
    for gradient, keep in gradients:
        out = sums.new()
        for name, value in gradient.items():
            sums.add(name, value.reshape(1, -1), out)
        norm = float(sums.finish(out))
        assert norm == pytest.approx(sum(float(v.square().sum()) for v in gradient.values()) ** 0.5)
        sums.commit(keep=keep)
    return sums


FIRST, SECOND = ({"w": torch.randn(2, 3) + n, "b": torch.randn(2) - n} for n in range(2))


def test_sums_are_over_the_kept_samples_and_resume():
    whole = sums_of((FIRST, True), (SECOND, False), (SECOND, True))
    assert whole.n == 2
    means = whole.means()
    expected = (FIRST["w"].square() + SECOND["w"].square()) / 2
    close(means["w"].rows, expected.mean(dim=1))
    close(means["w"].columns, expected.mean(dim=0))
    close(means["b"].rows, (FIRST["b"].square() + SECOND["b"].square()) / 2)
    assert means["b"].columns is None
    close(means["unused"].rows, torch.zeros(2))
    draft = moments_in(tensors_of(sums_of((FIRST, True)).sums()))
    assert set(tensors_of(draft)) == {"w/rows", "w/columns", "b/rows"}
    resumed = MomentSums(PARAMETERS, CPU)
    resumed.restore(draft, 1)
    out = resumed.new()
    for name, value in SECOND.items():
        resumed.add(name, value.reshape(1, -1), out)
    resumed.commit(keep=True)
    assert resumed.n == 2
    for name, tensor in tensors_of(means).items():
        close(tensors_of(resumed.means())[name], tensor)
