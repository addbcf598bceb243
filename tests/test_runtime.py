"""Sessions: devices, guards, errors of ONNX Runtime, external data."""

import ctypes
import gc
import weakref

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.external_data_helper import convert_model_to_external_data

import graphgbp
from graphgbp import contract, runtime
from graphgbp.errors import DeviceError, GraphgbpError, ModelFileError, RequestError, TargetError
from graphgbp.runtime import Device, Session, cuda_obstacle, parse_device
from tests.build import drawn, model, small_cnn

SOFTMAX = ("y = Softmax<axis=1>(z)",)


@pytest.fixture(scope="module")
def converted() -> bytes:
    return graphgbp.convert(small_cnn(SOFTMAX), ["saliency", "gradcam"]).SerializeToString()


@pytest.fixture
def images() -> np.ndarray:
    return drawn(3, 3, 8, 8, seed=11)


def classes(*values: int) -> np.ndarray:
    return np.asarray(values, np.int64)


# -- one run ------------------------------------------------------------------------------------------------


def test_run_gives_what_plain_onnxruntime_gives(converted, images):
    session = Session(converted, device="cpu")
    answer = session.run({"x": images}, {"target": classes(0, -1, 4)})
    plain = onnxruntime.InferenceSession(converted, providers=["CPUExecutionProvider"])
    names = [value.name for value in plain.get_outputs()]
    expected = dict(zip(names, plain.run(None, {"x": images, "target": classes(0, -1, 4)}), strict=True))
    assert set(answer.outputs) == {"y"}
    assert {**answer.outputs, **answer.roles}.keys() == expected.keys()
    for name, value in {**answer.outputs, **answer.roles}.items():
        np.testing.assert_array_equal(value, expected[name])


def test_run_fetches_the_asked_roles_alone(converted, images):
    answer = Session(converted, device="cpu").run({"x": images}, {"target": classes(1)}, ["saliency"])
    assert set(answer.roles) == {"saliency"}


def test_roles_are_found_under_changed_names(images):
    tail = ("saliency = Identity(z)", "target = Relu(z)", "y = Softmax<axis=1>(z)")
    source = small_cnn(tail)
    source.graph.output.extend(onnx.helper.make_tensor_value_info(n, 1, ["N", 5]) for n in ("saliency", "target"))
    session = Session(graphgbp.convert(source, ["saliency"]).SerializeToString(), device="cpu")
    answer = session.run({"x": images}, {"target": classes(2)})
    assert set(answer.outputs) == {"y", "saliency", "target"}
    assert answer.outputs["saliency"].shape == (3, 5)
    assert answer.roles["saliency"].shape == images.shape


def test_an_optional_target_is_fed_all_the_same(images):
    source = small_cnn(SOFTMAX)
    optional = Session(graphgbp.convert(source, ["saliency"], target="optional").SerializeToString(), device="cpu")
    required = Session(graphgbp.convert(source, ["saliency"]).SerializeToString(), device="cpu")
    target = classes(3, 0, 1)
    got, expected = (session.run({"x": images}, {"target": target}).roles for session in (optional, required))
    np.testing.assert_array_equal(got["target_class"], target)
    np.testing.assert_array_equal(got["saliency"], expected["saliency"])


def test_a_path_with_external_data(tmp_path, images):
    source = small_cnn(SOFTMAX)
    expected = Session(graphgbp.convert(source, ["saliency"]).SerializeToString(), device="cpu")
    convert_model_to_external_data(source, location="weights.bin", size_threshold=0)
    onnx.save(source, tmp_path / "model.onnx")
    converted = graphgbp.convert(tmp_path / "model.onnx", ["saliency"])
    graphgbp.save(converted, tmp_path / "explained.onnx")
    whole = expected.run({"x": images}, {"target": classes(1)}).roles["saliency"]
    from_path = Session(tmp_path / "explained.onnx", device="cpu")
    from_bytes = Session(converted.SerializeToString(), weights_folder=tmp_path, device="cpu")
    for session in (from_path, from_bytes):
        np.testing.assert_array_equal(session.run({"x": images}, {"target": classes(1)}).roles["saliency"], whole)


def test_a_session_is_freed(converted):
    session = Session(converted, device="cpu")
    inner = weakref.ref(session._session)
    del session
    gc.collect()
    assert inner() is None


# -- what goes wrong ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", [classes(-2), classes(5), classes(0, 0, 5), classes(0, 1), classes(0, 1, 2, 3), classes()]
)
@pytest.mark.parametrize("mode", ["required", "optional"])
def test_a_target_that_does_not_fit_fails_in_plain_onnxruntime(images, target, mode):
    content = graphgbp.convert(small_cnn(SOFTMAX), ["saliency"], target=mode).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    plain = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="graphgbp/target/class_out_of_range"):
        plain.run(None, {"x": images, "target": target})
    with pytest.raises(TargetError, match="one class per image"):
        Session(content, device="cpu").run({"x": images}, {"target": target})


