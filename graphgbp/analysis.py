"""What can be said of a model before anything is appended; `inspect` shows it and `convert` acts on it."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import onnx_graphsurgeon as gs

import graphgbp.rules  # noqa: F401  fills the registry
from graphgbp import heads, registry, score
from graphgbp.backward import Gap, RuleFor, active_nodes, gaps, refuse_gaps, varied_tensors
from graphgbp.errors import RequestError
from graphgbp.image import Image, find_images
from graphgbp.layers import Layer, LayerSearch, find_tensor
from graphgbp.layouts import Layouts, find_layouts
from graphgbp.nodes import label
from graphgbp.options import Request
from graphgbp.plain.quantised import QUANTISERS
from graphgbp.rectifiers import Activations, find_activations
from graphgbp.registry import Entry, Unsupported
from graphgbp.score import Score
from graphgbp.smooth import Activation
from graphgbp.view import View


class Analysis:
    """A reading view, the inputs that are explained, and the score."""

    def __init__(self, view: View, request: Request | None = None) -> None:
        request = request or Request()
        self.view = view
        given = find_images(view, request.inputs)
        self.layouts: Layouts = find_layouts(view, given)
        self.score: Score = self._find_score(request, given)
        self.images = given if request.inputs is not None else self._reaching(given)

    def _find_score(self, request: Request, images: Sequence[Image]) -> Score:
        axes = {name: layout.channel_axis for name, layout in self.layouts.items()}
        if request.target_tensor is not None:
            return score.neuron(self.view, find_tensor(self.view, request.target_tensor), axes, request.class_axis)
        reached = varied_tensors(self.view, [image.tensor.name for image in images], self.rule_for)
        if request.target == "cotangent":
            return score.whole_output(self.view, reached, request.output)
        return score.find_score(self.view, reached, axes, request.score, request.output, request.class_axis)

    def _reaching(self, images: Sequence[Image]) -> list[Image]:
        """Those the score depends on; all of them where it depends on none, which is refused later."""
        return [image for image in images if self._depends_on(image)] or list(images)

    def _depends_on(self, image: Image) -> bool:
        return self.score.tensor.name in varied_tensors(self.view, [image.tensor.name], self.rule_for)

    @cached_property
    def rule_for(self) -> RuleFor:
        return table_of(self.view)

    @property
    def image(self) -> Image:
        """The input that CAMs are drawn over: the first that is an image, else the first."""
        return _main(self.images)

    @property
    def image_names(self) -> list[str]:
        return [image.tensor.name for image in self.images]

    @cached_property
    def active(self) -> list[gs.Node]:
        """The nodes between the explained inputs and the score."""
        return active_nodes(self.view, self.image_names, [self.score.tensor.name], self.rule_for)

    @cached_property
    def gaps(self) -> list[Gap]:
        return gaps(self.view, self.active, self.image_names, [self.score.tensor.name], self.rule_for)

    @cached_property
    def activations(self) -> Activations:
        return activations_among(self.view, self.active)

    @cached_property
    def surrogates(self) -> list[str]:
        return surrogates_among(self.view, self.active)

    @property
    def rectifiers(self) -> list[Activation]:
        return self.activations.rectifiers

    @property
    def smooth(self) -> list[Activation]:
        return self.activations.smooth

    @cached_property
    def _search(self) -> LayerSearch:
        tensor, axis = self.score.tensor, self.score.class_axis
        if axis is None and tensor.name in self.layouts:  # an output as it is, seeded with a cotangent
            axis = self.layouts[tensor.name].channel_axis
        return LayerSearch(self.view, self.image.tensor, tensor, axis, self.layouts, self.rule_for)

    @property
    def layers(self) -> list[Layer]:
        """The candidates for the target layer."""
        return self._search.candidates

    def layer(self, request: str) -> Layer:
        """The target layer for a request; RequestError where it or the image cannot serve."""
        chosen = self._search.choose(request)
        heads.require_image(self.image, chosen)
        return chosen

    def refuse_unexplainable(self) -> None:
        """Raise UnsupportedOperatorError for gaps, RequestError and UnsupportedError for a score that is none."""
        refuse_gaps(self.gaps, self.view)
        self.refuse_scoreless()

    def refuse_scoreless(self) -> None:
        self.score.require_shape()
        for image in self.images:
            if not self._depends_on(image):
                raise RequestError(
                    f"score '{self.score.tensor.name}' does not depend on input '{image.tensor.name}' by any float "
                    "path; name another input or output"
                )


def _main(images: Sequence[Image]) -> Image:
    return next((image for image in images if image.layout is not None), images[0])


def activations_among(view: View, nodes: Sequence[gs.Node]) -> Activations:
    """The rectifiers and smooth activations among nodes, in words of the file."""
    return Activations(*([_in_its_node(view, activation) for activation in kind] for kind in find_activations(nodes)))


def _in_its_node(view: View, activation: Activation) -> Activation:
    """An activation that stands in no node of its own in the file, and the node that it stands in."""
    if id(activation.node) not in view.standing_for:
        return activation
    op, _ = view.standing_for[id(activation.node)]
    how = "swallowed by" if op in QUANTISERS else "in"
    return replace(activation, clothing=f"{activation.clothing} {how} {op}")


def surrogates_among(view: View, nodes: Sequence[gs.Node]) -> list[str]:
    """The quantisers that the gradient goes straight through, by the name of their node in the file."""
    rule_for = table_of(view)
    found = [node for node in nodes if getattr(rule_for(node), "surrogate", False)]
    return [view.standing_for.get(id(node), ("", label(node)))[1] for node in found]


def table_of(view: View) -> RuleFor:
    """The rule table read through the model's opsets, and why a fused node could not be seen as plain ones."""

    def rule_for(node: gs.Node) -> Entry | None:
        if id(node) in view.opaque:
            return Unsupported(lambda node: view.opaque[id(node)])
        return registry.lookup(node, view.opsets)

    return rule_for
