"""What is asked of a conversion, checked as far as no model is needed."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphgbp import contract, heads
from graphgbp.errors import RequestError
from graphgbp.score import SCORES

DEFAULT_METHODS = (contract.GUIDED_GRADCAM, contract.GRADCAM, contract.GUIDED_BACKPROP)
TARGETS = ("required", "optional", "weights", "cotangent")
RECTIFIERS = ("relu", "all")
AUTO = "auto"


@dataclass(frozen=True)
class Request:
    """What is to be explained, as `convert` and `inspect` take it.

    `inputs` is None for every float input that the score depends on, the others for what is chosen by default.
    """

    score: str = "auto"
    target: str = "required"
    target_tensor: str | None = None
    class_axis: int | None = None
    inputs: tuple[str, ...] | None = None
    output: str | None = None

    def __post_init__(self) -> None:
        _one_of("score", self.score, SCORES)
        _one_of("target", self.target, TARGETS)
        if self.target_tensor is not None and self.output is not None:
            raise RequestError("target_tensor and output name two things to explain; leave one out")
        if self.target in ("weights", "cotangent") and self.target_tensor is not None:
            raise RequestError(f"a neuron is named by class and position; leave target={self.target!r} out")
        if self.score != "auto" and (self.target == "cotangent" or self.target_tensor is not None):
            raise RequestError(f"score={self.score!r} means the classes of an output; leave it out")
        if self.class_axis is not None and (not isinstance(self.class_axis, int) or self.target == "cotangent"):
            raise RequestError(
                f"class_axis={self.class_axis!r} is no axis of scores; give a whole number, or leave it out"
            )


@dataclass(frozen=True)
class Options:
    """What is asked of a conversion, as `convert` takes it."""

    request: Request
    methods: tuple[str, ...]
    target_layers: tuple[str, ...]
    aggregate: str | None
    rectifiers: str
    interpolate_mode: str
    relu_attributions: bool

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in contract.METHODS]
        if unknown or not self.methods:
            raise RequestError(
                f"unknown method {', '.join(map(repr, unknown)) or '(none given)'}; "
                f"choose among {', '.join(contract.METHODS)}"
            )
        _one_of("rectifiers", self.rectifiers, RECTIFIERS)
        _one_of("interpolate_mode", self.interpolate_mode, tuple(heads.INTERPOLATE_MODES))
        self._refuse_contradictions()

    def _refuse_contradictions(self) -> None:
        if self.target_layers != (AUTO,) and not self.needs_layer:
            raise RequestError(
                f"target_layer={', '.join(map(repr, self.target_layers))} is where a CAM is taken, and none of "
                f"{', '.join(self.methods)} is one; leave it out, or ask for one of {', '.join(contract.LAYER_METHODS)}"
            )
        if self.aggregate not in (None, "mean"):
            raise RequestError(f"aggregate={self.aggregate!r} is unknown; choose 'mean', or leave it out")
        if self.aggregate and not self.needs_layer:
            raise RequestError(
                f"aggregate averages a CAM over layers; ask for one of {', '.join(contract.LAYER_METHODS)}"
            )
        if self.aggregate and not self.relu_attributions:
            raise RequestError("aggregate='mean' averages rectified maps; leave relu_attributions=False out")

    @property
    def needs_layer(self) -> bool:
        return any(method in contract.LAYER_METHODS for method in self.methods)


def names(what: str, given: str | Sequence[str] | None) -> tuple[str, ...]:
    """One name or several, each once. Raises RequestError for what is no name."""
    several = () if given is None else (given,) if isinstance(given, str) else given
    if not isinstance(several, Sequence) or not all(isinstance(name, str) for name in several):
        raise RequestError(f"{what}={given!r} is no name; give a string, or a list of them")
    return tuple(dict.fromkeys(several))


def _one_of(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise RequestError(f"{name}={value!r} is unknown; choose one of {', '.join(choices)}")
