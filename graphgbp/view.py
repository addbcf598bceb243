"""The reading view: what rules, policies and the search for layers look at."""

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphgbp.stored import Stored


@dataclass
class View:
    """The model as rules read it. `graph.nodes[:]` is in topological order.

    `recomputed` are nodes that the model does not hold in its main graph (a taken branch of an If, the body of a local
    function, what a fused node stands for), as they compute in the types of the file; `constants` are those they read.
    What a gradient reads of them is computed again, and a tensor in `twins` is read under the name there. `stored`
    tells the type in the file of a tensor that the view shows as float32. `opaque` tells of a node, by its id, why it
    is not seen as plain nodes. `seen_through` holds the name of the first output of a node that is, and of a call, by
    its path; `formed` all outputs of such nodes. `named` is the first output of every node, of those seen through as
    well, by the node's name; `standing_for` the node of the file behind a node, by its id, as (operator, name).
    """

    graph: gs.Graph
    opsets: dict[str, int]
    tensors: dict[str, gs.Tensor] = field(default_factory=dict)
    recomputed: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    twins: dict[str, str] = field(default_factory=dict)
    stored: Stored = field(default_factory=dict)
    opaque: dict[int, str] = field(default_factory=dict)
    seen_through: dict[str, str] = field(default_factory=dict)
    formed: set[str] = field(default_factory=set)
    named: dict[str, gs.Tensor] = field(default_factory=dict)
    standing_for: dict[int, tuple[str, str]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        return self.opsets[""]
