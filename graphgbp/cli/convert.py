"""graphgbp convert: write the explained model."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from graphgbp.cli import console, request
from graphgbp.errors import OutputError

RECTIFIERS = ("relu", "all")
AGGREGATES = ("mean",)
INTERPOLATE_MODES = ("bilinear", "nearest")
WEIGHTS = ("auto", "reference", "copy")


@click.command(no_args_is_help=True, short_help="Write the explained model.")
@click.argument("model")
@click.option("-o", "--out", required=True, metavar="OUT", help="The file to write, such as MODEL.explained.onnx.")
@console.methods_option
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="NAME",
    help="Where Grad-CAM is taken: a tensor, a node, or auto; may be repeated.  [default: auto]",
)
@click.option("--aggregate", type=click.Choice(AGGREGATES), help="Make one Grad-CAM of several layers.")
@request.options
@click.option("--rectifiers", type=click.Choice(RECTIFIERS), default="relu", help="What the guided rule masks.")
@click.option(
    "--interpolate-mode", type=click.Choice(INTERPOLATE_MODES), default="bilinear", help="How Grad-CAM is resized."
)
@click.option("--no-relu-attributions", is_flag=True, help="Leave Grad-CAM signed.")
@click.option(
    "--weights",
    type=click.Choice(WEIGHTS),
    default="auto",
    help="What becomes of weights in external files: read where they lie (reference; OUT must be in MODEL's folder) or "
    "copied beside OUT (copy).  [default: auto: the first where OUT is in MODEL's folder, else the second]",
)
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def convert(model: str, out: str, methods: tuple[str, ...], force: bool, as_json: bool, **options: Any) -> None:
    """Append the explanation to MODEL and write it to OUT: one ONNX file that any ONNX Runtime runs."""
    import graphgbp
    from graphgbp.model_file import read_manifest
    from graphgbp.weights import external_locations

    _require_writable(Path(model), Path(out), force)
    given: dict[str, Any] = {"methods": methods} if methods else {}
    with console.progress(f"converting {model}"):
        converted = graphgbp.convert(
            model,
            **given,
            target_layer=options["layers"] or None,
            aggregate=options["aggregate"],
            rectifiers=options["rectifiers"],
            interpolate_mode=options["interpolate_mode"],
            relu_attributions=not options["no_relu_attributions"],
            **request.given(options),
        )
        graphgbp.save(converted, out, weights_from=Path(model).parent, weights=options["weights"])
    manifest = read_manifest(converted)
    assert manifest is not None
    facts = asdict(manifest)
    sizes = {"model_bytes": Path(model).stat().st_size, "out_bytes": Path(out).stat().st_size}
    folder = Path(out).parent
    files = {location: (folder / location).stat().st_size for location in external_locations(converted)}
    copied = bool(files) and not folder.samefile(Path(model).parent)
    weights = {"files": files, "copied": copied}
    if as_json:
        console.print_json({"model": model, "out": out, **sizes, "weights": weights, "manifest": facts})
    else:
        console.print_facts(list(_summary(facts, out, weights, **sizes)))


def _summary(
    manifest: dict[str, Any], out: str, weights: dict[str, Any], model_bytes: int, out_bytes: int
) -> Iterator[tuple[str, str]]:
    growth = 100 * (out_bytes - model_bytes) / (model_bytes + sum(weights["files"].values()))
    yield "wrote", f"{out}, {console.spell_bytes(out_bytes)} ({growth:+.1f} %)"
    for location, count in weights["files"].items():
        kept = "copied beside it" if weights["copied"] else "read where they lie"
        yield "weights", f"{console.spell_bytes(count)} in {location}, {kept}"
    yield "explains", f"{manifest['score']['tensor']}: {manifest['score']['reason']}"
    yield "methods", ", ".join(manifest["methods"])
    for layer in manifest["target_layers"]:
        yield "layer", f"{layer['tensor']}: {layer['reason']}"
    yield "rectifiers", f"{len(manifest['rectifiers'])} masked by the guided rule"
    if manifest["passed_through"]:
        yield "activations", f"{len(manifest['passed_through'])} smooth or leaky, passed through with their derivative"
    if manifest["opset"]:
        yield "opset", f"raised from {manifest['opset']['source']} to {manifest['opset']['raised_to']}"
    if manifest["surrogates"]:
        yield "surrogates", f"{len(manifest['surrogates'])} quantisers that the gradient goes straight through"


def _require_writable(model: Path, out: Path, force: bool) -> None:
    if out.is_dir():
        raise OutputError(f"'{out}' is a folder; name a file in it")
    if not out.parent.is_dir():
        raise OutputError(f"there is no folder '{out.parent}'; make it first")
    if out.exists() and model.exists() and out.samefile(model):
        raise OutputError(f"'{out}' is the model itself; write to another file")
    if out.exists() and not force:
        raise OutputError(f"'{out}' already exists; choose another file, or replace it with --force")
