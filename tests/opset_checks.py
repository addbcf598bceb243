"""What every raised model is held to."""

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from graphgbp.opset import raise_opset
from tests.rules.harness import run

F = TensorProto.FLOAT


def build(nodes, inputs, outputs, version, weights=None, ir_version=8, domains=(), **graph):
    """A model; `inputs` maps names to shapes, `weights` names to arrays; IR 3 lists the weights as inputs."""
    weights = {name: np.asarray(value) for name, value in (weights or {}).items()}
    infos = [helper.make_tensor_value_info(name, F, shape) for name, shape in inputs.items()]
    if ir_version < 4:
        kinds = {name: helper.np_dtype_to_tensor_dtype(value.dtype) for name, value in weights.items()}
        infos += [helper.make_tensor_value_info(name, kinds[name], value.shape) for name, value in weights.items()]
    results = [helper.make_tensor_value_info(name, F, None) for name in outputs]
    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    made = helper.make_graph(nodes, "graph", infos, results, initializers, **graph)
    imports = [helper.make_opsetid("", version), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=imports, ir_version=ir_version))


def normal(*shape, seed=7):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def produced(graph):
    return {name for node in graph.node for name in node.output if name}


def assert_only_nodes_changed(raised, model):
    """Everything but nodes, opset and inlined functions is the original's, and no name of a tensor is lost."""
    assert [(entry.domain, entry.version) for entry in raised.opset_import] == [
        (entry.domain, entry.version if entry.domain else 16) for entry in model.opset_import
    ]
    assert produced(model.graph) <= produced(raised.graph)
    copies = []
    for proto in (raised, model):
        copy = type(proto).FromString(proto.SerializeToString())
        del copy.graph.node[:], copy.opset_import[:], copy.functions[:]
        copies.append(copy.SerializeToString(deterministic=True))
    assert copies[0] == copies[1]


def check(model, feeds, expected=None, *, mended=None):
    """Raise, and hold the result against the original in ONNX Runtime and against `expected`."""
    before = model.SerializeToString(deterministic=True)
    raised, record = raise_opset(model, None)
    assert model.SerializeToString(deterministic=True) == before
    assert_only_nodes_changed(raised, model)
    onnx.checker.check_model(raised, full_check=True)
    old, new = run(model, feeds), run(raised, feeds)
    for name, value in old.items():
        np.testing.assert_allclose(new[name], value, rtol=0, atol=1e-6 * max(np.abs(value).max(), 1), err_msg=name)
    if expected is not None:
        np.testing.assert_allclose(new["y"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    if mended is not None:
        assert record["mended"] == mended
    assert record["source"] == model.opset_import[0].version
    assert record["raised_to"] == 16
    return raised, record


def converter_is_wrong(model, feeds, expected):
    found = run(version_converter.convert_version(model, 16), feeds)["y"]
    return np.abs(found - expected).max() > 0.1 * np.abs(expected).max()


def resized(x, scales, mode):
    """Upsample and Resize before opset 11 by their definition: axis by axis, sampled at i / scale."""
    for axis, scale in enumerate(scales):
        size = x.shape[axis]
        at = np.arange(math.floor(size * scale)) / scale
        if mode == "nearest":
            at = np.ceil(at - 1e-6) if scale < 1 else np.floor(at + 1e-6)
        at = np.minimum(at, size - 1)
        low = np.floor(at).astype(int)
        weight = (at - low).reshape([-1 if other == axis else 1 for other in range(x.ndim)])
        high = np.minimum(low + 1, size - 1)
        x = (1 - weight) * x.take(low, axis) + weight * x.take(high, axis)
    return x


def resize_model(version, mode, scales, shape):
    if version < 9:
        node = helper.make_node("Upsample", ["x"], ["u"], "up1", mode=mode, scales=[float(scale) for scale in scales])
        weights = {}
    else:
        node = helper.make_node("Upsample" if version == 9 else "Resize", ["x", "scales"], ["u"], "up1", mode=mode)
        weights = {"scales": np.array(scales, np.float32)}
    # the mended node is not the output: the converter renames such a tensor
    return build([node, helper.make_node("Neg", ["u"], ["y"])], {"x": shape}, ["y"], version, weights)
