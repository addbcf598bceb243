"""What tests share: a small classifier; the `cuda` marker, which runs where CUDA really starts and says where not."""

from contextlib import redirect_stdout
from functools import cache
from io import StringIO

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from graphgbp import Explainer
from graphgbp.runtime import cuda_obstacle
from tests.build import drawn, small_cnn

_SILENT, _WARNING = 4, 2


@cache
def cuda_missing() -> str | None:
    """Why CUDA does not start here, asked of ONNX Runtime itself; None where it does."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(StringIO()):
            onnxruntime.preload_dlls()
    onnxruntime.set_default_logger_severity(_SILENT)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CUDAExecutionProvider"])
        session.run(None, {"x": np.zeros(1, np.float32)})
    except Exception as error:
        return " ".join(str(error).split())
    finally:
        onnxruntime.set_default_logger_severity(_WARNING)
    if "CUDAExecutionProvider" in session.get_providers():
        return None
    return cuda_obstacle() or "ONNX Runtime does not start its CUDA provider"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    needy = [item for item in items if item.get_closest_marker("cuda")]
    reason = cuda_missing() if needy else None
    for item in needy if reason else []:
        item.add_marker(pytest.mark.skip(reason=f"no CUDA: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = terminalreporter.stats.get("skipped", [])
    skipped = [report for report in reports if "cuda" in report.keywords]
    if skipped:
        terminalreporter.section("NOT TESTED ON A GPU", yellow=True)
        terminalreporter.line(f"{len(skipped)} cuda tests were skipped; {_reason(skipped[0])}")


def _reason(report: pytest.TestReport) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
    return str(text).removeprefix("Skipped: ")


@pytest.fixture(scope="session")
def source() -> onnx.ModelProto:
    """A small classifier: x [N, 3, 8, 8], five classes, scores `z`, probabilities `y`."""
    return small_cnn(("y = Softmax<axis=1>(z)",))


@pytest.fixture(scope="session")
def explainer(source: onnx.ModelProto) -> Explainer:
    return Explainer(source, ["saliency", "gradcam"], device="cpu")


@pytest.fixture
def images() -> np.ndarray:
    return drawn(3, 3, 8, 8, seed=11)