def test_a_failing_run_gives_onnxruntimes_words_in_one_line(converted):
    with pytest.raises(GraphgbpError, match=r"could not run the model: Got invalid dimensions.*Expected: 3") as caught:
        Session(converted, device="cpu").run({"x": drawn(1, 2, 8, 8)}, {"target": classes(0)})
    assert "\n" not in str(caught.value)


def test_a_run_says_nothing_on_stderr(converted, images, capfd):
    with pytest.raises(TargetError):
        Session(converted, device="cpu").run({"x": images}, {"target": classes(9)})
    assert capfd.readouterr() == ("", "")


def test_out_of_memory_advises_a_smaller_batch():
    words = "Error in execution: Non-zero status code ... Failed to allocate memory for requested buffer of size 9"
    assert "smaller batch_size" in str(runtime._run_error(RuntimeError(words)))


@pytest.mark.parametrize("content", [b"", b"junk"])
def test_bytes_that_are_no_model(content):
    with pytest.raises(ModelFileError, match="cannot load the model on cpu"):
        Session(content, device="cpu")


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelFileError, match=r"cannot load '.*nowhere\.onnx'"):
        Session(tmp_path / "nowhere.onnx", device="cpu")


def test_a_plain_model_is_refused():
    with pytest.raises(ModelFileError, match="not converted"):
        Session(small_cnn().SerializeToString(), device="cpu")


def test_a_vjp_is_refused():
    source = model(["y = Relu(x)"], {"x": [2, 3]}, ["y"])
    with pytest.raises(ModelFileError, match="vjp graph"):
        Session(graphgbp.vjp(source).SerializeToString(), device="cpu")


def test_a_manifest_of_another_version_is_refused(converted):
    proto = onnx.ModelProto.FromString(converted)
    (entry,) = [entry for entry in proto.metadata_props if entry.key == "graphgbp.manifest"]
    entry.value = entry.value.replace('"manifest_version": 1', '"manifest_version": 99')
    with pytest.raises(ModelFileError, match="manifest"):
        Session(proto.SerializeToString(), device="cpu")


def test_other_inputs_are_fed_by_name():
    nodes = ["y = Conv(a, w)", "o = GlobalAveragePool(y)", "p = Add(o, b)"]
    source = model(nodes, {"a": ["N", 3, 8, 8], "b": [1]}, ["p"], {"w": drawn(4, 3, 3, 3)})
    session = Session(graphgbp.convert(source, ["saliency"], inputs="a").SerializeToString(), device="cpu")
    assert list(session.inputs) == ["a", "b"] and session.inputs["b"].dtype == np.float32
    a, b = drawn(2, 3, 8, 8), np.ones(1, np.float32)
    low, high = (session.run({"a": a, "b": b * f}, {"target": classes(1)}).roles["target_score"] for f in (0, 1))
    np.testing.assert_allclose(high - low, 1, atol=1e-5)


@pytest.mark.parametrize("threads", [0, -1, 1.5, True])
def test_threads_must_be_a_number(converted, threads):
    with pytest.raises(RequestError, match="threads"):
        Session(converted, device="cpu", threads=threads)


def test_threads_do_not_change_the_maps(converted, images):
    one, two = (
        Session(converted, device="cpu", threads=n).run({"x": images}, {"target": classes(1)}).roles for n in (1, 2)
    )
    np.testing.assert_allclose(one["saliency"], two["saliency"], atol=1e-6)


# -- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("auto", None),
        ("cpu", Device("cpu")),
        ("cuda", Device("cuda", 0)),
        ("cuda:0", Device("cuda", 0)),
        ("cuda:12", Device("cuda", 12)),
    ],
)
def test_parse_device(text, device):
    assert parse_device(text) == device


@pytest.mark.parametrize(
    "text", ["", "gpu", "CUDA", "cuda:", "cuda:-1", "cuda:x", "cpu:0", "cuda:1 ", "cuda:1\n", None, 0]
)
def test_an_unknown_device_is_refused(text):
    with pytest.raises(DeviceError, match="choose 'auto', 'cpu', 'cuda'"):
        parse_device(text)


class FakeDriver:
    """NVIDIA's driver library, with so many devices."""

    def __init__(self, devices: int, error: int = 0) -> None:
        self.devices, self.error = devices, error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGetCount(self, count: object) -> int:
        count._obj.value = self.devices
        return 0


def machine(monkeypatch, *, driver=None, missing=None, providers=("CUDAExecutionProvider", "CPUExecutionProvider")):
    """A machine with this driver, on which ONNX Runtime's CUDA provider lacks library `missing`."""

    def load(name, *args, **kwargs):
        if "providers_cuda" in name and missing is None:
            return object()
        if "libcuda.so" in name and driver is not None:
            return driver
        raise OSError(f"{missing or name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(providers))
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: print("Failed to load libcublas.so"), raising=False)
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", load)


