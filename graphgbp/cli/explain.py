"""graphgbp explain: pictures, arrays, a table on the terminal."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from graphgbp.cli import console
from graphgbp.cli.classes import find_class
from graphgbp.errors import RequestError

if TYPE_CHECKING:
    import numpy as np

    from graphgbp.explainer import Explainer, Result
    from graphgbp.picture import Album, Page
    from graphgbp.recipe import ImageInput, Recipe

STYLES = ("auto", "colour", "absolute", "positive", "negative", "all")
PRESETS = ("imagenet", "unit", "symmetric", "caffe", "pixels")

_FILES = {"both": "panel", "panels": "panel", "arrays": "arrays"}
_PHOTOS_SHOWN = 100


@click.command(no_args_is_help=True, short_help="Run it on photos: pictures, arrays, a table.")
@click.argument("model")
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option("-o", "--out", required=True, metavar="DIR", help="The folder to write to.")
@click.option(
    "--class", "wanted", metavar="CLASS", help="Explain this class, an index or a name.  [default: predicted]"
)
@click.option("--top", type=click.IntRange(1), metavar="K", help="Explain the K highest classes of each image.")
@console.methods_option
@click.option(
    "--layer",
    "layers",
    multiple=True,
    metavar="NAME",
    help="Where Grad-CAM is taken: a tensor, a node, or auto; may be repeated.",
)
@click.option("--output-name", metavar="NAME", help="The output to explain, where `inspect` names another.")
@click.option(
    "--preprocess",
    metavar="RECIPE",
    help=f"A recipe file, or {', '.join(PRESETS)}.  [default: MODEL's .recipe.json]",
)
@click.option("--classes", "classes_file", metavar="FILE", help="Class names, one per line.  [default: the recipe's]")
@click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    metavar="N",
    help="How many images run at once.  [default: 4 on the CPU, 8 on CUDA]",
)
@click.option("--threads", type=click.IntRange(1), metavar="N", help="How many CPU threads the model takes.")
@click.option("--write", type=click.Choice(tuple(_FILES)), default="both", show_default=True, help="Of each image.")
@click.option("--style", type=click.Choice(STYLES), default="auto", show_default=True, help="Of the guided maps.")
@click.option("--force", is_flag=True, help="Replace what is in DIR.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def explain(model: str, images: tuple[str, ...], out: str, as_json: bool, **options: Any) -> None:
    """Show where MODEL looks in photos (files, or folders of them): panels, arrays and an index in DIR."""
    from graphgbp import picture
    from graphgbp.cli.photos import find_photos, unique_names

    if options["wanted"] is not None and options["top"] is not None:
        raise click.UsageError("--class and --top exclude each other")
    photos = find_photos(images)
    names = unique_names(photos)
    top = options["top"]
    planned = names if top is None else [f"{name}-top{rank + 1}" for name in names for rank in range(top)]
    picture.require_place(out, planned, options["force"], consent="--force")
    job = _prepare(model, options)
    album = picture.Album(
        out,
        planned,
        class_names=job.class_names,
        style=options["style"],
        channels=job.recipe.channels,
        force=options["force"],
        panels=options["write"] != "arrays",
        arrays=options["write"] != "panels",
    )
    _explain_all(job, album, photos, names)
    index = album.finish()
    if as_json:
        console.print_json(_document(job, album, index))
    else:
        _print_summary(job, album, index)


@dataclass(frozen=True)
class Job:
    """What is run on every photo, and what it writes into."""

    explainer: "Explainer"
    spec: "ImageInput"
    recipe: "Recipe"
    preprocessing: str
    class_names: list[str] | None
    target: int | None
    top: int | None
    write: str


def _prepare(model: str, options: dict[str, Any]) -> Job:
    from graphgbp.explainer import Explainer
    from graphgbp.recipe import ImageInput

    asked = {"target_layer": options["layers"] or None, "output": options["output_name"]}
    with console.progress(f"converting {model}"):
        explainer = Explainer(
            model,
            options["methods"] or None,
            device=options["device"],
            batch_size=options["batch_size"],
            threads=options["threads"],
            **{key: value for key, value in asked.items() if value is not None},
        )
    spec = ImageInput.of(explainer.input)
    recipe, preprocessing = _recipe(model, options["preprocess"], spec)
    class_names = _class_names(model, options["classes_file"], recipe, explainer.classes)
    target = None if options["wanted"] is None else find_class(options["wanted"], class_names)
    top = options["top"]
    if top is not None and explainer.classes is not None and top > explainer.classes:
        raise RequestError(f"--top {top} asks for more classes than the model has: {explainer.classes}")
    return Job(explainer, spec, recipe, preprocessing, class_names, target, top, options["write"])


def _class_names(model: str, file: str | None, recipe: "Recipe", classes: int | None) -> list[str] | None:
    """From the file given, else from the recipe, else, under a preset, from the recipe beside the model."""
    from graphgbp.recipe import Recipe, read_class_names, recipe_beside

    beside = None if recipe.class_names else recipe_beside(model)
    path = file or recipe.class_names or (Recipe.load(beside).class_names if beside else None)
    names = read_class_names(path) if path else None
    if names and classes not in (None, len(names)):
        raise RequestError(f"'{path}' names {len(names)} classes, and the model has {classes}")
    return names


def _recipe(model: str, asked: str | None, spec: "ImageInput") -> tuple["Recipe", str]:
    """The recipe, and where it comes from."""
    from graphgbp.recipe import Recipe, preset, recipe_beside, usual_preset

    if asked in PRESETS:
        return preset(asked, spec), asked
    path = Path(asked) if asked else recipe_beside(model)
    if path is None:
        usual, is_guess = usual_preset(spec)
        if is_guess:
            console.say(
                "warning",
                f"nothing says how photos become the input of '{model}': taken as '{usual}', values from 0 to 1, which "
                f"may be wrong; choose --preprocess {'|'.join(PRESETS)}, or give a recipe file",
            )
        return preset(usual, spec), usual
    if not path.is_file():
        raise RequestError(f"no recipe file '{path}' and no preset of that name; the presets are {', '.join(PRESETS)}")
    return Recipe.load(path), str(path)


def _explain_all(job: Job, album: "Album", photos: Sequence[Path], names: Sequence[str]) -> None:
    """Photos are read ahead and files written behind, in background threads; the model runs in this one."""
    from graphgbp.ahead import ahead

    ranks = job.top or 1
    pages = _pages(job, album, photos, names)
    with (
        console.progress("explaining", len(photos), "images") as advance,
        closing(ahead(album.write, pages, limit=ranks * job.explainer.batch_size)) as written,
    ):
        for count, _ in enumerate(written, start=1):
            advance(int(count % ranks == 0))


def _pages(job: Job, album: "Album", photos: Sequence[Path], names: Sequence[str]) -> Iterator["Page"]:
    start = 0
    for images, seen in job.recipe.batches(photos, job.explainer.input, job.explainer.batch_size):
        part = slice(start, start + len(images))
        results = _ranked(job, images) if job.top else [job.explainer.explain(images, job.target)]
        for rank, result in enumerate(results, start=1):
            files = [f"{name}-top{rank}" for name in names[part]] if job.top else names[part]
            yield from album.pages(result, files, seen, [str(photo) for photo in photos[part]])
        start = part.stop


def _ranked(job: Job, images: "np.ndarray") -> Iterator["Result"]:
    """The explanation of each image's highest class, its second, ..."""
    assert job.top is not None
    first = job.explainer.explain(images)
    ranking = [[entry.class_index for entry in row] for row in first.top(job.top)]
    for rank in range(job.top):
        classes = [row[rank] for row in ranking]
        yield first if classes == first.target_class.tolist() else job.explainer.explain(images, classes)


