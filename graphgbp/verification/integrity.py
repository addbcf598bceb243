"""Is it the source, with nothing changed and everything promised added?"""

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx

from graphgbp import contract, model_file
from graphgbp.analysis import surrogates_among
from graphgbp.digests import set_field
from graphgbp.equivalence import Feeds, RunError
from graphgbp.image import find_images
from graphgbp.rectifiers import Activations
from graphgbp.verification.parts import part_for
from graphgbp.verification.report import Check, failed, passed, unchecked
from graphgbp.verification.subject import Subject, is_appended

_NO_SOURCE = "the source was not given, does not lie beside the file, and cannot be recovered from it"


def check_fingerprint(subject: Subject) -> Check:
    """The source is the one that the manifest names, and so are its external weights."""
    name, wanted = "fingerprint", subject.manifest.source
    if subject.original is None:
        return unchecked(name, _NO_SOURCE)
    found = subject.original.fingerprint
    if found["sha256"] != wanted.get("sha256"):
        return failed(name, f"sha256 of the source is {found['sha256'][:12]}, and the manifest says {_short(wanted)}")
    files = wanted.get("external_data", {})
    changed = [location for location, sha in files.items() if found.get("external_data", {}).get(location) != sha]
    if changed:
        return failed(name, f"weights were changed since the conversion: {model_file.describe(changed)}")
    own = subject.own_weights
    changed = [location for location, sha in files.items() if sha != own.get(location, sha)]
    if changed:
        return failed(name, f"beside the file lie other weights than its source's: {model_file.describe(changed)}")
    weights = f", with {len(files)} files of weights" if files else ""
    return passed(name, f"the source is the one in the manifest (sha256 {_short(wanted)}{weights})")


def _short(source: dict[str, Any]) -> str:
    return str(source.get("sha256", "nothing"))[:12]


def check_appended(subject: Subject) -> Check:
    """The forward graph stands first in the file, byte for byte; what follows bears names of ours."""
    name = "appended only"
    if subject.original is None:
        return unchecked(name, _NO_SOURCE)
    fault = next(_differences(subject), None)
    if fault:
        return failed(name, fault)
    graph, raised = subject.forward.graph, subject.manifest.opset
    after = f" (raised from opset {raised['source']} to {raised['raised_to']})" if raised else ""
    figures = {"nodes": len(graph.node), "initializers": len(graph.initializer), "appended": len(subject.appended)}
    return passed(
        name,
        f"{figures['nodes']} nodes and {figures['initializers']} initializers{after} come first, byte for byte; "
        f"{figures['appended']} nodes are appended",
        **figures,
    )


def _differences(subject: Subject) -> Iterator[str]:
    """What of the forward graph is not as it was; what follows it and is not ours."""
    before, after = subject.forward, subject.model
    public = set(subject.manifest.names.values())
    for what, first, second, is_ours in _parts(before, after, public):
        for index, entry in enumerate(first):
            if index >= len(second) or _bytes(entry) != _bytes(second[index]):
                yield f"{what} {index} ('{_name(entry)}') of the source is changed, moved or missing"
        for entry in second[len(first) :]:
            if not is_ours(_name(entry)):
                yield f"{what} '{_name(entry)}' is in the file, and neither the source nor graphgbp has it"
    if _bytes(_rest(before)) != _bytes(_rest(after)):
        yield "the header (opset, IR version, names, functions, types) is not that of the source"


def _parts(
    before: onnx.ModelProto, after: onnx.ModelProto, public: set[str]
) -> Iterator[tuple[str, Sequence[Any], Sequence[Any], Callable[[str], bool]]]:
    """(what, those of the source, those of the file, whether a further one of this name is ours)"""
    yield "node", before.graph.node, after.graph.node, is_appended
    weights = (before.graph.initializer, after.graph.initializer)
    yield "initializer", *weights, lambda name: is_appended(name) or name in public
    sizes, there = (before.graph.value_info, after.graph.value_info), model_file.tensor_names(before)
    yield "size", *sizes, lambda name: is_appended(name) or name in there
    yield "input", before.graph.input, after.graph.input, public.__contains__
    yield "output", before.graph.output, after.graph.output, public.__contains__
    yield "metadata", before.metadata_props, after.metadata_props, contract.MANIFEST_KEY.__eq__


