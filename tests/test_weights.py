"""Weights in external files: where they may lie, how long they must be, how they are read."""

import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper

import graphgbp
from graphgbp import MissingWeightsError, ModelFileError, model_file, weights
from tests.build import drawn, model, small_cnn
from tests.rules.harness import run

DATA = "model.onnx.data"


def external(values: np.ndarray, name: str = "w", **description: object) -> TensorProto:
    """A tensor without values that says where they lie."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": DATA, "offset": 0, "length": values.nbytes, **description}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def adding(
    tensor: TensorProto, nodes: list[onnx.NodeProto] | None = None, functions=(), name: str = "w"
) -> onnx.ModelProto:
    """y = x + w, w an initializer, or made by the nodes."""
    made = model([f"y = Add(x, {name})"], {"x": (1, 4), name: (4,)}, ["y"])
    del made.graph.input[1]
    if nodes is None:
        made.graph.initializer.append(tensor)
    for node in reversed(nodes or []):
        made.graph.node.insert(0, node)
    made.functions.extend(functions)
    return made


def in_constant(tensor: TensorProto) -> onnx.ModelProto:
    return adding(tensor, [helper.make_node("Constant", [], ["w"], value=tensor)])


def in_branches(tensor: TensorProto) -> onnx.ModelProto:
    """As an initializer of one branch and a Constant of the other."""
    value = helper.make_tensor_value_info("w", TensorProto.FLOAT, [4])
    then = helper.make_graph([], "then", [], [value], [tensor])
    other = helper.make_graph([helper.make_node("Constant", [], ["w"], value=tensor)], "else", [], [value])
    condition = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.array(True)))
    return adding(
        tensor, [condition, helper.make_node("If", ["c"], ["s"], then_branch=then, else_branch=other)], name="s"
    )


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    body = [helper.make_node("Constant", [], ["v"], value=tensor)]
    imports = [helper.make_opsetid("", 18)]
    function = helper.make_function("own", "Weight", [], ["v"], body, imports)
    made = adding(tensor, [helper.make_node("Weight", [], ["w"], domain="own")], [function])
    made.opset_import.add(domain="own", version=1)
    return made


def in_default(tensor: TensorProto) -> onnx.ModelProto:
    """As the default of a function's attribute."""
    constant = helper.make_node("Constant", [], ["v"])
    constant.attribute.add(name="value", ref_attr_name="weight", type=onnx.AttributeProto.TENSOR)
    imports = [helper.make_opsetid("", 18)]
    default = helper.make_attribute("weight", tensor)
    function = helper.make_function("own", "Weight", [], ["v"], [constant], imports, attribute_protos=[default])
    made = adding(tensor, [helper.make_node("Weight", [], ["w"], domain="own")], [function])
    made.opset_import.add(domain="own", version=1)
    return made


def sparse(tensor: TensorProto) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(tensor, numpy_helper.from_array(np.arange(4), "indices"), [4])


def in_sparse(tensor: TensorProto) -> onnx.ModelProto:
    made = adding(tensor, [])
    made.graph.sparse_initializer.append(sparse(tensor))
    return made


def in_sparse_constant(tensor: TensorProto) -> onnx.ModelProto:
    return adding(tensor, [helper.make_node("Constant", [], ["w"], sparse_value=sparse(tensor))])


HOLDERS = [adding, in_constant, in_branches, in_function, in_default, in_sparse, in_sparse_constant]


