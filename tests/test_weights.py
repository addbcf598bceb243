"""Weights in external files: where they may lie, how long they must be, how they are read."""

import shutil
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import graphgbp
from graphgbp import MissingWeightsError, ModelFileError, weights
from tests.build import drawn, model, small_cnn
from tests.external_data import (
    DATA,
    HOLDERS,
    adding,
    external,
    external_cnn,
    in_branches,
    in_constant,
    messages,
    written,
)
from tests.rules.harness import run


@pytest.mark.parametrize("holder", HOLDERS)
def test_every_tensor_is_found(holder):
    made = holder(external(drawn(4)))
    made.training_info.add().algorithm.initializer.append(external(drawn(4), "trained"))
    found = sorted(tensor.SerializeToString() for tensor in weights.tensors(made))
    assert found == sorted(tensor.SerializeToString() for tensor in messages(made))
    assert weights.external_locations(made) == [DATA]


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("location", ["../other/w.bin", "absolute", "link.bin", "links/w.bin", "sub/../../other/w.bin"])
def test_a_location_that_leaves_the_folder_is_refused_everywhere(tmp_path, holder, location):
    values = drawn(4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w.bin").write_bytes(values.tobytes())
    home = tmp_path / "home"
    (home / "a").mkdir(parents=True)
    (home / "link.bin").symlink_to(tmp_path / "other" / "w.bin")
    (home / "links").symlink_to(tmp_path / "other")
    location = str(tmp_path / "other" / "w.bin") if location == "absolute" else location
    made = holder(external(values, location=location))
    path = written(made, home)
    for use in (graphgbp.inspect, graphgbp.convert, graphgbp.vjp, graphgbp.Explainer):
        with pytest.raises(
            ModelFileError, match=r"leads out of its folder.*(put model and weights into one folder|cp -rL)"
        ) as e:
            use(path)
        assert location in str(e.value)
    with pytest.raises(ModelFileError, match="leads out of its folder"):
        graphgbp.save(made, tmp_path / "new.onnx", weights_from=home)
    assert not (tmp_path / "new.onnx").exists()


def test_what_onnx_runtime_would_refuse_is_refused(tmp_path):
    twice = external(drawn(4))
    twice.external_data.add(key="location", value=DATA)
    for tensor, says in ((twice, "more than once where it lies"), (external(drawn(4), location="w\0.bin"), "no file")):
        path = written(adding(tensor), tmp_path)
        (tmp_path / DATA).write_bytes(drawn(4).tobytes())
        with pytest.raises(ModelFileError, match=says):
            graphgbp.inspect(path)
        with pytest.raises(Exception, match="FAIL"):
            onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def test_a_file_in_two_spellings_is_one_file(tmp_path):
    made = small_cnn()
    onnx.save(made, tmp_path / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=0)
    made = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for entry in made.graph.initializer[0].external_data:
        entry.value = f"./{DATA}" if entry.key == "location" else entry.value
    found = graphgbp.inspect(written(made, tmp_path))
    assert found.weights["external"] == {f"./{DATA}": (tmp_path / DATA).stat().st_size}


def test_a_hub_keeps_weights_elsewhere(tmp_path):
    """Model and weights are links into a third folder, where the weights have another name."""
    path = external_cnn(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.onnx").symlink_to(path)
    (tmp_path / "blobs" / DATA).rename(tmp_path / "blobs" / "0a1b")
    (tmp_path / "snapshot" / DATA).symlink_to(tmp_path / "blobs" / "0a1b")
    with pytest.raises(ModelFileError, match=r"is a link that leads out of its folder.*cp -rL"):
        graphgbp.convert(tmp_path / "snapshot" / "model.onnx")
    shutil.copytree(tmp_path / "snapshot", tmp_path / "copy")
    graphgbp.save(graphgbp.convert(tmp_path / "copy" / "model.onnx"), tmp_path / "copy" / "out.onnx")


def test_links_inside_the_folder_are_followed(tmp_path):
    path = external_cnn(tmp_path / "home")
    plain = graphgbp.convert(path, ["saliency"])
    (tmp_path / "home" / DATA).rename(tmp_path / "home" / "real.bin")
    (tmp_path / "home" / DATA).symlink_to("real.bin")
    assert graphgbp.convert(path, ["saliency"]) == plain
    (tmp_path / "link").symlink_to(tmp_path / "home")
    assert graphgbp.convert(tmp_path / "link" / "model.onnx", ["saliency"]) == plain


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    ("description", "content", "error", "says"),
    [
        ({}, None, MissingWeightsError, "is not in"),
        ({}, drawn(3), MissingWeightsError, f"{DATA}' has 12 bytes, and weight 'w' lies in bytes 0 to 16"),
        ({"offset": 4}, drawn(4), MissingWeightsError, "bytes 4 to 20: the file is cut short"),
        ({"length": None}, drawn(3), MissingWeightsError, "bytes 0 to 16"),
        ({"length": 8}, drawn(4), ModelFileError, r"weight 'w' of shape \[4\] needs 16 bytes.* it has 8"),
        ({"offset": -4}, drawn(4), ModelFileError, "where weight 'w' lies cannot be read: .*non-negative"),
        ({"offset": "x"}, drawn(4), ModelFileError, "where weight 'w' lies cannot be read"),
        ({"location": ""}, drawn(4), MissingWeightsError, "is not in"),
        ({"location": None}, drawn(4), MissingWeightsError, "is not in"),
    ],
)
def test_a_file_that_does_not_hold_them_is_refused_on_load(tmp_path, holder, description, content, error, says):
    path = written(holder(external(drawn(4), **description)), tmp_path)
    if content is not None:
        (tmp_path / DATA).write_bytes(content.tobytes())
    with pytest.raises(error, match=says):
        graphgbp.convert(path)


# -- their values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(TensorProto.DataType.keys()) - {"UNDEFINED", "STRING"}))
def test_values_of_every_type(tmp_path, name):
    code = TensorProto.DataType.Value(name)
    dtype = helper.tensor_dtype_to_np_dtype(code)
    expected = (drawn(3, 5, seed=3) * 3).round().astype(dtype)
    if "INT2" in name or "INT4" in name:
        expected = np.arange(15).reshape(3, 5).astype(np.uint8).__mod__(2).astype(dtype)
    inline = numpy_helper.from_array(expected, "w")
    (tmp_path / DATA).write_bytes(b"pad" + inline.raw_data)
    tensor = TensorProto(name="w", data_type=code, dims=[3, 5], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", DATA), ("offset", "3"), ("length", str(len(inline.raw_data)))):
        tensor.external_data.add(key=key, value=value)
    found = weights.values(tensor, tmp_path)
    assert found.dtype == dtype and found.tobytes() == expected.tobytes()
    assert weights.size(tensor) == weights.size(inline) == len(inline.raw_data)


@pytest.mark.parametrize("code", [TensorProto.STRING, TensorProto.UNDEFINED, 99])
def test_a_type_without_a_size_is_refused(tmp_path, code):
    tensor = external(drawn(4))
    tensor.data_type = code
    (tmp_path / DATA).write_bytes(drawn(4).tobytes())
    with pytest.raises(ModelFileError, match=f"weight 'w' has type {code}, of which no size is known"):
        graphgbp.inspect(written(adding(tensor), tmp_path))


def test_values_are_mapped_and_not_read(tmp_path):
    (tmp_path / DATA).write_bytes(drawn(4).tobytes())
    found = weights.values(external(drawn(4)), tmp_path)
    assert not found.flags.writeable
    with (tmp_path / DATA).open("r+b") as file:
        file.write(np.full(4, 7, np.float32).tobytes())
    assert (found == 7).all()
    np.testing.assert_array_equal(weights.values(external(drawn(0)), tmp_path), drawn(0))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_pages_are_let_go(tmp_path):
    """While inside, and only then; the values stay what they are."""

    def mapped() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))

    size = 2**26
    with (tmp_path / DATA).open("wb") as file:
        file.truncate(size)
    found = weights.values(external(np.broadcast_to(np.float32(0), size // 4), length=size), tmp_path)
    assert found.sum() == 0
    kept = mapped()
    with weights.not_kept([found, drawn(4)]):
        limit = time.monotonic() + 20
        while mapped() > kept - size * 3 // 4 and time.monotonic() < limit:
            time.sleep(0.01)
        assert mapped() < kept - size * 3 // 4
    assert found.sum() == 0 and mapped() > kept - size // 4


def scattered(kind: type, *, raw: bool, pairs: bool) -> tuple[onnx.SparseTensorProto, np.ndarray]:
    """A sparse weight 'w' of shape [4, 3], and its values."""
    full = np.zeros((4, 3), kind)
    places = np.array([0, 4, 11])
    full.flat[places] = [0.5, -2, 3]
    indices = np.argwhere(full) if pairs else places
    tensors = [
        numpy_helper.from_array(values, name)
        if raw
        else helper.make_tensor(name, helper.np_dtype_to_tensor_dtype(values.dtype), values.shape, values.ravel())
        for name, values in (("w", full.flat[places]), ("indices", indices))
    ]
    return helper.make_sparse_tensor(*tensors, full.shape), full


@pytest.mark.parametrize(("kind", "opset"), [(np.float32, 18), (np.float64, 18), (np.float32, 12)])
@pytest.mark.parametrize(("raw", "pairs"), [(True, False), (True, True), (False, False), (False, True)])
@pytest.mark.parametrize("outside", [False, True])
def test_sparse_weights(tmp_path, kind, raw, pairs, outside, opset):
    """Of a MatMul and of a PRelu, which would be a ReLU if its slopes were read as zeros."""
    elem_type = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    held, full = scattered(kind, raw=raw, pairs=pairs)
    slopes = numpy_helper.from_array(np.full(3, 0.5, kind), "slopes")
    made = helper.make_model(
        helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["m"]), helper.make_node("PRelu", ["m", "slopes"], ["y"])],
            "sparse",
            [helper.make_tensor_value_info("x", elem_type, ["N", 4])],
            [helper.make_tensor_value_info("y", elem_type, ["N", 3])],
            sparse_initializer=[held, helper.make_sparse_tensor(slopes, numpy_helper.from_array(np.arange(3)), [3])],
        ),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=8,
    )
    if outside:
        held.values.CopyFrom(external(full[full != 0]))
        made.graph.sparse_initializer[0].CopyFrom(held)
        (tmp_path / DATA).write_bytes(full[full != 0].tobytes())
    path = written(made, tmp_path)
    assert not graphgbp.inspect(path).rectifiers
    graphgbp.save(graphgbp.vjp(path), tmp_path / "out.onnx")
    x, dy = drawn(2, 4).astype(kind), drawn(2, 3, seed=5).astype(kind)
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    found = dict(zip(["y", "x_grad"], session.run(["y", "x_grad"], {"x": x, "y_grad": dy}), strict=True))
    product = torch.tensor(x, requires_grad=True)
    y = torch.nn.functional.prelu(product @ torch.tensor(full), torch.full((3,), 0.5, dtype=product.dtype))
    y.backward(torch.tensor(dy))
    np.testing.assert_allclose(found["y"], y.detach(), rtol=1e-5)
    np.testing.assert_allclose(found["x_grad"], product.grad, rtol=1e-5)


