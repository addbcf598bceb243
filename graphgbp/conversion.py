"""The pipeline: file -> reading view -> seed -> backward passes -> maps -> appended nodes -> file."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

import graphgbp.rules  # noqa: F401  fills the registry
from graphgbp import contract, heads, layers, model_file, policies, registry
from graphgbp import target as targets
from graphgbp._version import __version__
from graphgbp.append import append
from graphgbp.backward import Gap, RuleFor, active_nodes, backward, gaps, is_float, refuse_gaps
from graphgbp.contract import Manifest, public_names
from graphgbp.emit import Emitter
from graphgbp.errors import GraphgbpError, ModelFileError, RequestError
from graphgbp.image import Image, find_image
from graphgbp.layers import Layer
from graphgbp.prepare import View, prepare, skeleton
from graphgbp.rectifiers import Rectifier, find_rectifiers, find_smooth
from graphgbp.source import ModelLike, open_source, weights_folder
from graphgbp.target import Score, Seed

DEFAULT_METHODS = (contract.GUIDED_GRADCAM, contract.GRADCAM, contract.GUIDED_BACKPROP)
TARGETS = ("required", "optional", "weights")
RECTIFIERS = ("relu", "all")


@dataclass(frozen=True)
class Options:
    """What is asked of a conversion, as `convert` takes it."""

    methods: tuple[str, ...]
    target_layer: str
    score: str
    target: str
    rectifiers: str
    interpolate_mode: str
    relu_attributions: bool
    input: str | None
    output: str | None

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in contract.METHODS]
        if unknown or not self.methods:
            raise RequestError(
                f"unknown method {', '.join(map(repr, unknown)) or '(none given)'}; "
                f"choose among {', '.join(contract.METHODS)}"
            )
        for name, choices in (("score", targets.SCORES), ("target", TARGETS), ("rectifiers", RECTIFIERS)):
            _one_of(name, getattr(self, name), choices)
        _one_of("interpolate_mode", self.interpolate_mode, tuple(heads.INTERPOLATE_MODES))
        if self.target_layer != "auto" and not self.needs_layer:
            raise RequestError(
                f"target_layer='{self.target_layer}' is where Grad-CAM is taken, and none of "
                f"{', '.join(self.methods)} is one; leave it out, or ask for gradcam or guided_gradcam"
            )

    @property
    def needs_layer(self) -> bool:
        return any(method in contract.LAYER_METHODS for method in self.methods)

    def roles(self) -> list[str]:
        """The outputs of the converted file, behind the original ones."""
        target_class = [] if self.target == "weights" else [contract.TARGET_CLASS]
        maps = [method for method in contract.METHODS if method in self.methods]
        features = contract.LAYER_OUTPUTS if contract.GRADCAM in self.methods else ()
        return [*target_class, contract.TARGET_SCORE, *maps, *features]


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RequestError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")


class Analysis:
    """What can be said of a model before anything is appended; `inspect` shows it and `convert` acts on it."""

    def __init__(self, view: View, score: str = "auto", input: str | None = None, output: str | None = None) -> None:
        self.view = view
        self.image: Image = find_image(view, input)
        self.score: Score = targets.find_score(view, score, output)

    @cached_property
    def rule_for(self) -> RuleFor:
        return table_of(self.view)

    @cached_property
    def active(self) -> list[gs.Node]:
        """The nodes between image and score."""
        return active_nodes(self.view, [self.image.tensor.name], [self.score.tensor.name], self.rule_for)

    @cached_property
    def gaps(self) -> list[Gap]:
        return gaps(self.view, self.active, [self.image.tensor.name], [self.score.tensor.name], self.rule_for)

    @cached_property
    def rectifiers(self) -> list[Rectifier]:
        return find_rectifiers(self.active)

    @cached_property
    def smooth(self) -> list[Rectifier]:
        return find_smooth(self.active)

    @cached_property
    def layers(self) -> list[Layer]:
        return layers.candidates(self.view, self.image.tensor, self.image.layout, self.score.tensor, self.rule_for)

    def layer(self, request: str) -> Layer:
        axes = layers.channel_axes(self.view, self.image.tensor, self.image.layout)
        chosen = layers.choose(self.view, self.layers, request, self.score.tensor, axes, self.rule_for)
        heads.require_image(self.image, chosen)
        return chosen

    def refuse_unexplainable(self) -> None:
        refuse_gaps(self.gaps, self.view)
        self.score.require_shape()
        if not self.active:
            raise RequestError(
                f"score '{self.score.tensor.name}' does not depend on input '{self.image.tensor.name}' by any float "
                "path; name another input or output"
            )


def convert(
    model: ModelLike,
    methods: Sequence[str] | None = None,
    *,
    target_layer: str | None = "auto",
    score: str = "auto",
    target: str = "required",
    rectifiers: str = "relu",
    interpolate_mode: str = "bilinear",
    relu_attributions: bool = True,
    input: str | None = None,
    output: str | None = None,
) -> onnx.ModelProto:
    """Append the explanation of a classifier to a copy of its model, as standard ONNX nodes.

    Args:
        model: an ONNX file or model.
        methods: any of `saliency`, `guided_backprop`, `deconvnet`, `gradcam`, `guided_gradcam`; by default
            `guided_gradcam`, `gradcam` and `guided_backprop`.
        target_layer: where Grad-CAM is taken: a tensor's name, a node's name, or "auto".
        score: what is explained: "auto" and "pre_softmax" take the input of a final Softmax, LogSoftmax or
            Sigmoid, "probability" its output.
        target: "required" adds the int64 input `target` [N] or [1] (-1: the predicted class), "optional" gives it
            the default -1, "weights" adds the float32 input `target_weights` of the score's shape instead.
        rectifiers: "relu" applies the guided rule to ReLUs in any clothing, "all" to smooth and leaky activations too.
        interpolate_mode: how Grad-CAM is resized to the input: "bilinear" or "nearest" (Captum's default).
        relu_attributions: False leaves `gradcam` signed; Guided Grad-CAM always takes the ReLU.
        input, output: names, where the model has several.

    Returns:
        The converted model. Behind its own outputs stand `target_class` int64 [N], `target_score` float32 [N], then
        float32 maps: `saliency`, `guided_backprop`, `deconvnet`, `guided_gradcam` in the input's shape, `gradcam`
        with one channel, and with it `gradcam_features` and `gradcam_gradients` in the layer's shape.

    Raises:
        ModelFileError, AlreadyConvertedError, UnsupportedOperatorError, OpsetError, RequestError.
    """
    options = Options(
        DEFAULT_METHODS if methods is None else (methods,) if isinstance(methods, str) else tuple(methods),
        target_layer or "auto", score, target, rectifiers, interpolate_mode, relu_attributions, input, output,
    )  # fmt: skip
    source, record = open_source(model)
    analysis = Analysis(prepare(source, weights_folder(model)), options.score, options.input, options.output)
    analysis.refuse_unexplainable()
    layer = analysis.layer(options.target_layer) if options.needs_layer else None

    g = Emitter(analysis.view.graph, analysis.view.opset)
    names = public_names(model_file.taken_names(source), [_target_role(options), *options.roles()])
    target_input = _target_input(options, names, analysis.score)
    seed = _seed(g, options, analysis.score, target_input)
    results = {
        contract.TARGET_CLASS: seed.target_class,
        contract.TARGET_SCORE: seed.target_score,
        **_maps(g, options, analysis, layer, seed),
    }
    outputs = [g.name_output(results[role], names[role]) for role in options.roles()]
    _name_sizes(dict(zip(options.roles(), outputs, strict=True)), analysis)
    appended_to(source, analysis.view, g, [target_input], outputs)
    if options.target == "optional":
        _default_target(source, target_input)
    model_file.append_metadata(source, _manifest(options, analysis, layer, names, record))
    return source


def _target_role(options: Options) -> str:
    return contract.TARGET_WEIGHTS if options.target == "weights" else contract.TARGET


def _target_input(options: Options, names: dict[str, str], score: Score) -> gs.Variable:
    if options.target == "weights":
        return gs.Variable(names[contract.TARGET_WEIGHTS], np.dtype(np.float32), score.tensor.shape)
    return gs.Variable(names[contract.TARGET], np.dtype(np.int64), ("targets",))


def _seed(g: Emitter, options: Options, score: Score, target_input: gs.Variable) -> Seed:
    make = targets.weighted_seed if options.target == "weights" else targets.seed
    return make(g, score, target_input)


def _maps(g: Emitter, options: Options, analysis: Analysis, layer: Layer | None, seed: Seed) -> dict[str, gs.Tensor]:
    """Every map that is asked for, and no other."""
    image, score = analysis.image, analysis.score.tensor
    masked = [*analysis.rectifiers, *(analysis.smooth if options.rectifiers == "all" else [])]
    asked = set(options.methods)

    def gradient(wanted: gs.Tensor, rule_for: RuleFor, scope: str) -> gs.Tensor:
        found = backward(g, analysis.view, {score.name: seed.cotangent}, [wanted.name], rule_for, scope)
        return found[wanted.name]

    maps: dict[str, gs.Tensor] = {}
    if contract.SALIENCY in asked:
        maps[contract.SALIENCY] = gradient(image.tensor, analysis.rule_for, "gradient")
    if asked & {contract.GUIDED_BACKPROP, contract.GUIDED_GRADCAM}:
        guided = policies.guided(analysis.rule_for, masked)
        maps[contract.GUIDED_BACKPROP] = gradient(image.tensor, guided, "guided")
    if contract.DECONVNET in asked:
        deconvnet = policies.deconvnet(analysis.rule_for, analysis.rectifiers)
        maps[contract.DECONVNET] = gradient(image.tensor, deconvnet, "deconvnet")
    if layer is not None:
        maps[contract.GRADCAM_FEATURES] = layer.tensor
        maps[contract.GRADCAM_GRADIENTS] = gradient(layer.tensor, analysis.rule_for, "gradient")
        maps |= _cams(g, options, image, layer, maps)
    return {role: g.cast(tensor, np.float32) for role, tensor in maps.items()}


def _cams(g: Emitter, options: Options, image: Image, layer: Layer, maps: dict[str, gs.Tensor]) -> dict[str, gs.Tensor]:
    with g.scope("gradcam"):
        raw = heads.cam(g, layer, maps[contract.GRADCAM_GRADIENTS])
        rectified = heads.resize_to(g, g.relu(raw), image, options.interpolate_mode)
        signed = heads.resize_to(g, raw, image, options.interpolate_mode)
        cams = {contract.GRADCAM: rectified if options.relu_attributions else signed}
        if contract.GUIDED_BACKPROP in maps:
            guided = g.cast(maps[contract.GUIDED_BACKPROP], np.float32)
            cams[contract.GUIDED_GRADCAM] = g.mul(guided, rectified)
        return cams


def _name_sizes(outputs: dict[str, gs.Variable], analysis: Analysis) -> None:
    """Spell the outputs' sizes as the input does: `batch` stays `batch`."""
    image, score = analysis.image, analysis.score
    sizes = image.tensor.shape
    if image.layout is not None and contract.GRADCAM in outputs:
        outputs[contract.GRADCAM].shape = tuple(
            1 if axis == "C" else size for axis, size in zip(image.layout, sizes, strict=True)
        )
    if contract.GUIDED_GRADCAM in outputs:
        outputs[contract.GUIDED_GRADCAM].shape = sizes
    images = score.tensor.shape[0] if score.rank and score.class_axis != 0 else 1
    for role in {contract.TARGET_CLASS, contract.TARGET_SCORE} & outputs.keys():
        outputs[role].shape = (images,)


def _default_target(model: onnx.ModelProto, target: gs.Variable) -> None:
    if model.ir_version < 4:
        raise RequestError(
            f"target='optional' needs IR version 4 and the model has {model.ir_version}; use target='required'"
        )
    default = np.asarray([contract.PREDICTED], np.int64)
    model.graph.initializer.append(onnx.numpy_helper.from_array(default, target.name))


def _manifest(
    options: Options, analysis: Analysis, layer: Layer | None, names: dict[str, str], record: dict[str, Any]
) -> Manifest:
    everything = options.rectifiers == "all"
    masked = [*analysis.rectifiers, *(analysis.smooth if everything else [])]
    return Manifest(
        kind="explanation",
        graphgbp=__version__,
        names=names,
        methods=[method for method in contract.METHODS if method in options.methods],
        input=analysis.image.describe(),
        score=analysis.score.describe(),
        target=options.target,
        target_layer=None if layer is None else layer.describe(),
        rectifiers=[rectifier.describe() for rectifier in masked],
        passed_through=[] if everything else [activation.describe() for activation in analysis.smooth],
        options={
            "rectifiers": options.rectifiers,
            "interpolate_mode": options.interpolate_mode,
            "relu_attributions": options.relu_attributions,
        },
        **record,
    )


def vjp(model: ModelLike, inputs: Sequence[str] | None = None, outputs: Sequence[str] | None = None) -> onnx.ModelProto:
    """Append the vector-Jacobian product: an input `<output>_grad` per output, an output `<input>_grad` per input.

    x_grad = sum over outputs of (d output / d x)^T output_grad, in the model's own type; x_grad has x's shape and
    y_grad must have y's. By default every float input and every float output takes part. An input on which no output
    depends gets zeros.

    Raises UnsupportedOperatorError, RequestError for a name that is no float input or output, ModelFileError.
    """
    source, record = open_source(model)
    view = prepare(source, weights_folder(model))
    g = Emitter(view.graph, view.opset)
    wanted = _choose(inputs, view.graph.inputs, "input")
    seeded = _choose(outputs, view.graph.outputs, "output")
    roles = [f"{y.name}_grad" for y in seeded] + [f"{x.name}_grad" for x in wanted]
    names = public_names(model_file.taken_names(source), roles)
    seeds = {y.name: gs.Variable(names[f"{y.name}_grad"], y.dtype, y.shape) for y in seeded}
    found = backward(g, view, seeds, [x.name for x in wanted], table_of(view), "vjp")
    results = [g.name_output(found.get(x.name) or g.zeros_like(x), names[f"{x.name}_grad"]) for x in wanted]
    appended_to(source, view, g, list(seeds.values()), results)
    model_file.append_metadata(source, Manifest(kind="vjp", graphgbp=__version__, names=names, **record))
    return source


def appended_to(
    model: onnx.ModelProto, view: View, g: Emitter, inputs: Sequence[gs.Variable], outputs: Sequence[gs.Variable]
) -> None:
    """Append what was emitted; where ONNX's checker had nothing against the model, it must have nothing now."""
    before = model_file.verdict(skeleton(model))
    append(model, view, g, inputs, outputs)
    after = model_file.verdict(skeleton(model))
    if before is None and after is not None:
        raise GraphgbpError(f"graphgbp made an invalid graph, please report it with the model: {after}")


def table_of(view: View) -> RuleFor:
    """The rule table read through the model's opsets."""
    return partial(registry.lookup, opsets=view.opsets)


def _choose(names: Sequence[str] | None, tensors: Sequence[gs.Tensor], kind: str) -> list[gs.Tensor]:
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names or ()))
    available = {tensor.name: tensor for tensor in tensors if is_float(tensor)}
    if not available:
        raise ModelFileError(f"the model has no float {kind}: there is nothing to differentiate")
    for name in names:
        if name not in available:
            raise RequestError(f"'{name}' is no float {kind} of the model; it has {model_file.describe(available)}")
    return [available[name] for name in names] if names else list(available.values())
