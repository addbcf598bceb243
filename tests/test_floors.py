"""The house: imports go down only."""

import ast
from pathlib import Path

import graphgbp

PACKAGE = Path(graphgbp.__file__).parent

FLOORS = [
    ["errors", "contract", "symbols", "_version", "kernels", "ahead"],
    ["shapes"],
    ["files", "weights", "digests"],
    ["emit", "registry", "model_file", "patterns"],
    ["masks", "blocked", "nodes", "curves", "sizes", "forms", "parts"],
    ["rules", "branches", "functions", "smooth", "plain", "stored", "folding"],
    ["view", "inference"],
    ["prepare", "equivalence"],
    ["opset", "backward", "rectifiers", "append", "sharing", "order"],
    ["policies", "lowerings", "image", "source"],
    ["axes"],
    ["layouts", "operators"],
    ["extents", "attention"],
    ["layers"],
    ["features"],
    ["score"],
    ["target", "cams"],
    ["heads"],
    ["options"],
    ["analysis"],
    ["maps"],
    ["conversion", "jacobian", "deployment"],
    ["inspection"],
    ["runtime", "feeds", "photo", "panel"],
    ["recipe", "facts"],
    ["picture"],
    ["result"],
    ["explainer", "verification"],
    ["methods"],
    ["cli"],
    ["__main__"],
]
FLOOR = {name: index for index, names in enumerate(FLOORS) for name in names}


def imports(path: Path) -> set[str]:
    """The graphgbp modules a file imports, at any depth: `graphgbp.rules.linear` counts as `rules`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "graphgbp":
            tails = [node.module] if "." in node.module else [f"graphgbp.{alias.name}" for alias in node.names]
            found.update(tail.split(".")[1] for tail in tails)
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("graphgbp."))
    return found


def module_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def test_every_module_has_a_floor():
    assert {module_of(path) for path in sources()} == set(FLOOR)


def test_imports_go_down():
    climbing = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in sources()
        for name in imports(path)
        if name in FLOOR and name != module_of(path) and FLOOR[name] >= FLOOR[module_of(path)]
    ]
    assert not climbing


def test_runtime_sees_only_errors_and_contract():
    assert imports(PACKAGE / "runtime.py") <= {"errors", "contract"}


def test_engine_imports_no_rule_and_names_no_operator():
    import onnx

    assert "rules" not in imports(PACKAGE / "backward.py")
    operators = {schema.name for schema in onnx.defs.get_all_schemas()}
    tree = ast.parse((PACKAGE / "backward.py").read_text(encoding="utf-8"))
    named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in operators}
    assert named <= {"Shape", "Size", "Expand", "NonZero", "Reshape"}, "only to emit an unbroadcast of unknown shape"


def test_rules_do_not_see_the_engine():
    for path in (PACKAGE / "rules").glob("*.py"):
        assert imports(path) <= {"emit", "registry", "masks", "blocked", "shapes", "rules"}, path


def test_public_names_are_complete():
    assert graphgbp.__all__ == sorted(graphgbp.__all__)
    for name in graphgbp.__all__:
        assert getattr(graphgbp, name) is not None
