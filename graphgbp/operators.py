"""The operator table: every operator of ONNX, and how a gradient passes it.

    rule               it has a derivative rule
    nondifferentiable  its output is no real number, reads no real number, or has derivative zero almost everywhere
    surrogate          its gradient is a stand-in for a derivative that is zero (straight-through)
    unsupported        nobody wrote a rule: on a path from input to target it is refused by name

Beside them stand ONNX Runtime's own operators that are seen as the plain ones they stand for. The table is read from
the registry, the forms and ONNX's own schemas, so it cannot disagree with what a conversion does.
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx

import graphgbp.plain
import graphgbp.rules  # noqa: F401  fills the registry
from graphgbp import forms, registry
from graphgbp.opset import RAISED_TO
from graphgbp.prepare import READ_AS
from graphgbp.registry import Entry, Key, Rule, Unsupported
from graphgbp.source import NEWEST_OPSET

RULE, ZERO, SURROGATE, UNSUPPORTED = SETS = ("rule", "nondifferentiable", "surrogate", "unsupported")
PLAIN = "plain"
"""What an operator of ONNX Runtime's own is that stands for operators of ONNX."""

OPSETS = {"": range(RAISED_TO, NEWEST_OPSET + 1), "ai.onnx.ml": range(1, 6)}
"""The opsets of each domain whose operators the table lists."""


@dataclass(frozen=True)
class Operator:
    """An operator in one of the four sets; `versions` are the since_versions that the listed opsets use.

    `gradients` names the inputs that get a gradient; a name with `...` stands for any number of inputs. An operator of
    ONNX Runtime's own (`set` is "plain") has what it `stands_for` in their place.
    """

    domain: str
    name: str
    versions: tuple[int, ...]
    set: str
    gradients: tuple[str, ...]
    stands_for: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ops() -> list[Operator]:
    """Every operator of ONNX that a model at a supported opset can hold, by domain and name, then ONNX Runtime's."""
    return [*_onnx(), *_onnx_runtime()]


def _onnx_runtime() -> list[Operator]:
    """The operators that ONNX has no schema of and that are seen as plain ones, by the words of their forms."""
    known = {(schema.domain, schema.name, schema.since_version) for schema in schemas()}
    words = {
        name: inspect.cleandoc(entry.form.__doc__ or "").splitlines()[0]
        for (domain, name, version), entry in forms.table().items()
        if (domain, name, version) not in known
    }
    return [
        Operator(forms.MICROSOFT, name, (1,), PLAIN, (), stands_for)
        for name, stands_for in sorted(words.items())
        if stands_for != forms.REFUSED
    ]


def _onnx() -> list[Operator]:
    table = registry.table()
    found: dict[tuple[str, str, str], list[onnx.defs.OpSchema]] = {}
    for schema in schemas():
        kind = SURROGATE if _is_quantised(schema) else set_of(entry_of(schema, table))
        found.setdefault((schema.domain, schema.name, kind), []).append(schema)
    return [
        Operator(domain, name, tuple(schema.since_version for schema in versions), kind, _gradients(versions, table))
        for (domain, name, kind), versions in sorted(found.items())
    ]


def schemas() -> Iterator[onnx.defs.OpSchema]:
    """Each version of each operator that the listed opsets use, oldest first, but of no wholly deprecated operator."""
    names = sorted({(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas() if schema.domain in OPSETS})
    for domain, name in names:
        used = [
            onnx.defs.get_schema(name, opset, domain) for opset in OPSETS[domain] if onnx.defs.has(name, opset, domain)
        ]
        if not all(schema.deprecated for schema in used):
            yield from {schema.since_version: schema for schema in used}.values()


def entry_of(schema: onnx.defs.OpSchema, table: Mapping[Key, Entry]) -> Entry | None:
    """What the registry says of an operator; of one that is read as another, what it says of that."""
    if not schema.domain and schema.name in READ_AS:
        opset = max(schema.since_version, RAISED_TO)
        schema = onnx.defs.get_schema(READ_AS[schema.name], opset)
    return table.get((schema.domain, schema.name, schema.since_version))


def _is_quantised(schema: onnx.defs.OpSchema) -> bool:
    form = forms.table().get((schema.domain, schema.name, schema.since_version))
    return form is not None and form.surrogate


def set_of(entry: Entry | None) -> str:
    """Which of the four sets an entry of the registry puts its operator in."""
    if entry is None or isinstance(entry, Unsupported):
        return UNSUPPORTED
    if not isinstance(entry, Rule):
        return ZERO
    return SURROGATE if entry.surrogate else RULE


def counts(operators: Sequence[Operator]) -> dict[str, int]:
    """How many operators are in each set."""
    return {kind: sum(operator.set == kind for operator in operators) for kind in (*SETS, PLAIN)}


def to_markdown() -> str:
    """The table as docs/operators.md holds it."""
    operators = ops()
    lines = [
        "# Operators",
        "",
        "Made by `graphgbp ops --markdown` from the registry; do not edit.",
        "",
        "| set | operators | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| {kind} | {count} | {_MEANING[kind]} |" for kind, count in counts(operators).items()]
    for domain, opsets in OPSETS.items():
        lines += ["", f"## {domain or 'ai.onnx'}, opset {opsets[0]} to {opsets[-1]}", ""]
        lines += ["| operator | versions | set | gradient to |", "|---|---|---|---|"]
        lines += [
            f"| {o.name} | {', '.join(map(str, o.versions))} | {o.set} | {', '.join(o.gradients)} |"
            for o in operators
            if o.domain == domain
        ]
    lines += ["", "## Of ONNX Runtime's own: com.microsoft, and normalizations that it writes into ai.onnx", ""]
    lines += ["| operator | seen as |", "|---|---|"]
    lines += [f"| {o.name} | {o.stands_for} |" for o in operators if o.set == PLAIN]
    return "\n".join(lines) + "\n"


_MEANING = {
    RULE: "the exact derivative",
    ZERO: "no real number in or out, or derivative zero almost everywhere",
    SURROGATE: "a stand-in for a derivative that is zero, named in the manifest",
    UNSUPPORTED: "refused by name on a path from input to target",
    PLAIN: "an operator of ONNX Runtime's own, seen as the operators that it stands for",
}


def _gradients(versions: Sequence[onnx.defs.OpSchema], table: Mapping[Key, Entry]) -> tuple[str, ...]:
    """The inputs that get a gradient in some version, as the newest that has them names them."""
    named: dict[int, str] = {}
    for schema in versions:
        entry = entry_of(schema, table)
        if isinstance(entry, Rule):
            positions = range(len(schema.inputs)) if entry.wrt is None else entry.wrt
            named |= {position: _spell(schema, position) for position in positions}
    return tuple(dict.fromkeys(named.values()))


def _spell(schema: onnx.defs.OpSchema, position: int) -> str:
    formal = schema.inputs[min(position, len(schema.inputs) - 1)]
    variadic = formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    return f"{formal.name}..." if variadic else formal.name
