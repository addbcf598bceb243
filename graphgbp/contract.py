"""What a converted file promises: the names and the manifest that the writer and the runtime both know."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SCOPE = "graphgbp"
RECOMPUTED = f"{SCOPE}/recomputed"  # tensors of functions and branches that the main graph cannot read
TARGET = "target"
TARGET_MASK = "target_mask"
TARGET_POSITION = "target_position"
TARGET_WEIGHTS = "target_weights"
TARGET_COTANGENT = "target_cotangent"
TARGET_INPUTS = (TARGET, TARGET_MASK, TARGET_POSITION, TARGET_WEIGHTS, TARGET_COTANGENT)
TARGET_CLASS = "target_class"
TARGET_SCORE = "target_score"
GUARD_NODE = f"{SCOPE}/target/class_out_of_range"
GUARD_POSITION = f"{SCOPE}/target/position_out_of_range"
GUARD_MASK = f"{SCOPE}/target/mask_of_other_size"
GUARD_WEIGHTS = f"{SCOPE}/target/weights_of_other_size"

SALIENCY = "saliency"
INPUT_X_GRADIENT = "input_x_gradient"
GUIDED_BACKPROP = "guided_backprop"
DECONVNET = "deconvnet"
GRADCAM = "gradcam"
HIRESCAM = "hirescam"
LAYERCAM = "layercam"
GRADCAM_PLUSPLUS = "gradcam_plusplus"
XGRADCAM = "xgradcam"
GUIDED_GRADCAM = "guided_gradcam"
GRADCAM_FEATURES = "gradcam_features"
GRADCAM_GRADIENTS = "gradcam_gradients"

CAMS = (GRADCAM, HIRESCAM, LAYERCAM, GRADCAM_PLUSPLUS, XGRADCAM)
LAYER_METHODS = (*CAMS, GUIDED_GRADCAM)
METHODS = (SALIENCY, INPUT_X_GRADIENT, GUIDED_BACKPROP, DECONVNET, *LAYER_METHODS)
LAYER_OUTPUTS = (GRADCAM_FEATURES, GRADCAM_GRADIENTS)

MANIFEST_KEY = f"{SCOPE}.manifest"
MANIFEST_VERSION = 1

PREDICTED = -1

ORT_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""ONNX Runtime's session option: where the weights of a model lie that it is given as bytes."""


@dataclass(frozen=True)
class Manifest:
    """What was appended to a model and why; stored as JSON in the model's metadata under `graphgbp.manifest`.

    Every name is a tensor or node of the file itself. `names` maps each role (`target`, `target_class`,
    `gradcam`, ...) to the public name that carries it, which differs only where the original already used it.
    `inputs` are the explained inputs, `target_layers` those of the CAMs; where there are several, the role of a map
    ends in the name of its input or layer: `saliency/left`, `gradcam/layer3`.
    """

    kind: str  # "explanation" or "vjp"
    graphgbp: str
    source: dict[str, Any]
    names: dict[str, str]
    methods: list[str] = field(default_factory=list)
    inputs: list[dict[str, Any]] = field(default_factory=list)
    score: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    target_layers: list[dict[str, Any]] = field(default_factory=list)
    rectifiers: list[dict[str, str]] = field(default_factory=list)
    passed_through: list[dict[str, str]] = field(default_factory=list)
    surrogates: list[str] = field(default_factory=list)
    opset: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    manifest_version: int = MANIFEST_VERSION

    @property
    def input(self) -> dict[str, Any]:
        """The input that CAMs are drawn over: the first that is an image, else the first."""
        return next((entry for entry in self.inputs if entry["layout"]), self.inputs[0])

    @property
    def target_layer(self) -> dict[str, Any] | None:
        """The first target layer; None without a CAM."""
        return self.target_layers[0] if self.target_layers else None

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError where the text is no manifest of this version."""
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("manifest_version") != MANIFEST_VERSION:
            raise ValueError(f"it is not a version {MANIFEST_VERSION} manifest")
        return cls(**data)


def role_of(method: str, *qualifiers: str) -> str:
    """The role of a map, with the names that tell it from others of its method."""
    return "/".join((method, *qualifiers))


def method_of(role: str) -> str:
    """The method, or the fixed role, that a role begins with."""
    return role.partition("/")[0]


def public_names(taken: Collection[str], roles: Sequence[str]) -> dict[str, str]:
    """A public name for each role, changed only where the original model already uses it."""
    used = set(taken)
    names = {}
    for role in roles:
        candidates = (role, *(f"{SCOPE}_{role}{suffix}" for suffix in ("", *range(2, len(used) + 3))))
        names[role] = next(name for name in candidates if name not in used)
        used.add(names[role])
    return names


def dtype_of(kind: Any) -> "np.dtype[Any]":
    """numpy's type; "bfloat16" is that of ml_dtypes. Raises TypeError where there is none."""
    import numpy as np

    if kind == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(kind)
