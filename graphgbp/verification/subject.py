"""The file under verification: its source, found or recovered; and the one place where its inputs are made."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper

from graphgbp import contract, model_file
from graphgbp.analysis import table_of
from graphgbp.backward import active_nodes
from graphgbp.contract import Manifest
from graphgbp.equivalence import Feeds, RunError, outputs_of, run_on_random_input
from graphgbp.errors import GraphgbpError, ModelFileError
from graphgbp.nodes import in_order
from graphgbp.prepare import flatten, prepare
from graphgbp.source import ModelLike, raised, read, weights_folder
from graphgbp.stored import is_quantised
from graphgbp.verification.parts import expanded, part_for
from graphgbp.verification.pins import Pins, evaluated
from graphgbp.verification.targets import default_targets, weights
from graphgbp.view import View
from graphgbp.weights import external_locations, external_tensors, locate, size, with_small_weights

_EVERYTHING = 2**62
_LIMIT = 2**31  # of what protobuf can carry: larger weights stay where they are
_RAISED = f"{contract.SCOPE}/raised/"  # mended nodes of a raised source: part of the forward graph


@dataclass(frozen=True)
class Original:
    """The model that a file was converted from, as it was read. `origin` says where from."""

    model: onnx.ModelProto
    folder: Path | None
    origin: str
    fingerprint: dict[str, Any]


class Subject:
    """A converted file and what it is held against.

    `original` is None where it was not given, does not lie beside the file and cannot be recovered from it. `forward`
    is the graph that was appended to: the original at opset 16 or newer, else the file without what was appended.
    Raises ModelFileError where the file is not converted, MissingWeightsError where weights are not found.
    """

    def __init__(self, model: ModelLike, source: ModelLike | None) -> None:
        self.model = read(model)
        self.path = None if isinstance(model, onnx.ModelProto) else Path(model)
        self.folder = weights_folder(model)
        manifest = model_file.read_manifest(self.model)
        if manifest is None:
            where = f"'{self.path}'" if self.path else "the model"
            raise ModelFileError(f"{where} is not converted: it holds no manifest; run graphgbp convert on it first")
        self.manifest: Manifest = manifest
        self.is_large = _size(self.model) >= _LIMIT
        self.original = self._given(source) if source is not None else self._found()
        if self.original is None:
            self.forward = _without_appended(self.model)
        else:
            self.forward, _ = raised(self.original.model, self.original.folder)

    def _given(self, source: ModelLike) -> Original:
        model = read(source)
        name = "the source" if isinstance(source, onnx.ModelProto) else f"'{source}'"
        model_file.refuse_converted(model, name)
        origin = "given" if isinstance(source, onnx.ModelProto) else str(source)
        fingerprint = model_file.fingerprint(source, external_locations(model))
        return Original(model, weights_folder(source), origin, fingerprint)

    def _found(self) -> Original | None:
        """The source beside the file, known by its fingerprint; else the file without what was appended, if equal."""
        wanted = self.manifest.source.get("sha256")
        for path in _beside(self.path):
            if model_file.fingerprint(path, [])["sha256"] == wanted:
                return self._given(path)
        if self.manifest.opset is not None:
            return None
        recovered = _without_appended(self.model)
        fingerprint = model_file.fingerprint(recovered, [])
        if fingerprint["sha256"] != wanted:
            return None
        if self.folder is not None:
            files = _sha256(self.folder, recovered)
            fingerprint |= {"external_data": files} if files else {}
        return Original(recovered, self.folder, "recovered", fingerprint)

    @property
    def own_weights(self) -> dict[str, str]:
        """sha256 of each file of weights beside the file, where those are not the source's own."""
        if self.folder is None or self.original is None or self.original.folder == self.folder:
            return {}
        return _sha256(self.folder, self.model)

    # -- the graph ------------------------------------------------------------------------------------------------

    @cached_property
    def appended(self) -> list[onnx.NodeProto]:
        """The nodes that bear a name of ours."""
        return [node for node in self.model.graph.node if is_appended(node.name)]

    @property
    def opset(self) -> int:
        return next(entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))

    @property
    def weights_folder(self) -> Path | None:
        """Where the weights lie that the models below do not hold: those of a large file are never read in."""
        return self.folder if self.is_large else None

    @cached_property
    def whole(self) -> onnx.ModelProto:
        """The file with its external weights read in, if it is not large."""
        return self._read_in(self.model, self.folder)

    @cached_property
    def whole_forward(self) -> onnx.ModelProto:
        return self._read_in(self.forward, self.folder if self.original is None else self.original.folder)

    def _read_in(self, model: onnx.ModelProto, folder: Path | None) -> onnx.ModelProto:
        return model if self.is_large else with_small_weights(model, folder, _EVERYTHING)

    def run(self, model: onnx.ModelProto, feeds: Feeds) -> dict[str, Any]:
        """The outputs of a part of the file or of its forward graph, by ONNX Runtime; raises RunError."""
        return outputs_of(model, feeds, self.weights_folder)

    def run_both(self, feeds: Feeds) -> tuple[dict[str, Any], dict[str, Any]]:
        """The outputs of the original model, its weights where it has them, and of the file; raises RunError.

        A quantised model runs as ONNX Runtime optimises it by default: that makes it one in integers.
        """
        assert self.original is not None
        how = {"optimised": self.quantised}
        file = outputs_of(self.whole, feeds | self.targets, self.weights_folder, **how)
        return outputs_of(self.original.model, feeds, self.original.folder, **how), file

    @cached_property
    def view(self) -> View:
        """The reading view of the forward graph. Raises GraphgbpError where it cannot be read."""
        return prepare(self.whole_forward, self.weights_folder)

    @cached_property
    def active(self) -> list[gs.Node]:
        """The nodes of the view between the explained inputs and the score."""
        inputs = [entry["name"] for entry in self.manifest.inputs]
        return active_nodes(self.view, inputs, [self.manifest.score["tensor"]], table_of(self.view))

    @cached_property
    def expanded(self) -> onnx.ModelProto | None:
        """The forward graph as plain nodes: functions, known branches, fused and quantised nodes are seen through.

        None where it has none of them.
        """
        view = flatten(self.whole_forward, self.weights_folder)
        if not self.forward.functions and not view.recomputed:
            return None
        if self.is_large:
            raise RunError("functions, branches and fused nodes are seen through in models of up to 2 GB alone")
        return expanded(view, self.whole_forward)

    @cached_property
    def halves(self) -> bool:
        """Whether the forward graph makes tensors of half precision. Raises GraphgbpError where it cannot be read."""
        return not all(map(is_quantised, self._few_bits))

    @cached_property
    def quantised(self) -> bool:
        """Whether it makes quantised tensors. Raises GraphgbpError where it cannot be read."""
        return any(map(is_quantised, self._few_bits))

    @property
    def _few_bits(self) -> list[np.dtype[Any]]:
        stored = self.view.stored
        return [stored[y.name] for node in self.view.graph.nodes for y in node.outputs if y.name in stored]

    @cached_property
    def pins(self) -> Pins:
        """What the forward graph stores in few bits. Raises DoubleError or RunError where it cannot be evaluated."""
        return Pins(self.graph, self.view.stored, self.whole_forward, self.point, self.file, self.view.twins)

    @property
    def graph(self) -> onnx.ModelProto:
        """The forward graph, every tensor of it in the main graph under the name that the manifest uses."""
        return self.expanded or self.whole_forward

    @cached_property
    def file(self) -> onnx.ModelProto:
        """The file, its forward graph as in `graph`."""
        return self.beside_graph(self.whole)

    def beside_graph(self, converted: onnx.ModelProto) -> onnx.ModelProto:
        """What was appended to the forward graph, here or in another file, beside `graph`."""
        if self.expanded is None:
            return converted
        file = onnx.ModelProto()
        file.CopyFrom(self.expanded)
        appended = [node for node in converted.graph.node if is_appended(node.name)]
        own = {output for node in appended for output in node.output}
        nodes = [*(node for node in self.expanded.graph.node if own.isdisjoint(node.output)), *appended]
        del file.graph.node[:]
        file.graph.node.extend(in_order(nodes))
        there = {tensor.name for tensor in file.graph.initializer}
        file.graph.initializer.extend(tensor for tensor in converted.graph.initializer if tensor.name not in there)
        del file.graph.input[:], file.graph.output[:]
        file.graph.input.extend(converted.graph.input)
        file.graph.output.extend(converted.graph.output)
        return file

    # -- its inputs -----------------------------------------------------------------------------------------------

    @cached_property
    def run_of_forward(self) -> tuple[Feeds, list[Any] | None, list[str]]:
        """Random input of the original model, its outputs by ONNX Runtime, and what was tried in vain."""
        model = part_for(self.whole_forward, [output.name for output in self.forward.graph.output])
        values = {tensor.name: tensor for tensor in model.graph.initializer}
        weights = {x.name: numpy_helper.to_array(values[x.name]) for x in model.graph.input if x.name in values}
        return run_on_random_input(model, weights, self.weights_folder)

    @property
    def point(self) -> Feeds:
        """Random input of the original model, on which everything is evaluated."""
        return self.run_of_forward[0]

    @cached_property
    def obstacle(self) -> str | None:
        """Why nothing can be run; None where the original model runs and gives its score."""
        _, outputs, failures = self.run_of_forward
        if outputs is None:
            return f"ONNX Runtime does not run the original model: {'; '.join(failures)}"
        if self.manifest.score:
            try:
                _ = self.z
            except (RunError, GraphgbpError) as error:
                return f"the score cannot be read from the original model: {error}"
        return None

    @cached_property
    def z(self) -> np.ndarray:
        """The scores at that point, by the original model; raises RunError."""
        return self.primal([self.manifest.score["tensor"]])[0]

    def primal(self, tensors: Sequence[str]) -> list[np.ndarray]:
        """Tensors of the forward graph at that point; raises RunError.

        One that only the plain nodes make, or that the file makes again, is made of what is stored in few bits there.
        """
        made = {name for node in self.whole_forward.graph.node for name in node.output}
        runs = made.issuperset(tensors) and not self.pins.copied
        found = self.run(part_for(self.whole_forward, tensors), self.point) if runs else self.pinned(tensors)
        return [np.asarray(found[tensor]) for tensor in tensors]

    def pinned(self, tensors: Sequence[str]) -> Feeds:
        """Tensors of the forward graph, made of what the runtime stores in few bits; raises RunError."""
        known = self.pins.exact
        part = part_for(self.graph, [x for x in tensors if x not in known], self.pins.types(known))
        return known | self.run(part, self.point | self.pins.in_types(known))

    @cached_property
    def targets(self) -> Feeds:
        """What is fed beside that input, by public name."""
        return default_targets(self) if self.manifest.score else self.cotangents

    @cached_property
    def cotangents(self) -> Feeds:
        """Of a vjp file: a drawn cotangent for each output that takes one, by public name."""
        rng = np.random.default_rng(1)
        outputs = dict(zip((y.name for y in self.forward.graph.output), self.run_of_forward[1] or [], strict=False))
        return {name: rng.standard_normal(outputs[y].shape).astype(outputs[y].dtype) for y, name in self.seeded.items()}

    @property
    def seeded(self) -> dict[str, str]:
        """Of a vjp file: the outputs that take a cotangent, and the input that carries it."""
        inputs = {value.name for value in self.model.graph.input}
        return {role.removesuffix("_grad"): name for role, name in self.manifest.names.items() if name in inputs}

    @cached_property
    def w(self) -> np.ndarray:
        """dS/dz for these targets, where differences are taken."""
        return weights(self, self._displaced_z if self.pins else self.z, self.targets)

    @property
    def _displaced_z(self) -> np.ndarray:
        tensor, values = self.manifest.score["tensor"], self.pins.displaced
        return evaluated(part_for(self.graph, [tensor], values.keys()), [tensor], self.point | values)[0]

    @property
    def images(self) -> int:
        return int(self.z.shape[0]) if self.manifest.score["per_image"] else 1

    @property
    def classes(self) -> int:
        score = self.manifest.score
        if score["two_classes_in_one"]:
            return 2
        return 1 if score["class_axis"] is None else int(self.z.shape[score["class_axis"]])

    @cached_property
    def is_probability(self) -> bool:
        """Whether the score is what the final activation gives, and not what that takes."""
        score = self.manifest.score
        return bool(score["activation"]) and any(
            score["tensor"] in node.output and node.op_type == score["activation"] for node in self.forward.graph.node
        )

    def public(self, role: str) -> str | None:
        """The tensor that carries a role."""
        return self.manifest.names.get(role)

    def roles(self, method: str) -> Iterator[tuple[str, str]]:
        """(what it is qualified by, tensor) for each role of a method: ("", "saliency"), or one for each input."""
        for role, name in self.manifest.names.items():
            if contract.method_of(role) == method:
                yield role.partition("/")[2], name

    def by_input(self, method: str) -> dict[str, str]:
        """Of each explained input the tensor that carries a method's map, or one of its maps."""
        inputs = [entry["name"] for entry in self.manifest.inputs]
        return {
            next((x for x in inputs if qualifier == x or qualifier.endswith(f"/{x}")), inputs[0]): name
            for qualifier, name in self.roles(method)
        }

    def factors(self, method: str) -> dict[str, str]:
        """Of each explained input the gradient that is a factor of a method's map."""
        maker = {output: node for node in self.appended for output in node.output}
        return {x: maker[maker[name].input[0]].input[0] for x, name in self.by_input(method).items()}

    @property
    def gradients(self) -> dict[str, str]:
        """Of each explained input the tensor that carries the plain gradient; none where the file holds none by it."""
        return self.by_input(contract.SALIENCY) or self.factors(contract.INPUT_X_GRADIENT)


