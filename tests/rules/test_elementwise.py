import pytest
import torch

from tests.rules.harness import check_rule, normal

SHAPES = [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((4,), (2, 3, 4)), ((2, 1, 4), (1, 3, 1)), ((), (2, 3))]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(
    ("op", "reference"), [("Add", torch.add), ("Sub", torch.sub), ("Mul", torch.mul), ("Div", torch.div), ("Max", torch.maximum), ("Min", torch.minimum)]
)
def test_binary(op, reference, shapes, dynamic):
    a, b = (normal(*shape, seed=index + 1) for index, shape in enumerate(shapes))
    if op == "Div":
        b = b + 3 * (b > 0) - 3 * (b <= 0)
    check_rule(op, [a, b.astype("float32")], reference, wrt=(0, 1), dynamic=dynamic)