@pytest.mark.parametrize("indices", [[0, 4, 12], [0, -1, 4], [0, 4], [[0, 0], [1, 1], [3, 3]], [[0], [4], [11]]])
def test_indices_that_do_not_fit_are_refused(indices):
    held, _ = scattered(np.float32, raw=True, pairs=False)
    held.indices.CopyFrom(numpy_helper.from_array(np.array(indices), "indices"))
    with pytest.raises(ModelFileError, match="indices of sparse weight 'w' do not fit its shape"):
        weights.dense(held, None)


def test_a_sparse_constant_is_known():
    """The zeros that make a Max a rectifier."""
    zero = helper.make_sparse_tensor(
        numpy_helper.from_array(np.zeros(1, np.float32), "v"), numpy_helper.from_array(np.array([0])), [1]
    )
    made = model(["m = Max(x, w)", "y = GlobalAveragePool(m)"], {"x": ("N", 3, 8, 8), "w": (1,)}, ["y"])
    del made.graph.input[1]
    made.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=zero))
    assert [entry["clothing"] for entry in graphgbp.inspect(made).rectifiers] == ["Max(x, 0)"]


def test_a_constant_is_read_from_the_models_folder(tmp_path, monkeypatch):
    """The zeros that make a Max a rectifier are a large Constant in an external file."""
    zeros = np.zeros((1, 3, 32, 32), np.float32)
    made = model(["m = Max(x, w)", "y = GlobalAveragePool(m)"], {"x": ("N", 3, 32, 32), "w": zeros.shape}, ["y"])
    del made.graph.input[1]
    made.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=external(zeros)))
    path = written(made, tmp_path / "home")
    (tmp_path / "home" / DATA).write_bytes(zeros.tobytes())
    (tmp_path / DATA).write_bytes(np.ones_like(zeros).tobytes())
    monkeypatch.chdir(tmp_path)
    assert [entry["clothing"] for entry in graphgbp.inspect(path).rectifiers] == ["Max(x, 0)"]
    with pytest.raises(MissingWeightsError, match="nothing says where that is"):
        graphgbp.inspect(made)


