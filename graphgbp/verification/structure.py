"""Does the manifest list the rectifiers, and has every appended node a kernel?"""

from collections.abc import Iterable

import onnx_graphsurgeon as gs
from onnx.shape_inference import InferenceError

from graphgbp.analysis import activations_among
from graphgbp.backward import is_float
from graphgbp.inference import skeleton
from graphgbp.kernels import PROVIDERS, has_kernel, tensor_types
from graphgbp.rectifiers import Activations
from graphgbp.smooth import Activation
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject


def find_activations_of(subject: Subject) -> Activations:
    """The rectifiers and smooth activations between input and score, found again in the forward graph."""
    return activations_among(subject.view, subject.active)


def check_rectifiers(subject: Subject, activations: Activations) -> Check:
    """The manifest lists the rectifiers that are between input and score."""
    name, listed = "rectifiers", subject.manifest.rectifiers
    smooth = activations.smooth if subject.manifest.options["rectifiers"] == "all" else []
    found = [activation.describe() for activation in [*activations.rectifiers, *smooth]]
    name_of = "the file's own forward graph" if subject.original is None else "the source"
    missing = [entry["tensor"] for entry in found if entry not in listed]
    foreign = [entry["tensor"] for entry in listed if entry not in found]
    if missing or foreign:
        return failed(
            name,
            f"{name_of} has {len(found)} rectifiers and the manifest lists {len(listed)}: "
            f"missing {missing or 'none'}, foreign {foreign or 'none'}",
        )
    return passed(name, f"the {len(found)} listed are those of {name_of}", rectifiers=len(found))


def written_out(activations: Iterable[Activation]) -> list[str]:
    """Those that take x by several ways, as x * sigmoid(x) does: they are masked on each."""
    return [
        activation.node.outputs[0].name
        for activation in activations
        if sum(isinstance(x, gs.Variable) and is_float(x) for x in activation.node.inputs) > 1
    ]


# -- kernels -----------------------------------------------------------------------------------------------------------


def check_kernels(subject: Subject) -> list[Check]:
    """Every appended node has a kernel in each provider, unless the node it differentiates has none itself."""
    try:
        types = tensor_types(skeleton(subject.model))
    except InferenceError as error:
        return [unchecked("kernels", f"ONNX finds the file's shapes inconsistent: {error}")]
    opsets = {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in subject.model.opset_import}
    return [_kernels(subject, provider, opsets, types) for provider in PROVIDERS]


def _kernels(subject: Subject, provider: str, opsets: dict[str, int], types: dict[str, int]) -> Check:
    name = f"kernels {provider.removesuffix('ExecutionProvider')}"
    without = [node for node in subject.appended if not has_kernel(provider, node, opsets, types)]
    if not without:
        return passed(name, f"ONNX Runtime has one for each of {len(subject.appended)} appended nodes")
    bare = {
        node.name or next(iter(node.output), "")
        for node in subject.forward.graph.node
        if not has_kernel(provider, node, opsets, types)
    }
    blamed = [node for node in without if not any(f"/{name}/" in f"/{node.name}/" for name in bare)]
    if blamed:
        return failed(name, f"ONNX Runtime has none for {', '.join(sorted({node.op_type for node in blamed}))}")
    return passed(
        name,
        f"ONNX Runtime has one for {len(subject.appended) - len(without)} of {len(subject.appended)} appended nodes; "
        f"the others belong to nodes that have none themselves",
        without=sorted({node.op_type for node in without}),
    )
