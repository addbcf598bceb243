"""Explainer: convert a model where it is still plain, run it on images, hand back the maps."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from google.protobuf.message import EncodeError

from graphgbp import contract, feeds, model_file
from graphgbp.ahead import taken_ahead
from graphgbp.contract import Manifest
from graphgbp.conversion import convert
from graphgbp.errors import (
    GraphgbpError,
    ImageError,
    MissingWeightsError,
    ModelFileError,
    RequestError,
    UnsupportedError,
)
from graphgbp.result import Ranked, Result
from graphgbp.runtime import Answer, Session
from graphgbp.source import ModelLike, read, weights_folder
from graphgbp.weights import external_locations

_BATCH = {"cpu": 4, "cuda": 8}
"""Images in one run: what is kept for the backward pass leaves the CPU's caches at more (docs/folders.md)."""

Arrays: TypeAlias = dict[str, np.ndarray]

__all__ = ["Explainer", "Ranked", "Result"]


class Explainer:
    """A model that explains its answers.

    Args:
        model: an ONNX file or model, plain or converted by `graphgbp.convert`. A plain one is converted in memory.
        methods: as `graphgbp.convert` takes them; by default `guided_gradcam`, `gradcam` and `guided_backprop`, or all
            that a converted file holds.
        device: "auto" (CUDA where it loads, else the CPU; `explainer.device` says which), "cpu", "cuda", "cuda:1".
        batch_size: how many images are run at once; more are split. By default 4 on the CPU, whose caches hold no more,
            and 8 on CUDA. A model exported for a fixed batch runs that one.
        threads: how many CPU threads at most; by default ONNX Runtime decides.
        tf32: let CUDA round float32 products to TF32, faster and good to about 1e-3.
        **convert_options: as `graphgbp.convert` takes them (`target_layer`, `score`, ...), for a plain model.

    Raises:
        ModelFileError, UnsupportedOperatorError, RequestError as `convert` does, and RequestError where a converted
        file lacks what is asked; DeviceError where the asked device cannot be had.
    """

    def __init__(
        self,
        model: ModelLike,
        methods: Sequence[str] | None = None,
        *,
        device: str = "auto",
        batch_size: int | None = None,
        threads: int | None = None,
        tf32: bool = False,
        **convert_options: Any,
    ) -> None:
        self._source = _checked_model(model)
        self._batch_size = None if batch_size is None else _positive(batch_size)
        self._run_options: dict[str, Any] = {"threads": threads, "tf32": tf32}
        methods = (methods,) if isinstance(methods, str) else methods
        manifest = _manifest_of(model)
        self._convert_options: dict[str, Any] | None = None
        if manifest is None:
            if convert_options.get("target", "cotangent") != "cotangent":
                raise RequestError(
                    "Explainer takes its targets in explain(); of target=, an option of graphgbp.convert, it knows "
                    "'cotangent' alone"
                )
            self._convert_options = {"methods": methods, **convert_options}
            self._session = self._convert(device)
        else:
            _refuse_what_it_lacks(manifest, methods, convert_options)
            self._session = _open_converted(model, device, self._run_options)
        self._methods = tuple(methods or self._session.manifest.methods)
        self._weighted = self._session if contract.TARGET_WEIGHTS in self._session.targets else None

    @property
    def device(self) -> str:
        """Where the model runs: "cpu" or "cuda:0"."""
        return self._session.device

    @property
    def device_note(self) -> str | None:
        """Why device "auto" did not take CUDA; None where it did or was not asked to choose."""
        return self._session.device_note

    @property
    def manifest(self) -> Manifest:
        """What the converted model says of itself: score, target layer and why, rectifiers, ..."""
        return self._session.manifest

    @property
    def input(self) -> dict[str, Any]:
        """The explained image: its `name`, `shape` (ints, or symbols for open sizes), `dtype`, and `layout`."""
        return self.manifest.input

    @property
    def batch_size(self) -> int:
        """How many images one run takes: as the Explainer was told, or what the model was exported for."""
        if not self.manifest.score["per_image"]:
            return 1
        return _fixed_batch(self.manifest) or self._batch_size or _BATCH[self.device.partition(":")[0]]

    @property
    def classes(self) -> int | None:
        """How many classes there are; None where the model leaves it open."""
        return self.manifest.score["classes"]

    def explain(
        self, images: Any, targets: Any = None, *, mask: Any = None, position: Any = None, batch_size: int | None = None
    ) -> Result:
        """Explain one class of each image.

        Args:
            images: numbers in the shape of the model's input, float32 (float64 is cast), preprocessed as the model
                was trained: numpy, or anything with `__array__`. One image may come without its batch axis. For a
                model of several inputs a mapping of all of them by name.
            targets: None for the predicted class of each image; one class for all; classes [N]; one-hot [N, K];
                or real weights [N, K], for S = sum_k z_k w_k. -1 is the predicted class. With target="cotangent",
                an array of the output's shape.
            mask: for a segmentation, how much each pixel counts, [H, W] or [N, H, W]; by default, and where it is -1,
                the pixels predicted as the target count.
            position: for a neuron, the position in its tensor, [R] or [N, R]; -1, the default, takes all of an axis.
            batch_size: how many images are run at once, if not as the Explainer was told.

        Raises:
            ImageError where the images do not fit the input, TargetError where the targets fit neither images nor
            classes, RequestError where a converted file cannot take weights, GraphgbpError where the run fails.
        """
        inputs = feeds.read_inputs(images, self.manifest.inputs, self._session.inputs)
        images = inputs[self.input["name"]]
        session, request, classes = self._request(targets, mask, position, len(images))
        size = self.batch_size
        if not self.manifest.score["per_image"]:
            size = _one_run(self.manifest, len(images))
        elif batch_size is not None and _fixed_batch(self.manifest) is None:
            size = _positive(batch_size)
        answers = list(self._run(session, inputs, request, len(images), size))
        roles = _joined([answer.roles for answer in answers], size)
        outputs = _joined([answer.outputs for answer in answers], size, self._perhaps_constant(session))
        return Result(
            images=images,
            target_class=roles.pop(contract.TARGET_CLASS, classes),
            target_score=np.broadcast_to(roles.pop(contract.TARGET_SCORE), len(images)),
            outputs=outputs,
            maps=roles,
            manifest=self.manifest,
        )

    def explain_batches(self, batches: Iterable[Any]) -> Iterator[Result]:
        """Explain a stream of batches, one Result for each, in order; the next batch is taken while one is explained.

        Memory does not grow with the number of batches where the caller lets each Result go.

        Args:
            batches: each as `explain` takes images, or a pair (images, targets) as a tuple or a list, as torch's
                DataLoader yields them. They are taken by a background thread, one ahead.

        Raises what `explain` raises, and what `batches` itself raises, in the batch's turn.
        """
        for batch in taken_ahead(batches, limit=1):
            images, targets = batch if isinstance(batch, tuple | list) and len(batch) == 2 else (batch, None)
            yield self.explain(images, targets)

    def _request(self, targets: Any, mask: Any, position: Any, images: int) -> tuple[Session, Arrays, np.ndarray]:
        """The session that answers, what it is asked by role, and the classes where no run tells them."""
        score = self.manifest.score
        nothing = np.full(images, contract.PREDICTED)
        if self.manifest.target == "cotangent":
            _refuse_unread(self._session, mask, position)
            return self._session, {contract.TARGET_COTANGENT: feeds.read_cotangent(targets, images, score)}, nothing
        targets = feeds.read_targets(targets, images, score)
        session = self._session_for(targets)
        _refuse_unread(session, mask, position)
        if contract.TARGET_WEIGHTS in session.targets:
            weights = feeds.one_hot(targets, score) if targets.dtype == np.int64 else targets
            shape = session.targets[contract.TARGET_WEIGHTS]
            classes = targets if targets.dtype == np.int64 else nothing
            return session, {contract.TARGET_WEIGHTS: feeds.fit_weights(weights, score, shape)}, classes
        request = {contract.TARGET: targets}
        if contract.TARGET_MASK in session.targets:
            request[contract.TARGET_MASK] = feeds.read_mask(mask, images, score)
        if contract.TARGET_POSITION in session.targets:
            request[contract.TARGET_POSITION] = feeds.read_position(position, images, score)
        return session, request, nothing

    def _run(self, session: Session, inputs: Arrays, request: Arrays, images: int, size: int) -> Iterator[Answer]:
        """The answer to each batch; a fixed batch is filled with copies of its last image, and they are dropped."""
        wanted, fixed = _roles(self._methods, self.manifest), _fixed_batch(self.manifest) is not None
        per_image = {name for name in inputs if self._is_batched(name)}
        for start in range(0, images, size):
            missing = max(start + size - images, 0) if fixed else 0
            part = {
                name: _part(array, start, size, missing) if name in per_image else array
                for name, array in inputs.items()
            }
            target = {
                role: _part(array, start, size, missing) if self._is_per_image(role) else array
                for role, array in request.items()
            }
            answer = session.run(part, target, wanted)
            if missing:
                answer = Answer(_first(answer.roles, missing, size), _first(answer.outputs, missing, size))
            yield answer

    def _is_per_image(self, role: str) -> bool:
        """Whether what says what is explained has a row per image: all but the cotangent of a shared output."""
        return role != contract.TARGET_COTANGENT or bool(self.manifest.score["per_image"])

    def _is_batched(self, name: str) -> bool:
        """Whether the first axis of an input runs over the images."""
        shape = self._session.inputs[name].shape
        return bool(shape) and (not isinstance(shape[0], int) or shape[0] == self.input["shape"][0])

    def _perhaps_constant(self, session: Session) -> set[str]:
        """The model's outputs whose first size is fixed where the batch is open, so that it may be no batch axis."""
        if _fixed_batch(self.manifest) is not None:
            return set()
        return {name for name, shape in session.output_shapes.items() if shape and isinstance(shape[0], int)}

    def _session_for(self, targets: np.ndarray) -> Session:
        if targets.dtype == np.int64:
            return self._session
        if self._weighted is None:
            if self._convert_options is None:
                raise RequestError(
                    "the converted model takes classes and no weights; give Explainer its source, or convert that "
                    "with target='weights'"
                )
            self._weighted = self._convert(self.device, target="weights")
            if self._weighted.manifest.source != self.manifest.source:
                self._weighted = None
                raise RequestError("the model has changed since this Explainer was made; make a new one")
        return self._weighted

    def _convert(self, device: str, **options: Any) -> Session:
        assert self._convert_options is not None
        converted = convert(self._source, **self._convert_options, **options)
        return Session(
            _serialized(converted), weights_folder=weights_folder(self._source), device=device, **self._run_options
        )


