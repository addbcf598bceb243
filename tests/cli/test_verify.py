import json

import onnx
import pytest

import graphgbp
from tests.cli.conftest import refused
from tests.verification.networks import behind


@pytest.fixture
def out(folder):
    graphgbp.save(graphgbp.convert("model.onnx"), folder / "out.onnx")
    return folder / "out.onnx"


def test_a_good_file(run, out):
    result = run("verify", "out.onnx")
    assert result.exit_code == 0 and result.stderr == ""
    checks = graphgbp.verify("out.onnx").checks
    assert f"{len(checks)} of {len(checks)} checks passed" in result.stdout and "model.onnx" in result.stdout
    for check in checks:
        assert check.detail in result.stdout


def test_a_damaged_file(run, out, folder):
    made = onnx.load(out)
    behind(made, "gradcam_gradients", "Mul", 1.05)
    onnx.save(made, folder / "bad.onnx")
    result = run("verify", "bad.onnx", "--source", "model.onnx")
    assert result.exit_code == 9 and "error: bad.onnx does not pass: layer gradient" in result.stderr
    assert any(line.split()[:1] == ["fail"] for line in result.stdout.splitlines())


def test_json(run, out):
    document = json.loads(run("verify", "out.onnx", "--json").stdout)
    assert document["passed"] and document["source"] == "model.onnx"
    assert {check["status"] for check in document["checks"]} == {"pass"}


def test_what_is_not_checked_is_said(run, folder):
    from tests.build import small_cnn

    (folder / "alone").mkdir()
    graphgbp.save(graphgbp.convert(small_cnn(opset=12)), folder / "alone" / "out.onnx")
    result = run("verify", "alone/out.onnx")
    assert result.exit_code == 0 and "3 not checked: it is not proven" in result.stdout


def test_mistakes_are_refused(run, out):
    refused(run("verify", "model.onnx"), 3, "not converted")
    refused(run("verify", "out.onnx", "--source", "out.onnx"), 3, "already converted")
    refused(run("verify", "none.onnx", "--json"), 3, "none.onnx")
