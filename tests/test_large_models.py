"""Models are converted without their weights being read into memory: done where memory for them cannot be had."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from tests.build import model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits the data of a process and reads /proc")

HIDDEN = 2**18
WEIGHTS = HIDDEN * 8 * 8 * 3 * 4  # bytes of the larger weight: 201 MB
ROOM = WEIGHTS // 3

WORK = """
import json, resource, sys
resource.setrlimit(resource.RLIMIT_STACK, (2**20, 2**20))  # of each thread too, of which a machine may have many
import numpy as np
import onnxruntime, onnx.reference, onnx.version_converter, onnx.inliner
import graphgbp, graphgbp.conversion, graphgbp.inspection, graphgbp.jacobian
source, out, room, weights = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])

def memory(kind):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(kind))

data, resident = memory("VmData"), memory("VmRSS")
resource.setrlimit(resource.RLIMIT_DATA, (data + room, data + room))
try:
    np.ones(weights, np.uint8)
except MemoryError:
    pass
else:
    sys.exit("the weights would fit")
found = graphgbp.inspect(source)
gradient = graphgbp.vjp(source)
graphgbp.save(graphgbp.convert(source, ["guided_gradcam", "saliency"]), out)
mapped = memory("VmHWM") - resident
print(json.dumps({"weights": found.weights, "outputs": [y.name for y in gradient.graph.output], "mapped": mapped}))
"""


def dense(opset: int, folder: Path) -> Path:
    """A convolution and two dense layers, the weights of which are a file of zeros that takes no room on the disk."""
    nodes = [
        "c = Conv<pads=[1,1,1,1]>(x, w1)",
        "r = Relu(c)",
        "f = Flatten(r)",
        "h = Gemm<transB=1>(f, w2, b2)",
        "rh = Relu(h)",
        "y = Gemm(rh, w3, b3)",
    ]
    shapes = {"w1": (3, 3, 3, 3), "w2": (HIDDEN, 192), "b2": (HIDDEN,), "w3": (HIDDEN, 5), "b3": (5,)}
    made = model(nodes, {"x": ("N", 3, 8, 8), **shapes}, ["y"], opset=opset)
    del made.graph.input[1:]
    offset = 0
    for name, shape in shapes.items():
        tensor = made.graph.initializer.add(name=name, dims=shape, data_type=TensorProto.FLOAT)
        tensor.data_location = TensorProto.EXTERNAL
        length = 4 * int(np.prod(shape))
        for key, value in (("location", "weights.bin"), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
        offset += length
    with (folder / "weights.bin").open("wb") as file:
        file.truncate(offset)
    onnx.save(made, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.parametrize("opset", [18, 12])
def test_conversion_takes_no_memory_for_the_weights(tmp_path, opset):
    """Raising opset 12 included, whose proof runs old and new model with all weights."""
    source, out = dense(opset, tmp_path), tmp_path / "out.onnx"
    done = subprocess.run(
        [sys.executable, "-c", WORK, str(source), str(out), str(ROOM), str(WEIGHTS)],
        capture_output=True,
        text=True,
        env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["weights"] == {"inline": 0, "external": {"weights.bin": (tmp_path / "weights.bin").stat().st_size}}
    assert found["outputs"] == ["y", "x_grad"]
    assert out.stat().st_size < 1e5
    assert found["mapped"] < 0.8 * WEIGHTS, "nor for their pages"