def _checked_model(model: ModelLike) -> ModelLike:
    if isinstance(model, onnx.ModelProto):
        missing = external_locations(model)
        if missing:
            raise MissingWeightsError(
                f"the model keeps its weights in {model_file.describe(missing)}, and nothing says where that is; "
                "give the path of the model, or read it with onnx.load(path)"
            )
    return model


def _manifest_of(model: ModelLike) -> Manifest | None:
    return model_file.read_manifest(read(model))


def _refuse_what_it_lacks(manifest: Manifest, methods: Sequence[str] | None, options: dict[str, Any]) -> None:
    if options:
        raise RequestError(
            f"the model is converted already, so {', '.join(options)} cannot be chosen any more; convert its source"
        )
    lacking = [method for method in methods or () if method not in manifest.methods]
    if lacking and manifest.kind == "explanation":
        raise RequestError(
            f"the converted model holds {', '.join(manifest.methods)} and no {', '.join(map(repr, lacking))}; "
            "convert its source with those methods"
        )


def _open_converted(model: ModelLike, device: str, run_options: dict[str, Any]) -> Session:
    content = _serialized(model) if isinstance(model, onnx.ModelProto) else model
    return Session(content, device=device, **run_options)


def _serialized(model: onnx.ModelProto) -> bytes:
    try:
        return model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise ModelFileError(
            f"the model cannot be handed to ONNX Runtime ({error}); one over 2 GB must be saved with external data "
            "and given by its path"
        ) from None


