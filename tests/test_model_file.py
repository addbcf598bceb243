"""What is written with a model whose weights are in other files: those files, and their digests."""

import hashlib
import os
import shutil
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

import graphgbp
from graphgbp import MissingWeightsError, ModelFileError, digests, model_file
from tests.build import drawn, small_cnn
from tests.external_data import (
    DATA,
    adding,
    external,
    external_cnn,
)


@pytest.fixture
def source(tmp_path) -> Path:
    return external_cnn(tmp_path / "home")


@pytest.fixture
def converted(source) -> onnx.ModelProto:
    return graphgbp.convert(source, ["saliency"])


def loads(path: Path) -> bool:
    return graphgbp.Explainer(path, device="cpu").explain(drawn(1, 3, 8, 8)).saliency.any()


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


def test_onnx_runtimes_own_format_is_named(tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    onnxruntime.InferenceSession(small_cnn().SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(ModelFileError, match=r"in ONNX Runtime's own format.*optimized_model_filepath"):
        graphgbp.inspect(tmp_path / "model.ort")


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
    monkeypatch.setattr(digests, "_digest", lambda *_: pytest.fail("read again"))
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
    digest, read = digests._digest, []
    monkeypatch.setattr(digests, "_digest", lambda file, size: read.append(file.name) or digest(file, size))
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


def test_the_digest_of_a_model_is_that_of_its_file(tmp_path):
    """Weights in every form that protobuf has for them, some of them empty, and fields before and behind the graph."""
    made = small_cnn()
    made.metadata_props.add(key="author", value="somebody")
    made.graph.doc_string = "behind the weights"
    made.graph.initializer.append(onnx.helper.make_tensor("spelled out", onnx.TensorProto.FLOAT, [2], [1.0, 2.0]))
    made.graph.initializer.append(onnx.helper.make_tensor("empty", onnx.TensorProto.INT64, [0], b"", raw=True))
    made.graph.initializer[0].doc_string = "behind the values"
    made.functions.add(name="unused", domain="own")
    for model in (made, onnx.ModelProto(), onnx.ModelProto.FromString(b"\xc2\x3e\x03new" + made.SerializeToString())):
        content = model.SerializeToString(deterministic=True)
        assert digests.of_model(model) == hashlib.sha256(content).hexdigest()


def test_the_digest_of_a_model_copies_no_more_than_a_weight_at_a_time():
    made = small_cnn()
    weights = [len(tensor.raw_data) for tensor in made.graph.initializer]
    made.graph.initializer.add(name="large", dims=[2 * sum(weights)], data_type=2, raw_data=bytes(2 * sum(weights)))
    pieces = [len(piece) for piece in digests._serialized(made)]
    assert sum(pieces) == made.ByteSize() and max(pieces) == 2 * sum(weights)