def written(made: onnx.ModelProto, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return path


def external_cnn(folder: Path, **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    made = small_cnn(("y = Softmax<axis=1>(z)",), **options)
    onnx.save(made, folder / "model.onnx", save_as_external_data=True, location=DATA, size_threshold=0)
    return folder / "model.onnx"


# -- where they are ---------------------------------------------------------------------------------------------------


def messages(message: Message):
    """Every tensor of a protobuf message, found by its fields."""
    if isinstance(message, TensorProto):
        yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for inner in [value] if isinstance(value, Message) else value:
                yield from messages(inner)


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


def test_saving_writes_nothing_outside_the_folder(tmp_path):
    """The weights lie inside the model's folder by a link, and the same words lead out of the new one's."""
    home, new = tmp_path / "home", tmp_path / "new"
    (home / "sub").mkdir(parents=True)
    new.mkdir()
    (new / "sub").symlink_to(tmp_path)
    values = drawn(4)
    (home / "sub" / "w.bin").write_bytes(values.tobytes())
    made = adding(external(values, location="sub/w.bin"))
    with pytest.raises(
        graphgbp.OutputError, match=f"belong in '{new}/sub/w.bin', and a link there leads out of '{new}'"
    ):
        graphgbp.save(made, new / "m.onnx", weights_from=home)
    assert not (tmp_path / "w.bin").exists()


@pytest.mark.parametrize("out", [DATA, "real.bin", "link.bin", f"linked/{DATA}"])
def test_the_new_file_never_takes_the_place_of_weights(tmp_path, source, converted, out):
    """Neither in the folder of the source nor where they would be copied to, by whatever name."""
    content = (source.parent / DATA).read_bytes()
    (source.parent / DATA).rename(source.parent / "real.bin")
    (source.parent / DATA).symlink_to("real.bin")
    (source.parent / "link.bin").symlink_to(DATA)
    (source.parent / "linked").symlink_to(source.parent)
    with pytest.raises(graphgbp.OutputError, match=r"is where weights of the model belong.*another name"):
        graphgbp.save(converted, source.parent / out)
    assert (source.parent / DATA).read_bytes() == content
    (tmp_path / "new").mkdir()
    with pytest.raises(graphgbp.OutputError, match="is where weights of the model belong"):
        graphgbp.save(converted, tmp_path / "new" / DATA, weights_from=source.parent)
    assert not list((tmp_path / "new").iterdir())
    (tmp_path / "hard.bin").hardlink_to(source.parent / "real.bin")
    with pytest.raises(graphgbp.OutputError, match="is where weights of the model belong"):
        graphgbp.save(converted, tmp_path / "hard.bin", weights_from=source.parent)


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


def test_onnx_runtimes_own_format_is_named(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    onnxruntime.InferenceSession(small_cnn().SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(ModelFileError, match=r"in ONNX Runtime's own format.*optimized_model_filepath"):
        graphgbp.inspect(tmp_path / "model.ort")


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


@pytest.fixture
def source(tmp_path) -> Path:
    return external_cnn(tmp_path / "home")


@pytest.fixture
def converted(source) -> onnx.ModelProto:
    return graphgbp.convert(source, ["saliency"])


def loads(path: Path) -> bool:
    return graphgbp.Explainer(path, device="cpu").explain(drawn(1, 3, 8, 8)).saliency.any()


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_weights_are_referenced_in_their_own_folder(source, converted, choice):
    before = (source.parent / DATA).stat()
    graphgbp.save(converted, source.with_name("out.onnx"), weights_from=source.parent, weights=choice)
    graphgbp.save(converted, source.with_name("out2.onnx"), weights=choice)
    assert sorted(os.listdir(source.parent)) == ["model.onnx", DATA, "out.onnx", "out2.onnx"]
    assert (source.parent / DATA).stat() == before
    assert loads(source.with_name("out.onnx")) and loads(source.with_name("out2.onnx"))


@pytest.mark.parametrize("choice", ["auto", "copy"])
def test_weights_are_copied_to_another_folder(tmp_path, source, converted, choice):
    new = tmp_path / "new"
    new.mkdir()
    graphgbp.save(converted, new / "out.onnx", weights_from=source.parent, weights=choice)
    assert (new / DATA).read_bytes() == (source.parent / DATA).read_bytes()
    shutil.rmtree(source.parent)
    assert loads(new / "out.onnx")


def test_what_cannot_be_had_is_refused(tmp_path, source, converted):
    """And ONNX Runtime does not load what is refused."""
    new = tmp_path / "new"
    new.mkdir()
    with pytest.raises(graphgbp.RequestError, match=r"needs the folder of the weights.*use weights='copy'"):
        graphgbp.save(converted, new / "out.onnx", weights_from=source.parent, weights="reference")
    with pytest.raises(graphgbp.RequestError, match=r"needs another folder.*use weights='reference'"):
        graphgbp.save(converted, source.with_name("out.onnx"), weights_from=source.parent, weights="copy")
    with pytest.raises(graphgbp.RequestError, match="choose 'auto', 'reference', 'copy'"):
        graphgbp.save(converted, new / "out.onnx", weights="link")
    with pytest.raises(MissingWeightsError, match=r"is not in.*pass weights_from="):
        graphgbp.save(converted, new / "out.onnx")
    assert not list(new.iterdir()) and not source.with_name("out.onnx").exists()
    for tensor in converted.graph.initializer:
        for entry in tensor.external_data:
            entry.value = f"../home/{DATA}" if entry.key == "location" else entry.value
    (new / "out.onnx").write_bytes(converted.SerializeToString())
    with pytest.raises(ModelFileError, match="leads out of its folder"):
        graphgbp.Explainer(new / "out.onnx", device="cpu")
    with pytest.raises(ModelFileError, match="escapes model directory"):
        graphgbp.runtime.Session(new / "out.onnx", device="cpu")


def test_another_file_of_that_name_is_never_overwritten(tmp_path, source, converted):
    new = tmp_path / "new"
    new.mkdir()
    content = bytearray((source.parent / DATA).read_bytes())
    (new / DATA).write_bytes(content)
    graphgbp.save(converted, new / "equal.onnx", weights_from=source.parent)
    content[7] ^= 1
    (new / DATA).write_bytes(content)
    with pytest.raises(graphgbp.OutputError, match="is there already and holds something else"):
        graphgbp.save(converted, new / "out.onnx", weights_from=source.parent)
    with pytest.raises(ModelFileError, match="does not hold the weights that the model was converted with"):
        graphgbp.save(converted, new / "out.onnx")
    assert (new / DATA).read_bytes() == content and not (new / "out.onnx").exists()
    (new / DATA).unlink()
    (new / DATA).mkdir()
    with pytest.raises(graphgbp.OutputError, match="is there already"):
        graphgbp.save(converted, new / "out.onnx", weights_from=source.parent)


def test_a_digest_is_remembered_for_a_file_that_stays(tmp_path, source, monkeypatch):
    old = (1_000_000_000, 1_000_000_000)
    os.utime(source.parent / DATA, ns=old)
    first = graphgbp.convert(source, ["saliency"])
    monkeypatch.setattr(model_file, "_digest", lambda *_: pytest.fail("read again"))
    os.utime(source, ns=old)
    graphgbp.save(first, source.with_name("out.onnx"))
    monkeypatch.undo()
    content = bytearray((source.parent / DATA).read_bytes())
    content[7] ^= 1
    (source.parent / DATA).write_bytes(content)
    assert graphgbp.vjp(source) != first
    with pytest.raises(ModelFileError, match="does not hold the weights"):
        graphgbp.save(first, source.with_name("out.onnx"))


@pytest.mark.parametrize(("whole", "times"), [(False, 1), (True, 2)])
def test_a_file_just_written_is_read_again_where_its_time_may_not_tell(source, monkeypatch, whole, times):
    """A file system that writes whole seconds may give two states of a file the same time."""
    (source.parent / DATA).write_bytes((source.parent / DATA).read_bytes())
    now = time.time_ns() - 200_000_000
    changed = now // 10**9 * 10**9 if whole else now | 1
    os.utime(source.parent / DATA, ns=(changed, changed))
    digest, read = model_file._digest, []
    monkeypatch.setattr(model_file, "_digest", lambda file, size: read.append(file.name) or digest(file, size))
    graphgbp.save(graphgbp.convert(source, ["saliency"]), source.with_name("out.onnx"))
    assert read.count(str(source.parent / DATA)) == times


def test_torchs_exporter_with_external_data(tmp_path):
    torch = pytest.importorskip("torch")
    pooled = (torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 5))
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), *pooled).eval()
    x = torch.from_numpy(drawn(2, 3, 8, 8)).requires_grad_()
    torch.onnx.export(net, (x.detach(),), tmp_path / "net.onnx", dynamo=True, external_data=True, verbose=False)
    graphgbp.save(graphgbp.convert(tmp_path / "net.onnx", ["saliency"]), tmp_path / "out.onnx")
    assert list(graphgbp.inspect(tmp_path / "out.onnx").weights["external"]) == ["net.onnx.data"]
    found = graphgbp.Explainer(tmp_path / "out.onnx", device="cpu").explain(x.detach().numpy(), 3).saliency
    net(x)[:, 3].sum().backward()
    np.testing.assert_allclose(found, x.grad.numpy(), atol=1e-6)


@pytest.mark.parametrize("pieces", [[], [(0, 10)], [(5_000_000, 3)], [(0, 2_500_000), (7_000_000, 1_000_000)]])
def test_the_digest_of_a_sparse_file_is_that_of_its_bytes(pieces, tmp_path):
    path = tmp_path / "weights.bin"
    with path.open("wb") as file:
        file.truncate(8_000_001)
        for place, count in pieces:
            file.seek(place)
            file.write(np.random.default_rng(place).bytes(count))
    assert model_file.fingerprint(path, [])["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
