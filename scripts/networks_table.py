"""Write docs/networks.md: every network by both of torch's exporters, against torch in float64.

    make networks                                                                  # all rows, environment included
    .venv-networks/bin/python scripts/networks_table.py                            # the rows that are missing
    .venv-networks/bin/python scripts/networks_table.py timm/vit_small_patch16_224 # these rows again

Each network is measured in a process of its own, and its rows are kept in docs/networks.json as they come. The exit
code is 1 where a row is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Row = dict[str, Any]

DOCS = Path(__file__).resolve().parent.parent / "docs"
PACKAGES = ("torch", "torchvision", "timm", "onnx", "onnxruntime-gpu", "captum", "grad-cam")
EXPORTERS = {"dynamo": "dynamo=True", "torchscript": "dynamo=False"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", metavar="LIBRARY/NAME", help="measure these again (default: all)")
    parser.add_argument("--again", action="store_true", help="also the rows that are there")
    parser.add_argument("--rewrite", action="store_true", help="measure nothing, write the table from its rows")
    parser.add_argument("--docs", type=Path, default=DOCS, help="where networks.json and networks.md lie")
    parser.add_argument("--child", metavar="LIBRARY/NAME", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return _child(arguments.child)

    from vision_networks import NETWORKS

    unknown = [key for key in arguments.networks if key not in NETWORKS]
    if unknown:
        parser.error(f"no network {', '.join(unknown)}; there are {', '.join(NETWORKS)}")
    kept = _read(arguments.docs)
    wanted = arguments.networks or [key for key in NETWORKS if arguments.again or key not in kept]
    for key in [] if arguments.rewrite else wanted:
        kept[key] = _measure(key)
        _write(arguments.docs, {name: kept[name] for name in NETWORKS if name in kept})
        print("\n".join(f"{key} {row['exporter']}: {row['verdict']}" for row in kept[key]), flush=True)
    _write(arguments.docs, {name: kept[name] for name in NETWORKS if name in kept})
    wrong = [row for rows in kept.values() for row in rows if not _is_right(row)]
    print(f"{sum(map(len, kept.values()))} rows, {len(wrong)} not right; wrote {arguments.docs / 'networks.md'}")
    return 1 if wrong else 0


def _child(key: str) -> int:
    import network_row
    from vision_networks import NETWORKS

    rows = network_row.rows(NETWORKS[key], list(EXPORTERS))
    print(json.dumps([{**row, "cpu_seconds": round(time.process_time())} for row in rows]))
    return 0


def _measure(key: str) -> list[Row]:
    """A network's rows, from a process of its own; where that dies, rows that say so."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", key], capture_output=True, text=True, env=environment
    )
    if done.returncode == 0:
        rows: list[Row] = json.loads(done.stdout.splitlines()[-1])
        return rows
    library, name = key.split("/")
    last = (done.stderr.strip().splitlines() or ["no word"])[-1]
    verdict = f"failed with exit code {done.returncode}: {last}"
    return [{"network": name, "library": library, "exporter": exporter, "verdict": verdict} for exporter in EXPORTERS]


def _is_right(row: Row) -> bool:
    return row["verdict"] == "right" and row.get("cam", {"verdict": "right"})["verdict"] == "right"


def _read(docs: Path) -> dict[str, list[Row]]:
    path = docs / "networks.json"
    if not path.exists():
        return {}
    kept: dict[str, list[Row]] = {}
    for row in json.loads(path.read_text())["rows"]:
        kept.setdefault(f"{row['library']}/{row['network']}", []).append(row)
    return kept


def _write(docs: Path, kept: dict[str, list[Row]]) -> None:
    rows = [row for rows in kept.values() for row in rows]
    lines = ",\n".join(json.dumps(_rounded(row)) for row in rows)
    versions = {name: version(name) for name in PACKAGES}
    (docs / "networks.json").write_text(f'{{"versions": {json.dumps(versions)},\n"rows": [\n{lines}\n]}}\n')
    (docs / "networks.md").write_text(page(rows, versions))


def _rounded(value: Any) -> Any:
    """Floats to three significant digits."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    return float(f"{value:.3g}") if isinstance(value, float) else value


def page(rows: Sequence[Row], versions: dict[str, str]) -> str:
    """docs/networks.md, from the rows."""
    template = (Path(__file__).parent / "networks.md.in").read_text()
    return template.format(
        versions=", ".join(f"{name} {number}" for name, number in versions.items()),
        minutes=round(sum({row["library"] + row["network"]: row.get("cpu_seconds", 0) for row in rows}.values()) / 60),
        count=len(rows),
        right=sum(row["verdict"] == "right" for row in rows),
        maps=_table(MAP_COLUMNS, [_map_cells(row) for row in rows]),
        faults=_faults(rows),
        files=_table(FILE_COLUMNS, [_file_cells(row) for row in rows if "nodes" in row]),
        cams=_table(CAM_COLUMNS, [_cam_cells(row) for row in rows if "cam" in row]),
    )


MAP_COLUMNS = (
    "network", "exporter", "gradient", "guided", "guided reference",
    "Grad-CAM", "rectifiers found / called", "row",
)  # fmt: skip
FILE_COLUMNS = ("network", "exporter", "input", "explained", "opset", "nodes", "convert, s", "forward", "Grad-CAM at")
CAM_COLUMNS = ("network", "exporter", "layer of its README", "`auto` takes it", "difference", "row")


def _map_cells(row: Row) -> list[str]:
    head = [_name(row), EXPORTERS[row["exporter"]]]
    if "distances" not in row:
        return [*head, "", "", "", "", "", row["verdict"].partition(":")[0]]
    far = row["distances"]
    maps = [_distance(far[name]) if name in far else "" for name in ("gradient", "guided", "gradcam")]
    return [
        *head, *maps[:2], row["guided_by"], maps[2],
        f"{row['rectifiers']} / {row['rectifiers_called']}", row["verdict"].partition(":")[0],
    ]  # fmt: skip


def _distance(distance: dict[str, float]) -> str:
    return f"{distance['ours']:.0e} / {distance['float32']:.0e}" + ("" if distance["holds"] else " **!**")


def _file_cells(row: Row) -> list[str]:
    size, place = row["size"], row["layer"]
    forward = "same bits" if not row["moved"] else f"same bits unoptimised; {row['moved']:.0e}"
    if any("changed" in fault for fault in row["faults"]) or row["moved_unoptimised"]:
        forward = "**changed**"
    return [
        _name(row), EXPORTERS[row["exporter"]], f"{row['batch']} x 3 x {size} x {size}", row["explained"],
        str(row["opset"]), f"{row['nodes']} -> {row['nodes_after']}", str(row["seconds"]), forward,
        f"`{place}`" if place else "",
    ]  # fmt: skip


def _cam_cells(row: Row) -> list[str]:
    cam = row["cam"]
    taken = "yes" if cam["auto"] else f"no: `{row['layer']}`"
    difference = f"{cam['difference']:.0e} / {cam['float32']:.0e}"
    return [_name(row), EXPORTERS[row["exporter"]], f"`{cam['layer']}`", taken, difference, cam["verdict"]]


def _faults(rows: Sequence[Row]) -> str:
    lines = [
        f"- {_name(row)}, {EXPORTERS[row['exporter']]}: {row['verdict']}" for row in rows if row["verdict"] != "right"
    ]
    return "\n".join(lines) if lines else "Every row is right."


def _name(row: Row) -> str:
    return row["network"] if row["library"] == "scripts" else f"{row['library']} {row['network']}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