def _document(job: Job, album: "Album", index: Path) -> dict[str, Any]:
    return {
        "index": str(index),
        "device": job.explainer.device,
        "device_note": job.explainer.device_note,
        "preprocessing": job.preprocessing,
        **album.describe(),
    }


def _print_summary(job: Job, album: "Album", index: Path) -> None:
    entries = album.describe(_PHOTOS_SHOWN * (job.top or 1))["images"]
    kinds = {key for entry in entries for row in entry["top"] for key in row if key in ("probability", "score")}
    table = console.table("photo", "class", kinds.pop() if kinds else "score", _FILES[job.write])
    for file, group in groupby(entries, key=lambda entry: entry["file"]):
        for n, row in enumerate(_rows(list(group))):
            table.add_row(str(file) if n == 0 else "", *row, style=None if row[-1] else "dim")
    console.show(table)
    if len(entries) < len(album):
        console.show(f"and {len(album) - len(entries)} more, listed in {index.name}")
    note = f" ({job.explainer.device_note})" if job.explainer.device_note else ""
    console.print_facts(
        [
            ("wrote", f"{_written(job.write, len(album))}, and {index.name}, in {album.folder}"),
            ("preprocessing", job.preprocessing),
            ("device", f"{job.explainer.device}{note}"),
        ]
    )


def _written(what: str, count: int) -> str:
    if what == "arrays":
        return f"the arrays (.npz) of {count} image{'s' * (count > 1)}"
    return f"{count} panel{'s' * (count > 1)}{' with arrays (.npz)' if what == 'both' else ''}"


def _rows(entries: Sequence[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """The highest classes of one photo, then those explained that are not among them: class, value, file."""
    files = {entry["class"]: entry["panel"] or entry["arrays"] for entry in entries}
    listed = {row["class"]: row for row in entries[0]["top"]}
    for row in [*listed.values(), *(entry for entry in entries if entry["class"] not in listed)]:
        name = "no single class" if row["class"] is None else str(row["class"])
        value = row.get("probability")
        yield (
            f"{name} {row['class_name'] or ''}",
            f"{row['score']:.4g}" if value is None else f"{value:.3f}",
            files.get(row["class"], ""),
        )