def _rest(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything but what may grow."""
    rest = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            for inner, part in value.ListFields():
                if inner.name not in ("node", "initializer", "input", "output", "value_info"):
                    set_field(rest.graph, inner.name, part)
        elif field.name != "metadata_props":
            set_field(rest, field.name, value)
    return rest


def _bytes(message: Any) -> bytes:
    return message.SerializeToString(deterministic=True)


def _name(entry: Any) -> str:
    return entry.key if isinstance(entry, onnx.StringStringEntryProto) else entry.name


def check_names(subject: Subject) -> Check:
    """Every name in the manifest is there, and every added input and output is in the manifest."""
    name, manifest, graph = "names", subject.manifest, subject.model.graph
    inputs, outputs = ([value.name for value in group] for group in (graph.input, graph.output))
    there = model_file.tensor_names(subject.model)
    public = {*inputs, *outputs}
    wanted = {
        "a public name": [(name, public) for name in manifest.names.values()],
        "an explained input": [(entry["name"], set(inputs)) for entry in manifest.inputs],
        "the score": [(manifest.score["tensor"], there)] if manifest.score else [],
        "a target layer": [(entry["tensor"], there) for entry in manifest.target_layers],
        "a rectifier": [(entry["tensor"], there) for entry in [*manifest.rectifiers, *manifest.passed_through]],
    }
    missing = [
        f"{what} '{tensor}'"
        for what, tensors in wanted.items()
        for tensor, group in tensors
        if tensor not in group and not is_appended(tensor)
    ]
    if missing:
        return failed(name, f"the manifest names {', '.join(missing)}, which the file does not have")
    count = sum(len(tensors) for tensors in wanted.values())
    return passed(name, f"all {count} names of the manifest are in the file", names=count)


def check_manifest(subject: Subject, activations: Activations) -> Check:
    """What the manifest says of the file beside names and rectifiers, worked out again from the forward graph."""
    name, manifest = "manifest", subject.manifest
    held = {contract.method_of(role) for role in manifest.names}
    everything = manifest.options["rectifiers"] == "all"
    wanted = {
        "methods": [method for method in contract.METHODS if method in held],
        "inputs": [image.describe() for image in find_images(subject.view, [x["name"] for x in manifest.inputs])],
        "passed_through": [] if everything else [found.describe() for found in activations.smooth],
        "surrogates": surrogates_among(subject.view, subject.active),
    }
    wrong = [key for key, value in wanted.items() if _plain(getattr(manifest, key)) != _plain(value)]
    if wrong:
        return failed(name, f"its {', '.join(wrong)} are not what the file has: {_plain(wanted[wrong[0]])}")
    return passed(name, f"its {', '.join(wanted)} are those of the file")


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def check_guard(subject: Subject) -> Check | None:
    """A target out of range makes the run fail in the guard; None where the file takes no class."""
    name = "target guard"
    target = subject.public(contract.TARGET)
    if target is None:
        return None
    if subject.obstacle:
        return unchecked(name, subject.obstacle)
    feeds = {**subject.point, **subject.targets}
    classes, images = subject.classes, subject.images
    bad = {
        "class K": [classes],
        "class -2": [contract.PREDICTED - 1],
        "no class": [],
        "a class too many": [contract.PREDICTED] * (images + 1 if images > 1 else 2),
    }
    part = part_for(subject.whole, [subject.manifest.names[contract.TARGET_SCORE]])
    asked = {what: {**feeds, target: np.asarray(values, np.int64)} for what, values in bad.items()}
    accepted = [what for what, given in asked.items() if not _is_refused(subject, part, given)]
    if accepted:
        return failed(name, f"the file accepts {', '.join(accepted)} (K = {classes})")
    return passed(name, f"{len(bad)} targets out of range fail in '{contract.GUARD_NODE}'", refused=len(bad))


def _is_refused(subject: Subject, model: onnx.ModelProto, feeds: Feeds) -> bool:
    try:
        subject.run(model, feeds)
    except RunError as error:
        return contract.GUARD_NODE in str(error)
    return False
