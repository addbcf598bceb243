"""The pipeline: file -> reading view -> seed -> backward passes -> maps -> appended nodes -> file."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import onnx_graphsurgeon as gs

from graphgbp import contract, model_file
from graphgbp import target as targets
from graphgbp._version import __version__
from graphgbp.analysis import Analysis
from graphgbp.append import append_checked
from graphgbp.contract import Manifest, public_names
from graphgbp.errors import RequestError
from graphgbp.layers import Layer
from graphgbp.maps import Plan, make_maps
from graphgbp.options import AUTO, DEFAULT_METHODS, Options, Request, names
from graphgbp.order import just_in_time
from graphgbp.parts import PartwiseEmitter
from graphgbp.prepare import prepare
from graphgbp.score import Score
from graphgbp.sharing import share_products
from graphgbp.source import ModelLike, Source, open_source


def convert(
    model: ModelLike,
    methods: str | Sequence[str] | None = None,
    *,
    target_layer: str | Sequence[str] | None = AUTO,
    aggregate: str | None = None,
    score: str = "auto",
    target: str = "required",
    target_tensor: str | None = None,
    class_axis: int | None = None,
    rectifiers: str = "relu",
    interpolate_mode: str = "bilinear",
    relu_attributions: bool = True,
    inputs: str | Sequence[str] | None = None,
    output: str | None = None,
) -> onnx.ModelProto:
    """Append the explanation of a model's score to a copy of the model, as standard ONNX nodes.

    Args:
        model: an ONNX file or model.
        methods: any of `saliency`, `input_x_gradient`, `guided_backprop`, `deconvnet`; the CAMs `gradcam`, `hirescam`,
            `layercam`, `gradcam_plusplus`, `xgradcam`; and `guided_gradcam`. By default `guided_gradcam`, `gradcam`
            and `guided_backprop`.
        target_layer: where CAMs are taken: a tensor's name, a node's name, or "auto"; or several of them, whose maps
            are then `gradcam/<name>`, `guided_gradcam/<name>` and so on.
        aggregate: "mean" makes one map of several layers' CAMs, normalised and averaged as pytorch-grad-cam does.
        score: what is explained: "auto" and "pre_softmax" take the input of a final Softmax, LogSoftmax or
            Sigmoid, "probability" its output.
        target: "required" adds the int64 input `target` [N] or [1] (-1: the predicted class), "optional" gives it
            the default -1, "weights" adds the float32 input `target_weights` of the score's shape instead, "cotangent"
            the float32 input `target_cotangent` of the output's own shape, whatever that output is: boxes, embeddings.
            A segmentation also takes `target_mask`, float32 [N or 1, H or 1, W or 1]: how much each pixel counts, where
            -1 counts it if it is predicted as the target.
        target_tensor: explain neurons of this tensor instead of an output: `target` is the channel (-1: the strongest
            at each position), `target_position` int64 [N or 1, R] the position (-1: all along that axis).
        class_axis: the axis of the scores that holds the classes, where `graphgbp inspect` names another.
        rectifiers: "relu" applies the guided rule to ReLUs in any clothing, "all" to smooth and leaky activations too.
        interpolate_mode: how a CAM is resized to the input: "bilinear" or "nearest" (Captum's default).
        relu_attributions: False leaves the CAMs signed; Guided Grad-CAM always takes the ReLU.
        inputs: the inputs to explain, by name; by default every float input that the score depends on. With several,
            maps are named `<method>/<input>`.
        output: the output to explain, where the default is not meant; `graphgbp inspect` says which that is and why.

    Returns:
        The converted model. Behind its own outputs stand `target_class` int64 [N], `target_score` float32 [N], then
        float32 maps: the CAMs with one channel, the others in the input's shape; with any CAM also
        `gradcam_features` and `gradcam_gradients` in the layer's shape.

    Raises:
        ModelFileError, AlreadyConvertedError, UnsupportedOperatorError, OpsetError, RequestError.
    """
    options = Options(
        request=Request(score, target, target_tensor, class_axis, names("inputs", inputs) or None, output),
        methods=DEFAULT_METHODS if methods is None else names("methods", methods),
        target_layers=names("target_layer", target_layer) or (AUTO,),
        aggregate=aggregate,
        rectifiers=rectifiers,
        interpolate_mode=interpolate_mode,
        relu_attributions=relu_attributions,
    )
    with open_source(model) as source:
        return _append_explanation(source, options)


def _append_explanation(source: Source, options: Options) -> onnx.ModelProto:
    model = source.model
    analysis = Analysis(prepare(model, source.folder), options.request)
    analysis.refuse_unexplainable()
    plan = Plan(options, analysis, _layers(analysis, options) if options.needs_layer else {})

    g = PartwiseEmitter(analysis.view.graph, analysis.view.opset)
    taken = model_file.taken_names(model)
    inputs_of = _target_inputs(options, analysis.score, taken)
    seed = targets.seed(g, analysis.score, inputs_of)
    results = {
        **({} if seed.target_class is None else {contract.TARGET_CLASS: seed.target_class}),
        contract.TARGET_SCORE: seed.target_score,
        **make_maps(g, plan, seed.cotangent),
    }
    public = public_names(taken, [*inputs_of, *results])
    outputs = [g.name_output(tensor, public[role]) for role, tensor in results.items()]
    for role, output_tensor in zip(results, outputs, strict=True):
        if role in (contract.TARGET_CLASS, contract.TARGET_SCORE):
            output_tensor.shape = (analysis.score.tensor.shape[0] if analysis.score.per_image else 1,)
    share_products(g, outputs)
    just_in_time(g, [seed.cotangent])
    append_checked(model, analysis.view, g, list(inputs_of.values()), outputs)
    if options.request.target == "optional":
        _default_targets(model, analysis.score, inputs_of)
    model_file.append_metadata(model, _manifest(plan, public, source.record()))
    return model


def _layers(analysis: Analysis, options: Options) -> dict[str, Layer]:
    """The target layers, by the name each was asked for with; "auto" goes by its tensor's name."""
    found = {request: analysis.layer(request) for request in options.target_layers}
    return {layer.tensor.name if request == AUTO else request: layer for request, layer in found.items()}


def _target_inputs(options: Options, score: Score, taken: set[str]) -> dict[str, gs.Variable]:
    """The inputs that say what is explained, by role."""
    roles = targets.input_roles(score, options.request.target)
    public = public_names(taken, roles)
    return {role: targets.make_input(role, public[role], score) for role in roles}


def _default_targets(model: onnx.ModelProto, score: Score, inputs: Mapping[str, gs.Variable]) -> None:
    if model.ir_version < 4:
        raise RequestError(
            f"target='optional' needs IR version 4 and the model has {model.ir_version}; use target='required'"
        )
    for role, tensor in inputs.items():
        value = targets.default_value(role, score)
        model.graph.initializer.append(onnx.numpy_helper.from_array(value, tensor.name))


def _manifest(plan: Plan, public: dict[str, str], record: dict[str, Any]) -> Manifest:
    options, analysis = plan.options, plan.analysis
    everything = options.rectifiers == "all"
    masked = [*analysis.rectifiers, *(analysis.smooth if everything else [])]
    return Manifest(
        kind="explanation",
        graphgbp=__version__,
        names=public,
        methods=[method for method in contract.METHODS if method in options.methods],
        inputs=[image.describe() for image in analysis.images],
        score=analysis.score.describe(),
        target=options.request.target,
        target_layers=[{"name": name, **layer.describe()} for name, layer in plan.layers.items()],
        rectifiers=[rectifier.describe() for rectifier in masked],
        passed_through=[] if everything else [activation.describe() for activation in analysis.smooth],
        surrogates=analysis.surrogates,
        options={
            "rectifiers": options.rectifiers,
            "interpolate_mode": options.interpolate_mode,
            "relu_attributions": options.relu_attributions,
            "aggregate": options.aggregate,
        },
        **record,
    )
