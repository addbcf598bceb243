"""Results: maps as attributes, the table of classes, pictures."""

import copy

import numpy as np
import pytest
import torch

from graphgbp import Explainer
from graphgbp.result import Result
from tests.build import small_cnn
from tests.scores import run

SOFTMAX = ("y = Softmax<axis=1>(z)",)


def test_maps_are_attributes(explainer, images):
    result = explainer.explain(images)
    assert result.saliency is result.maps["saliency"]
    with pytest.raises(AttributeError, match="no 'deconvnet'; its maps are saliency, gradcam"):
        result.deconvnet  # noqa: B018
    assert {"saliency", "gradcam", "top", "maps"} <= set(dir(result))
    assert copy.copy(result).saliency is result.saliency
    with pytest.raises(AttributeError):
        result.images = images
    assert not hasattr(Result.__new__(Result), "saliency")


@pytest.mark.parametrize(
    ("tail", "probability"),
    [
        (SOFTMAX, True),
        (("y = LogSoftmax<axis=1>(z)",), True),
        (("y = Sigmoid(z)",), True),
        (("y = Identity(z)",), False),
    ],
)
def test_top(images, tail, probability):
    proto = small_cnn(tail)
    top = Explainer(proto, ["saliency"], device="cpu").explain(images, 0).top(3)
    z = torch.from_numpy(run(proto, "z", images)).double()
    values = {"LogSoftmax": z.softmax(1), "Softmax": z.softmax(1), "Sigmoid": z.sigmoid(), "Identity": z}
    expected = values[proto.graph.node[-1].op_type].topk(3)
    assert [[entry.class_index for entry in row] for row in top] == expected.indices.tolist()
    np.testing.assert_allclose([[entry.value for entry in row] for row in top], expected.values, rtol=1e-4)
    assert {entry.is_probability for row in top for entry in row} == {probability}


@pytest.mark.parametrize("tail", [("y = Sigmoid(z)",), ("y = Identity(z)",)])
def test_top_of_one_score_for_two_classes(images, tail):
    proto = small_cnn(tail, classes=1)
    z = torch.from_numpy(run(proto, "z", images)).double().reshape(-1)
    both = torch.stack([-z, z], 1)
    expected = torch.sigmoid(both) if "Sigmoid" in tail[0] else both
    top = Explainer(proto, ["saliency"], device="cpu").explain(images).top()
    assert [[entry.class_index for entry in row] for row in top] == expected.argsort(1, descending=True).tolist()
    np.testing.assert_allclose([row[0].value for row in top], expected.max(1).values, rtol=1e-4)


def test_save_writes_pictures(tmp_path, explainer, images):
    index = explainer.explain(images).save(tmp_path / "maps", names=["a", "b", "c"])
    assert index.is_file() and (tmp_path / "maps" / "b.png").is_file()
