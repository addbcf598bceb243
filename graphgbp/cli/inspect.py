"""graphgbp inspect: what can be explained."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from graphgbp.cli import console, request

if TYPE_CHECKING:
    from graphgbp.inspection import Inspection

_LAYERS_SHOWN = 12


@click.command(no_args_is_help=True, short_help="Say what can be explained in a model.")
@click.argument("model")
@request.options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(model: str, as_json: bool, **options: Any) -> None:
    """Say what can be explained in MODEL: inputs, score, candidate layers and why, rectifiers, gaps.

    With the options of convert, what such a conversion would do.
    """
    import graphgbp

    with console.progress(f"reading {model}"):
        found = graphgbp.inspect(model, **request.given(options))
    if as_json:
        console.print_json(found.to_dict())
        return
    console.print_facts(list(_facts(found)))
    if found.layers:
        console.show(_layer_table(found.layers))
    if found.rectifiers or found.not_rectifiers:
        console.show(_rectifier_table(found))
    if found.gaps:
        console.show(_rows("Operators without a rule", ("node", "op", "domain", "reason"), found.gaps))
    if not found.converted:
        console.show(_verdict(found))


def _verdict(found: "Inspection") -> str:
    obstacles = [*found.problems, *([f"{len(found.gaps)} node(s) without a rule"] if found.gaps else [])]
    if not found.methods:
        return f"cannot be explained as it is: {'; '.join(obstacles)}"
    takes = f"can be explained, by {', '.join(found.methods)}; the file then takes {', '.join(found.target_inputs)}"
    return "\n".join([takes, *(f"not otherwise: {obstacle}" for obstacle in obstacles)])


def _facts(found: "Inspection") -> Iterator[tuple[str, str]]:
    raised = found.opset_raised
    yield "file", str(found.file)
    yield "opset", str(found.opset) + (f", raised to {raised['raised_to']} for conversion" if raised else "")
    yield "nodes", str(found.nodes)
    inline, external = found.weights["inline"], found.weights["external"]
    if inline or not external:
        yield "weights", f"{console.spell_bytes(inline)} in the file"
    for location, count in external.items():
        yield "weights", f"{console.spell_bytes(count)} in {location}, beside the file"
    yield from _deployment(found)
    for kind, tensors in (("input", found.inputs), ("output", found.outputs)):
        for tensor in tensors:
            layout = next(
                (x["layout"] for x in found.explained if kind == "input" and x["name"] == tensor["name"]), None
            )
            shape = console.spell_shape(tensor["shape"])
            yield kind, f"{tensor['name']}  {tensor['dtype']} {shape}{f'  {layout}' if layout else ''}"
    if found.score:
        classes = found.score["classes"]
        count = f", {classes} classes" if classes else ""
        yield "score", f"{found.score['tensor']}{count}: {found.score['reason']}"
        yield "rectifiers", _counted(found.rectifiers) or "none: Guided Backpropagation equals the gradient"
    for layer in found.layers:
        if layer["chosen"]:
            yield "layer", f"{layer['tensor']}: {layer['reason']}"
    if found.passed_through:
        yield "passed through", f"{_counted(found.passed_through)} (smooth or leaky: no published guided rule)"
    if found.converted:
        yield "converted", f"by graphgbp {found.converted['graphgbp']}: {', '.join(found.converted['methods'])}"


def _deployment(found: "Inspection") -> Iterator[tuple[str, str]]:
    if found.producer["name"]:
        yield "made by", " ".join(filter(None, found.producer.values()))
    others = {domain: version for domain, version in found.opsets.items() if domain != "ai.onnx"}
    if others:
        yield "other opsets", ", ".join(f"{domain} {version}" for domain, version in others.items())
    counts = found.precision["tensors"]
    if found.precision["type"]:
        spread = f" ({_spelled(counts)} tensors)" if len(counts) > 1 else ""
        yield "precision", f"{found.precision['type']}{spread}"
    if found.quantisation:
        held = found.quantisation
        types = [f"{what} {'/'.join(held[what])}" for what in ("weights", "activations") if held[what]]
        yield "quantised", ", ".join([" and ".join(held["form"]), *types])
    if found.surrogates:
        yield "surrogates", f"{len(found.surrogates)} quantisers that the gradient goes straight through"
    if found.fused:
        yield "seen as plain", _spelled(found.fused)
    if found.recomputed:
        yield "computed again", f"where a gradient needs them: {_spelled(found.recomputed, ' nodes of ')}"


def _spelled(counts: dict[str, int], between: str = " ") -> str:
    return ", ".join(f"{count}{between}{what}" for what, count in counts.items())


def _counted(activations: list[dict[str, str]]) -> str:
    """ "3 Relu, 1 Clip", most frequent first."""
    from collections import Counter

    return ", ".join(f"{count} {name}" for name, count in Counter(a["clothing"] for a in activations).most_common())


def _layer_table(layers: list[dict[str, Any]]) -> Any:
    """The last candidate layers, and the chosen one wherever it is."""
    kept = [layer for n, layer in enumerate(layers) if layer["chosen"] or n >= len(layers) - _LAYERS_SHOWN]
    left_out = len(layers) - len(kept)
    title = "Candidate layers for Grad-CAM" + (f" ({left_out} earlier ones: --json)" if left_out else "")
    table = console.table("", "tensor", "node", "op", "shape", title=title)
    for layer in kept:
        mark, shape = "*" if layer["chosen"] else "", console.spell_shape(layer["shape"])
        style = "bold" if layer["chosen"] else None
        table.add_row(mark, layer["tensor"], layer["node"], layer["op"], shape, style=style)
    return table


def _rectifier_table(found: "Inspection") -> Any:
    """Each kind once, with how many there are; masked ones first."""
    from collections import Counter

    table = console.table(
        "", "count", "written as", "because", title="Rectifiers, and what only looks like one (each: --json)"
    )
    for masked, activations in (("masked", found.rectifiers), ("not masked", found.not_rectifiers)):
        kinds = Counter((activation["clothing"], _kind_of_reason(activation["reason"])) for activation in activations)
        for (clothing, reason), count in kinds.most_common():
            table.add_row(masked, str(count), clothing, reason)
    return table


def _kind_of_reason(reason: str) -> str:
    """The reason without the node it names."""
    return reason.partition(" at '")[0]


def _rows(title: str, keys: tuple[str, ...], rows: list[dict[str, str]]) -> Any:
    table = console.table(*keys, title=title)
    for row in rows:
        table.add_row(*(row[key] for key in keys))
    return table