@pytest.mark.parametrize(
    ("described", "index", "words"),
    [
        ({"providers": ["CPUExecutionProvider"]}, 0, r"built without CUDA; .*pip install 'graphgbp\[cuda\]'"),
        ({}, 0, r"no NVIDIA driver \(libcuda\.so\.1\)"),
        ({"driver": FakeDriver(0, error=100)}, 0, "no usable GPU .CUDA error 100"),
        ({"driver": FakeDriver(1)}, 1, "no CUDA device 1: the driver shows 1"),
        (
            {"driver": FakeDriver(2), "missing": "libx.so.9"},
            1,
            r"libx\.so\.9 is not found; pip install 'graphgbp\[cuda\]'",
        ),
    ],
)
def test_cuda_says_what_is_missing(monkeypatch, converted, images, capfd, described, index, words):
    machine(monkeypatch, **described)
    with pytest.raises(DeviceError, match=f"'cuda:{index}' cannot be used: .*{words}"):
        Session(converted, device=f"cuda:{index}")
    if index == 0:
        session = Session(converted, device="auto")
        assert session.device == "cpu"
        assert session.device_note.startswith("CUDA is not used: ")
        assert session.run({"x": images}, {"target": classes(0)}).roles["saliency"].any()
    assert capfd.readouterr() == ("", "")


def test_a_cuda_provider_that_does_not_start_is_no_silent_cpu_run(monkeypatch, converted):
    machine(monkeypatch, driver=FakeDriver(1))
    assert cuda_obstacle() is None
    asked = {}

    def start(content, options, providers, **kwargs):
        asked.update(providers=providers, **kwargs)
        return original(content, options, providers=["CPUExecutionProvider"])

    original = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    with pytest.raises(DeviceError, match="could not start its CUDA provider"):
        Session(converted, device="cuda")
    assert asked["providers"][0] == ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "0"})
    assert asked["enable_fallback"] == 0
    with pytest.raises(DeviceError):
        Session(converted, device="cuda", tf32=True)
    assert asked["providers"][0][1]["use_tf32"] == "1"
    session = Session(converted, device="auto")
    assert session.device == "cpu"
    assert "could not start" in session.device_note


def test_auto_where_cuda_fails_to_load_the_model(monkeypatch, converted):
    machine(monkeypatch, driver=FakeDriver(1))
    original = onnxruntime.InferenceSession

    def start(content, options, providers, **kwargs):
        if len(providers) > 1:
            raise RuntimeError("CUDA failure 2: out of memory")
        return original(content, options, providers=providers)

    monkeypatch.setattr(onnxruntime, "InferenceSession", start)
    with pytest.raises(GraphgbpError, match="on cuda:0: CUDA failure 2"):
        Session(converted, device="cuda")
    session = Session(converted, device="auto")
    assert session.device == "cpu" and "out of memory" in session.device_note


def test_the_cpu_needs_no_note(converted):
    session = Session(converted, device="cpu")
    assert (session.device, session.device_note) == ("cpu", None)


# -- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["required", "weights"])
def test_cuda_gives_the_cpus_maps(mode):
    content = graphgbp.convert(small_cnn(SOFTMAX), contract.METHODS, target=mode).SerializeToString()
    images = drawn(3, 3, 8, 8, seed=11)
    target = classes(0, -1, 4) if mode == "required" else drawn(3, 5, seed=12)
    cuda, cpu = Session(content, device="cuda"), Session(content, device="cpu")
    assert cuda.device == "cuda:0"
    (role,) = cpu.targets
    got, expected = (session.run({"x": images}, {role: target}) for session in (cuda, cpu))
    assert got.roles.keys() == expected.roles.keys()
    for name, value in {**expected.outputs, **expected.roles}.items():
        other = {**got.outputs, **got.roles}[name]
        assert np.abs(other - value).max() <= 1e-4 * max(np.abs(value).max(), 1e-6), name


@pytest.mark.cuda
@pytest.mark.parametrize("target", [classes(-2), classes(5), classes(0, 0, 5), classes(0, 1), classes()])
def test_a_target_that_does_not_fit_fails_on_cuda(converted, images, target):
    with pytest.raises(TargetError):
        Session(converted, device="cuda").run({"x": images}, {"target": target})


@pytest.mark.cuda
def test_auto_takes_cuda_where_it_can(converted):
    session = Session(converted)
    assert (session.device, session.device_note) == ("cuda:0", None)


@pytest.mark.cuda
def test_a_cuda_device_that_is_not_there(converted):
    with pytest.raises(DeviceError, match="no CUDA device 99"):
        Session(converted, device="cuda:99")
