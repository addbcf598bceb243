"""What is explained in a network: how it is asked of graphgbp, and the same score in torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch_reference import ScoreOf
from vision_networks import Network

IMAGES = 2


@dataclass
class Task:
    """Methods, options and feeds for graphgbp; `score_of` turns what torch's network returns into S [N].

    `words` say it in the table; `classes` are those of a classifier.
    """

    methods: Sequence[str]
    options: dict[str, Any]
    feeds: dict[str, np.ndarray]
    score_of: ScoreOf
    words: str
    classes: Sequence[int] = ()


def task_of(network: Network, results: Sequence[Tensor]) -> Task:
    """The question for a network whose outputs for the example images are `results`."""
    make = {"classification": _classification, "segmentation": _segmentation, "detection": _detection}
    return make[network.task](network, results)


def _classification(network: Network, results: Sequence[Tensor]) -> Task:
    """The first image's predicted class, and for the second a class that it is not."""
    (z,) = results
    predicted, other = int(z[0].argmax()), int((z[1].argmax() + 7) % z.shape[1])
    classes = torch.tensor([predicted, other])
    return Task(
        ("saliency", "guided_backprop", "gradcam"),
        {},
        {"target": np.asarray([-1, other])},
        lambda z: z[torch.arange(IMAGES), classes],
        "predicted class; another",
        classes.tolist(),
    )


def _segmentation(network: Network, results: Sequence[Tensor]) -> Task:
    """The pixels predicted as the commonest class, and a mask of weights for another class."""
    (z,) = results
    predicted = z.argmax(1)
    common = int(predicted[0].flatten().mode().values)
    classes = [common, (int(predicted[1].flatten().mode().values) + 1) % z.shape[1]]
    weights = torch.rand(predicted.shape[1:], generator=torch.Generator().manual_seed(3))
    mask = torch.stack([torch.full_like(weights, -1), weights])
    counted = torch.stack([(predicted[0] == common).to(weights), weights])

    def score_of(z: Tensor) -> Tensor:
        return (z[torch.arange(IMAGES), torch.tensor(classes)] * counted.to(z)).sum((1, 2))

    feeds = {"target": np.asarray(classes), "target_mask": mask.numpy()}
    return Task(("saliency", "guided_backprop"), {}, feeds, score_of, "predicted pixels; a mask")


def _detection(network: Network, results: Sequence[Tensor]) -> Task:
    """A cotangent for the whole output."""
    index = network.outputs.index(network.explained)
    cotangent = torch.randn(results[index].shape, generator=torch.Generator().manual_seed(3))

    def score_of(outputs: Any) -> Tensor:
        y = outputs if isinstance(outputs, Tensor) else outputs[index]
        return (y * cotangent.to(y)).flatten(1).sum(1)

    options = {"target": "cotangent", "output": network.explained}
    feeds = {"target_cotangent": cotangent.numpy()}
    return Task(("saliency", "guided_backprop"), options, feeds, score_of, f"a cotangent of `{network.explained}`")
