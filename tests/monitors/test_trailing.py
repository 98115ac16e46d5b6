import pytest
import torch

from foreshock.monitors.trailing import on_trailing_axes
from tests.rounding_bounds import FP32, gamma

pytestmark = pytest.mark.numeric

CALLS = []


@on_trailing_axes
def scaled_product(x, y, scale):
    """Looks at a value, which vmap cannot do."""
    CALLS.append(tuple(x.shape))
    product = x @ y.mT * scale
    return product if bool((product > 0).any()) else -product


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize(("x_axis", "y_axis"), [(0, 0), (1, 0), (0, None), (None, 2)])
def test_vmap_calls_it_once_with_its_axis_in_front(x_axis, y_axis):
    x, y = randn(5, 2, 3, 4), randn(5, 2, 3, 4)
    CALLS.clear()
    first = [x[0] if x_axis is None else x, y[0] if y_axis is None else y]
    moved = [t if axis is None else t.movedim(0, axis) for t, axis in zip(first, (x_axis, y_axis), strict=True)]
    got = torch.vmap(lambda a, b: scaled_product(a, b, 0.5), in_dims=(x_axis, y_axis))(*moved)
    assert len(CALLS) == 1
    expected = torch.stack([scaled_product(*(f if f.ndim == 3 else f[i] for f in first), 0.5) for i in range(5)])
    size = (first[0].abs() @ first[1].abs().mT * 0.5).amax()
    assert ((got - expected).abs() <= 2 * gamma(5, FP32) * size).all()  # four terms and a factor


def test_without_vmap_it_is_the_function_itself():
    x, y = randn(2, 3, 4), randn(2, 3, 4)
    assert torch.equal(scaled_product(x, y, 2.0), x @ y.mT * 2.0)