@pytest.mark.parametrize("holder", [adding, in_constant, in_branches])
@pytest.mark.parametrize(("elements", "offset"), [(4, 0), (4000, 64), (4000, 3)])
def test_an_old_model_is_raised_with_its_weights_where_they_are(tmp_path, holder, elements, offset):
    values = drawn(elements)
    made = holder(external(values, offset=offset))
    made.graph.input[0].type.tensor_type.shape.dim[1].dim_value = elements
    for value in [entry for node in made.graph.node for a in node.attribute for entry in a.g.output]:
        value.type.tensor_type.shape.dim[0].dim_value = elements
    made.graph.output[0].type.tensor_type.shape.dim[1].dim_value = elements
    del made.graph.value_info[:]
    made.opset_import[0].version = 13
    path = written(made, tmp_path)
    (tmp_path / DATA).write_bytes(b"\0" * offset + values.tobytes())
    gradient = graphgbp.vjp(path)
    assert weights.external_locations(gradient) == [DATA]
    graphgbp.save(gradient, tmp_path / "out.onnx")
    x = drawn(1, elements, seed=5)
    found = run(onnx.load(tmp_path / "out.onnx"), {"x": x, "y_grad": x})
    np.testing.assert_array_equal(found["x_grad"], x)
    np.testing.assert_array_equal(found["y"], x + values)


def test_large_constants_stay_in_a_raised_model():
    """Weights as Constant nodes, as Paddle writes them, are no inputs of the converter's."""
    made = small_cnn(opset=12)
    wide = drawn(5, 400)
    table = helper.make_node("Constant", [], ["table"], value=numpy_helper.from_array(wide))
    made.graph.node.insert(0, table)
    made.graph.node.append(helper.make_node("MatMul", ["y", "table"], ["t"]))
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("t", TensorProto.FLOAT, ["N", 400]))
    raised = graphgbp.convert(made, ["saliency"])
    assert table in raised.graph.node
    x = drawn(2, 3, 8, 8)
    np.testing.assert_allclose(
        run(raised, {"x": x, "target": np.array([-1])})["t"], run(made, {"x": x})["t"], rtol=1e-5
    )


# -- saving -----------------------------------------------------------------------------------------------------------
