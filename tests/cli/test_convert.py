import errno
import json
import os
import sys

import onnx
import pytest

import graphgbp
from graphgbp.cli import request
from graphgbp.heads import INTERPOLATE_MODES
from graphgbp.model_file import WEIGHTS, read_manifest
from graphgbp.options import RECTIFIERS, TARGETS
from graphgbp.score import SCORES
from tests.cli.conftest import refused


def test_writes_what_convert_makes(run, folder):
    result = run("convert", "model.onnx", "-o", "out.onnx")
    assert result.exit_code == 0 and result.stderr == ""
    for words in ("wrote", "out.onnx", "guided_gradcam", "2 masked by the guided rule", "layer"):
        assert words in result.stdout
    assert (folder / "out.onnx").read_bytes() == graphgbp.convert("model.onnx").SerializeToString(deterministic=True)


def test_every_option_reaches_convert(run, folder):
    arguments = ["--methods", "gradcam,saliency", "--methods", "deconvnet", "--layer", "r1", "--score", "probability"]
    arguments += ["--target", "optional", "--rectifiers", "all", "--interpolate-mode", "nearest"]
    arguments += ["--no-relu-attributions", "--input-name", "x", "--output-name", "y", "--class-axis", "-1"]
    assert run("convert", "model.onnx", "-o", "out.onnx", *arguments).exit_code == 0
    expected = graphgbp.convert(
        "model.onnx",
        ["gradcam", "saliency", "deconvnet"],
        target_layer="r1",
        score="probability",
        target="optional",
        rectifiers="all",
        interpolate_mode="nearest",
        relu_attributions=False,
        inputs="x",
        output="y",
        class_axis=-1,
    )
    assert (folder / "out.onnx").read_bytes() == expected.SerializeToString(deterministic=True)


def test_the_choices_are_the_librarys():
    command = sys.modules["graphgbp.cli.convert"]
    offered = (request.SCORES, request.TARGETS, command.RECTIFIERS, command.INTERPOLATE_MODES, command.WEIGHTS)
    assert offered == (SCORES, TARGETS, RECTIFIERS, tuple(INTERPOLATE_MODES), WEIGHTS)


def test_json_is_one_document(run, folder):
    result = run("convert", "model.onnx", "-o", "out.onnx", "--json")
    document = json.loads(result.stdout)
    assert document["out"] == "out.onnx" and document["out_bytes"] == (folder / "out.onnx").stat().st_size
    manifest = read_manifest(onnx.load(folder / "out.onnx"))
    assert document["manifest"]["source"] == manifest.source and result.stderr == ""


def test_an_existing_output_needs_force(run, folder):
    (folder / "out.onnx").write_text("precious")
    refused(run("convert", "model.onnx", "-o", "out.onnx"), 8, "'out.onnx' already exists", "--force")
    assert (folder / "out.onnx").read_text() == "precious"
    assert run("convert", "model.onnx", "-o", "out.onnx", "--force").exit_code == 0
    assert read_manifest(onnx.load(folder / "out.onnx")) is not None


def test_places_that_cannot_be_written(run, folder):
    before = (folder / "model.onnx").read_bytes()
    refused(run("convert", "model.onnx", "-o", "model.onnx", "--force"), 8, "is the model itself")
    assert (folder / "model.onnx").read_bytes() == before
    refused(run("convert", "model.onnx", "-o", "."), 8, "is a folder")
    refused(run("convert", "model.onnx", "-o", "none/out.onnx"), 8, "no folder 'none'")


def test_a_full_disk_leaves_nothing(run, folder, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = set(folder.iterdir())
    monkeypatch.setattr("os.replace", full)
    refused(run("convert", "model.onnx", "-o", "out.onnx"), 8, "out.onnx", "No space left on device")
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["missing.onnx"], 3, ["missing.onnx"]),
        (["photo.png"], 3, ["photo.png", "not an ONNX file"]),
        (["cut.onnx"], 3, ["cut.onnx"]),
        (["model.onnx", "--layer", "r3"], 5, ["r3"]),
        (["model.onnx", "--methods", "gradcam,smoothgrad"], 5, ["'smoothgrad'", "guided_backprop"]),
        (["model.onnx", "--input-name", "photo"], 5, ["photo"]),
    ],
)
def test_refused_with_one_line(run, folder, arguments, code, words):
    (folder / "cut.onnx").write_bytes((folder / "model.onnx").read_bytes()[:-100])
    refused(run("convert", *arguments, "-o", "out.onnx"), code, *words)
    assert not (folder / "out.onnx").exists()


def test_a_converted_file_is_refused(run, folder):
    run("convert", "model.onnx", "-o", "out.onnx")
    refused(run("convert", "out.onnx", "-o", "again.onnx"), 3, "out.onnx", "already converted")


@pytest.fixture
def external(folder):
    """The model with its weights in a file beside it."""
    made = onnx.load("model.onnx")
    onnx.save(made, "model.onnx", save_as_external_data=True, location="model.data", size_threshold=0)
    (folder / "there").mkdir()
    return (folder / "model.data").read_bytes()


def test_external_weights_are_read_where_they_lie_or_copied(run, folder, external):
    result = run("convert", "model.onnx", "-o", "out.onnx")
    assert "in model.data, read where they lie" in result.stdout
    document = json.loads(run("convert", "model.onnx", "-o", "there/out.onnx", "--json").stdout)
    assert document["weights"] == {"files": {"model.data": len(external)}, "copied": True}
    assert (folder / "there" / "model.data").read_bytes() == external
    result = run("convert", "model.onnx", "-o", "there/out.onnx", "--force", "--weights", "copy")
    assert "in model.data, copied beside it" in result.stdout
    assert run("verify", "there/out.onnx", "--source", "model.onnx").exit_code == 0
    refused(run("convert", "model.onnx", "-o", "there/o.onnx", "--weights", "reference"), 5, "write to that folder")
    refused(run("convert", "model.onnx", "-o", "o.onnx", "--weights", "copy"), 5, "write to another folder")
    (folder / "there" / "model.data").write_bytes(external[::-1])
    refused(run("convert", "model.onnx", "-o", "there/o.onnx"), 8, "holds something else")


def test_the_output_never_takes_the_place_of_weights(run, folder, external):
    for out in ("model.data", "there/model.data"):
        refused(run("convert", "model.onnx", "-o", out, "--force"), 8, f"'{out}' is where weights of the model belong")
    assert (folder / "model.data").read_bytes() == external and not list((folder / "there").iterdir())


@pytest.mark.parametrize("location", ["sub/model.data", "sub/../model.data"])
def test_external_weights_in_a_folder_below(run, folder, external, location):
    (folder / "sub").mkdir()
    (folder / "model.data").rename(folder / location)
    made = onnx.load("model.onnx", load_external_data=False)
    for tensor in made.graph.initializer:
        for entry in tensor.external_data:
            entry.value = location if entry.key == "location" else entry.value
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    for out, copied in (("out.onnx", False), ("there/out.onnx", True)):
        document = json.loads(run("convert", "model.onnx", "-o", out, "--json").stdout)
        assert document["weights"] == {"files": {location: len(external)}, "copied": copied}
        assert run("verify", out, "--source", "model.onnx").exit_code == 0


def test_weights_in_the_model_itself_come_along(run, folder):
    (folder / "there").mkdir()
    for choice in ("reference", "copy", "auto"):
        result = run("convert", "model.onnx", "-o", f"there/{choice}.onnx", "--weights", choice, "--json")
        assert json.loads(result.stdout)["weights"] == {"files": {}, "copied": False}
