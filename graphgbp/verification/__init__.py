"""Is a converted file what it says it is? Held against its source: pass or fail, with figures.

fingerprint     the source and its weights are those in the manifest
appended only   the source stands first in the file, byte for byte; what follows is named as ours
names           what the manifest names is there
forward         the file gives the outputs of its source
score           target_score and target_class are those of the source's scores
target guard    targets out of range fail
gradient        the plain gradient equals central differences of the source, in double precision
layer gradient  the same for the target layers
saturation      the gradient of each quantiser stops beyond its bounds, and only there
rectifiers      the manifest lists those of the source
masks           each rectifier is masked, in the graph and in numbers
input x gradient    the inputs times that gradient
grad-cam        features, the CAMs and Guided Grad-CAM are as worked out again in numpy
kernels         every appended node has one in ONNX Runtime, on the CPU and on CUDA

A check that cannot be made is said to be unchecked, never passed.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from graphgbp import contract
from graphgbp.errors import GraphgbpError
from graphgbp.smooth import Activation
from graphgbp.source import ModelLike
from graphgbp.verification.cams import check_cams, check_input_x_gradient
from graphgbp.verification.forward import check_forward, check_plain_nodes, check_score
from graphgbp.verification.gradient import check_gradients, check_masked_gradient
from graphgbp.verification.integrity import check_appended, check_fingerprint, check_guard, check_manifest, check_names
from graphgbp.verification.masks import DECONVNET, GUIDED, check_masks
from graphgbp.verification.report import PASS, Check, Verification, unchecked
from graphgbp.verification.saturation import check_saturation
from graphgbp.verification.structure import check_kernels, check_rectifiers, find_activations_of, written_out
from graphgbp.verification.subject import Subject

__all__ = ["Check", "Verification", "verify"]


def verify(model: ModelLike, source: ModelLike | None = None) -> Verification:
    """Check a converted file against its source.

    Without `source` it is looked for beside the file by its fingerprint, else recovered from the file, which holds it
    byte for byte; where that fails too, what needs it is left unchecked.

    Raises ModelFileError where a file is no ONNX model or `model` is not converted, AlreadyConvertedError where
    `source` is, MissingWeightsError where weights are not found. What a check finds is never raised.
    """
    subject = Subject(model, source)
    with np.errstate(all="ignore"):  # what is no number fails a check
        checks = tuple(_checks(subject))
    return Verification(
        file=None if subject.path is None else str(subject.path),
        source=None if subject.original is None else subject.original.origin,
        kind=subject.manifest.kind,
        checks=checks,
    )


def _checks(subject: Subject) -> Iterator[Check]:
    yield check_fingerprint(subject)
    yield check_appended(subject)
    yield check_names(subject)
    yield check_forward(subject)
    yield from (check for check in (check_plain_nodes(subject),) if check)
    if subject.manifest.score:
        yield from (check for check in (check_score(subject), check_guard(subject)) if check)
    yield from check_gradients(subject)
    yield from (check for check in (check_saturation(subject),) if check)
    if subject.manifest.kind == "explanation":
        yield from _check_policies(subject)
        yield from (check for check in (check_input_x_gradient(subject), check_cams(subject)) if check)
    yield from check_kernels(subject)


def _check_policies(subject: Subject) -> Iterator[Check]:
    """The rectifiers, and each map that masks them."""
    try:
        activations = find_activations_of(subject)
    except GraphgbpError as error:
        yield unchecked("rectifiers", f"the forward graph cannot be read: {error}")
        return
    yield check_manifest(subject, activations)
    yield check_rectifiers(subject, activations)
    smooth = activations.smooth if subject.manifest.options["rectifiers"] == "all" else []
    if not {contract.GUIDED_BACKPROP, contract.GUIDED_GRADCAM}.isdisjoint(subject.manifest.methods):
        yield from _check_policy(subject, GUIDED, activations.rectifiers, smooth)
    if contract.DECONVNET in subject.manifest.methods:
        yield from _check_policy(subject, DECONVNET, activations.rectifiers, [])


def _check_policy(
    subject: Subject, policy: str, rectifiers: Sequence[Activation], smooth: Sequence[Activation]
) -> Iterator[Check]:
    check, masks = check_masks(subject, rectifiers, smooth, policy)
    yield check
    in_parts = written_out(smooth)
    if in_parts:
        yield unchecked(f"{policy} gradient", f"{in_parts} are masked in parts, which no difference of the whole tells")
    elif check.status == PASS:
        yield check_masked_gradient(subject, policy, masks)
