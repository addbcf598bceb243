"""Weights in external files, read from the model's folder and not from the current one."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphgbp.errors import MissingWeightsError


class _ExternalValues(LazyValues):
    """The values of a weight in an external file, read from the model's folder and not from the current one."""

    def __init__(self, tensor: onnx.TensorProto, folder: Path) -> None:
        super().__init__(tensor)
        self._folder = folder

    def load(self) -> np.ndarray:
        try:
            return numpy_helper.to_array(self.tensor, str(self._folder))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise MissingWeightsError(f"weight '{self.tensor.name}' cannot be read from its file: {error}") from None


def read_weights_from(folder: Path, graph: gs.Graph) -> None:
    for node in graph.nodes:
        for tensor in node.inputs:
            values = tensor._values if isinstance(tensor, gs.Constant) else None
            if isinstance(values, LazyValues) and uses_external_data(values.tensor):
                tensor._values = _ExternalValues(values.tensor, folder)
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                read_weights_from(folder, value)