def _positive(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise RequestError(f"batch_size={batch_size!r} is no number of images; give 1 or more")
    return int(batch_size)


def _fixed_batch(manifest: Manifest) -> int | None:
    size = next(iter(manifest.input["shape"]), None)
    return size if isinstance(size, int) else None


def _part(array: np.ndarray, start: int, size: int, missing: int) -> np.ndarray:
    """One batch of an array, its last row repeated for what is missing."""
    part = array[start : start + size]
    return np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part


def _refuse_unread(session: Session, mask: Any, position: Any) -> None:
    for what, value, role in (("mask", mask, contract.TARGET_MASK), ("position", position, contract.TARGET_POSITION)):
        if value is not None and role not in session.targets:
            raise RequestError(
                f"{what}= is given and the file takes none: it belongs to "
                + ("the scores of a segmentation, with classes" if what == "mask" else "a neuron with positions")
            )


def _one_run(manifest: Manifest, images: int) -> int:
    """How many images are run at once where all share one output. Raises where that is no explanation of each."""
    score, fixed = manifest.score, _fixed_batch(manifest) or 1
    if manifest.target == "cotangent":
        return max(fixed, images)
    if fixed > 1:
        raise UnsupportedError(
            f"the model gives one score '{score['tensor']}' for a fixed batch of {fixed}; export it with a batch of 1"
        )
    if images > 1:
        raise ImageError(f"the model gives one score '{score['tensor']}' for all images; explain one in each call")
    return 1


def _roles(methods: Sequence[str], manifest: Manifest) -> set[str]:
    """What is fetched for the methods."""
    layer = () if set(methods).isdisjoint(contract.CAMS) else contract.LAYER_OUTPUTS
    wanted = {contract.TARGET_CLASS, contract.TARGET_SCORE, *methods, *layer}
    return {role for role in manifest.names if contract.method_of(role) in wanted}


def _first(arrays: dict[str, np.ndarray], missing: int, size: int) -> dict[str, np.ndarray]:
    """Without what belongs to the last `missing` of `size` images."""
    return {name: a[:-missing] if a.ndim and len(a) == size else a for name, a in arrays.items()}


def _joined(
    batches: Sequence[dict[str, np.ndarray]], size: int, perhaps_constant: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The arrays of all batches as one; those of a batch are let go as they are joined."""
    return {
        name: _join(name, [batch.pop(name) for batch in batches], size, name in perhaps_constant)
        for name in list(batches[0])
    }


def _join(name: str, arrays: list[np.ndarray], size: int, perhaps_constant: bool) -> np.ndarray:
    if len(arrays) == 1:
        return arrays[0]
    batched = all(a.ndim and len(a) == size for a in arrays[:-1])
    if (perhaps_constant or not batched) and all(np.array_equal(arrays[0], a) for a in arrays[1:]):
        return arrays[0]
    if batched:
        return np.concatenate(arrays)
    raise GraphgbpError(
        f"output '{name}' of shape {list(arrays[0].shape)} has no batch axis in front, so its {len(arrays)} "
        f"batches cannot be joined; explain at most {size} images in one call, or choose a larger batch_size"
    )
