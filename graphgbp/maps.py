"""Which maps a converted file holds: the backward passes they need, and the maps made of them, each once.

Where there are several explained inputs or target layers, the role of a map ends in the name of its own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphgbp import contract, heads, lowerings, policies
from graphgbp.analysis import Analysis
from graphgbp.backward import RuleFor, backward
from graphgbp.contract import method_of, role_of
from graphgbp.emit import Emitter
from graphgbp.image import Image
from graphgbp.layers import Layer
from graphgbp.options import Options

Maps = dict[str, gs.Tensor]


@dataclass(frozen=True)
class Plan:
    """A request and what it is asked of; `layers` are the target layers of the CAMs by the names they go by."""

    options: Options
    analysis: Analysis
    layers: Mapping[str, Layer]

    @property
    def images(self) -> list[Image]:
        return self.analysis.images

    def input_role(self, method: str, image: Image, *qualifiers: str) -> str:
        several = len(self.images) > 1
        return role_of(method, *qualifiers, *([image.tensor.name] if several else []))

    def layer_role(self, method: str, name: str) -> str:
        return role_of(method, *self.layer_name(name))

    def layer_name(self, name: str) -> list[str]:
        return [name] if len(self.layers) > 1 else []


def make_maps(g: Emitter, plan: Plan, cotangent: gs.Tensor) -> Maps:
    """Every map that is asked for and no other, float32, in the order of the file's outputs."""
    asked = set(plan.options.methods)
    made = _gradients(g, plan, cotangent)
    if plan.layers:
        made |= _layer_gradients(g, plan, cotangent)
        made |= _cams(g, plan, made)
    if not asked.isdisjoint(contract.CAMS):
        asked.update(contract.LAYER_OUTPUTS)
    order = [*contract.METHODS, *contract.LAYER_OUTPUTS]
    roles = sorted(made, key=lambda role: order.index(method_of(role)))
    return {role: g.cast(made[role], np.float32) for role in roles if method_of(role) in asked}


def _gradients(g: Emitter, plan: Plan, cotangent: gs.Tensor) -> Maps:
    """The maps that are gradients by the inputs, each under its policy, and what is made of them alone."""
    analysis, asked = plan.analysis, plan.options.methods
    rules = lowerings.lowered(analysis.view, analysis.rule_for, analysis.image_names)
    masked = [*analysis.rectifiers, *(analysis.smooth if plan.options.rectifiers == "all" else [])]
    passes: list[tuple[str, str, RuleFor]] = []
    if contract.SALIENCY in asked or contract.INPUT_X_GRADIENT in asked:
        passes.append((contract.SALIENCY, "gradient", rules))
    if contract.GUIDED_BACKPROP in asked or contract.GUIDED_GRADCAM in asked:
        passes.append((contract.GUIDED_BACKPROP, "guided", policies.guided(rules, masked)))
    if contract.DECONVNET in asked:
        deconvnet = policies.deconvnet(rules, analysis.rectifiers)
        passes.append((contract.DECONVNET, "deconvnet", deconvnet))
    made: Maps = {}
    for method, scope, rule_for in passes:
        found = _backward(g, plan, cotangent, analysis.image_names, rule_for, scope)
        made |= {plan.input_role(method, image): found[image.tensor.name] for image in analysis.images}
    for image in analysis.images if contract.INPUT_X_GRADIENT in asked else []:
        with g.scope(contract.INPUT_X_GRADIENT):
            gradient = made[plan.input_role(contract.SALIENCY, image)]
            made[plan.input_role(contract.INPUT_X_GRADIENT, image)] = _product(g, gradient, image.tensor, image)
    return made


def _backward(
    g: Emitter, plan: Plan, cotangent: gs.Tensor, wanted: Sequence[str], rule_for: RuleFor, scope: str
) -> Maps:
    analysis = plan.analysis
    return backward(g, analysis.view, {analysis.score.tensor.name: cotangent}, wanted, rule_for, scope)


def _layer_gradients(g: Emitter, plan: Plan, cotangent: gs.Tensor) -> Maps:
    """A and dS/dA of every target layer, by the plain gradient."""
    wanted = list(dict.fromkeys(layer.tensor.name for layer in plan.layers.values()))
    rules = lowerings.lowered(plan.analysis.view, plan.analysis.rule_for, wanted)
    found = _backward(g, plan, cotangent, wanted, rules, "gradient")
    made: Maps = {}
    for name, layer in plan.layers.items():
        made[plan.layer_role(contract.GRADCAM_FEATURES, name)] = layer.tensor
        made[plan.layer_role(contract.GRADCAM_GRADIENTS, name)] = found[layer.tensor.name]
    return made


def _cams(g: Emitter, plan: Plan, made: Mapping[str, gs.Tensor]) -> Maps:
    """The CAMs over the main image, and Grad-CAM times guided backpropagation for every input that is an image."""
    options, cams = plan.options, Maps()
    needed = {contract.GRADCAM} if contract.GUIDED_GRADCAM in options.methods else set()
    for method in (cam for cam in contract.CAMS if cam in needed.union(options.methods)):
        with g.scope(method):
            raw = {
                name: heads.cam(g, method, layer, made[plan.layer_role(contract.GRADCAM_GRADIENTS, name)])
                for name, layer in plan.layers.items()
            }
            for layers, cam in _laid_over(g, plan, raw, plan.analysis.image, options.relu_attributions):
                cams[role_of(method, *layers)] = cam
            for image, guided in _guided(plan, made) if method == contract.GRADCAM else ():
                for layers, cam in _laid_over(g, plan, raw, image, rectified=True):
                    role = plan.input_role(contract.GUIDED_GRADCAM, image, *layers)
                    cams[role] = _product(g, guided, cam, image)
    return cams


def _laid_over(
    g: Emitter, plan: Plan, raw: Mapping[str, gs.Tensor], image: Image, rectified: bool
) -> Iterator[tuple[list[str], gs.Tensor]]:
    """(what its role names of the layer, the map in an image's size): one for each layer, or the mean of them all."""
    mode = plan.options.interpolate_mode
    if plan.options.aggregate == "mean":
        yield [], heads.mean(g, list(raw.values()), image, mode)
        return
    for name, cam in raw.items():
        yield plan.layer_name(name), _over(g, g.relu(cam) if rectified else cam, image, mode)


def _guided(plan: Plan, made: Mapping[str, gs.Tensor]) -> Iterator[tuple[Image, gs.Tensor]]:
    """Every input that Grad-CAM can be drawn over, with its guided backpropagation, where Guided Grad-CAM is asked."""
    main = plan.analysis.image
    for image in plan.analysis.images if contract.GUIDED_GRADCAM in plan.options.methods else []:
        if image.layout is not None and main.layout is not None and len(image.layout) == len(main.layout):
            yield image, made[plan.input_role(contract.GUIDED_BACKPROP, image)]


def _product(g: Emitter, gradient: gs.Tensor, factor: gs.Tensor, image: Image) -> gs.Tensor:
    """Gradient times factor, float32, in the shape of the image."""
    return g.with_shape(g.mul(*(g.cast(x, np.float32) for x in (gradient, factor))), image.tensor)


def _over(g: Emitter, cam: gs.Tensor, image: Image, mode: str) -> gs.Tensor:
    """A map in an image's size; its sizes are spelled as the image's: `height` stays `height`."""
    assert image.layout is not None
    resized = heads.resize_to(g, cam, image, mode)
    sizes = zip(image.layout, image.tensor.shape, strict=True)
    resized.shape = tuple(1 if axis == "C" else size for axis, size in sizes)
    return resized