def _sha256(folder: Path, model: onnx.ModelProto) -> dict[str, str]:
    """Of each file of weights."""
    return {x: model_file.fingerprint(locate(folder, x), [])["sha256"] for x in external_locations(model)}


def _size(model: onnx.ModelProto) -> int:
    """In bytes, with what is in external files."""
    return model.ByteSize() + sum(map(size, external_tensors(model)))


def _beside(path: Path | None) -> list[Path]:
    """The other models in a file's folder."""
    return [] if path is None else [other for other in sorted(path.parent.glob("*.onnx")) if other.name != path.name]


def _without_appended(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without what bears a name of ours: nodes, initializers, inputs, outputs, the manifest.

    Of declared sizes, those of our own tensors come first among ours.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    manifest = model_file.read_manifest(model)
    public = set(manifest.names.values()) if manifest else set()
    graph = copy.graph
    parts: list[tuple[Any, Callable[[Any], bool]]] = [
        (graph.node, lambda node: is_appended(node.name)),
        (graph.initializer, lambda tensor: is_appended(tensor.name) or tensor.name in public),
        (graph.input, lambda value: value.name in public),
        (graph.output, lambda value: value.name in public),
        (copy.metadata_props, lambda entry: entry.key == contract.MANIFEST_KEY),
    ]
    for field, is_ours in parts:
        kept = [entry for entry in field if not is_ours(entry)]
        if len(kept) < len(field):
            copies = [type(entry).FromString(entry.SerializeToString()) for entry in kept]
            del field[:]
            field.extend(copies)
    sizes = [value.name for value in graph.value_info]
    del graph.value_info[next((index for index, name in enumerate(sizes) if is_appended(name)), len(sizes)) :]
    return copy


def is_appended(name: str) -> bool:
    return name.startswith(f"{contract.SCOPE}/") and not name.startswith(_RAISED)
