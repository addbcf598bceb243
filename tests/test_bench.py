"""What the benchmark computes of its measurements, and that the documents say what docs/bench.json holds."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from graphgbp import runtime

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "scripts"))  # as the scripts see each other

import bench  # noqa: E402
import bench_goals  # noqa: E402
import bench_measure  # noqa: E402
import bench_networks  # noqa: E402
import bench_page  # noqa: E402
import profile_operators  # noqa: E402

RESULTS = ROOT / "docs" / "bench.json"


def some_times(**medians: float) -> dict:
    return {who: {"median": ms, "low": ms, "high": ms, "least": ms, "runs": 21} for who, ms in medians.items()}


def some_results() -> dict:
    """Two networks in which every goal holds."""
    network = {
        "layer": "features",
        "seconds": {"times 2 1": 60.0},
        "times": {
            "2": {
                "1": some_times(forward=10.0, explained=25.0, saliency=20.0, captum=75.0, onnx_ad=120.0),
                "8": some_times(forward=80.0, explained=200.0, saliency=160.0, captum=500.0),
            }
        },
        "files": {
            "convert": 0.5, "load": [0.1, 0.5], "bytes": [1000, 1009], "nodes": [10, 30], "nodes_run": [8, 20],
            "onnx_ad": 2.0,
        },
        "memory": {"forward": [50.0, 100.0], "explained": [50.0, 200.0], "captum": [300.0, 400.0]},
        "pixels": {str(side): some_times(forward=side**2 / 1e4, explained=side**2 / 4e3) for side in (128, 256, 512)},
    }  # fmt: skip
    networks = {name: json.loads(json.dumps(network)) for name in ("resnet50", "vit_b_16")}
    return {"machine": "M", "device": "cpu", "graphgbp": "1", "versions": {"onnx": "1"}, "networks": networks}


def test_a_contestant_runs_its_whole_block_before_the_next():
    order: list[str] = []
    found = bench_measure.in_blocks({name: lambda name=name: order.append(name) for name in "ab"}, rounds=2, span=0)
    runs, dropped = bench_measure.block_of(0)
    assert "".join(order) == "ab" + ("a" * runs + "b" * runs) * 2
    assert {len(times) for times in found.values()} == {2 * (runs - dropped)}


def test_quick_contestants_run_in_more_rounds():
    found = bench_measure.in_blocks({"a": lambda: None}, rounds=1, span=0.05)
    assert len(found["a"]) > 2 * len(bench_measure.in_blocks({"a": lambda: None}, rounds=1, span=0)["a"])


def test_slow_contestants_run_less():
    blocks = [bench_measure.block_of(seconds) for seconds in (0.01, 1.0, 30.0)]
    assert sorted(blocks, reverse=True) == blocks and len(set(blocks)) == 3
    assert all(runs > dropped > 0 for runs, dropped in blocks)


def test_the_spread_is_numpys_percentiles():
    times = list(np.random.default_rng(0).exponential(10, 21))
    found = bench_measure.spread(times)
    expected = np.percentile(times, [0, 25, 50, 75])
    np.testing.assert_allclose([found[name] for name in ("least", "low", "median", "high")], expected)


def test_the_exponent_is_that_of_numpys_fit():
    costs = dict(zip((128, 192, 256, 512), np.random.default_rng(0).uniform(1, 9, 4), strict=True))
    slope = np.polyfit(np.log([side**2 for side in costs]), np.log(list(costs.values())), 1)[0]
    assert bench_goals.exponent(costs) == pytest.approx(slope)
    assert bench_goals.exponent({side: 3 * side**2 for side in costs}) == pytest.approx(1)


def test_every_goal_is_computed_and_holds_where_it_does():
    found = bench_goals.goals(some_results())
    assert len(found) == 12 and [goal.words for goal in found if not goal.holds] == []


@pytest.mark.parametrize(
    ("path", "value", "failing"),
    [
        ("times/2/1/explained/median", 46.0, ["explained over forward", "Captum over"]),
        ("times/2/1/captum/median", 20.0, ["Captum over explained, geo", "Captum over explained, the worst"]),
        ("times/2/1/saliency/median", 40.0, ["onnx-ad over saliency"]),
        ("times/2/8/explained/median", 211.0, ["An image's cost in a batch"]),
        ("files/convert", 3.5, ["Conversion of ViT-B/16"]),
        ("files/bytes", [1000, 1010], ["Growth"]),
        ("files/load", [0.1, 0.61], ["Loading"]),
        ("files/load", [1.0, 3.1], ["Loading"]),
        ("memory/explained", [50.0, 401.0], ["Peak memory"]),
        ("pixels/512/explained/median", 90.0, ["Cost by pixels"]),
    ],
)  # fmt: skip
def test_a_goal_fails_by_its_own_measurement(path, value, failing):
    results = some_results()
    place = results["networks"]["vit_b_16"]
    *parents, last = path.split("/")
    for part in parents:
        place = place[part]
    place[last] = value
    found = [goal.words for goal in bench_goals.goals(results) if not goal.holds]
    assert found and all(any(words.startswith(start) for start in failing) for words in found)
    assert any(words.startswith(failing[0]) for words in found)


def test_the_page_is_written_from_any_part_of_the_results(tmp_path):
    out = tmp_path / "bench.json"
    bench_page.write(some_results(), out)
    text = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "2.50x" in text and "fail" not in text and "Not measured" not in text
    plot = (tmp_path / "images" / "bench.svg").read_text(encoding="utf-8")
    assert "currentColor" in plot and "prefers-color-scheme:dark" in plot and len(plot) < 60_000
    partial = some_results()
    partial["networks"] = {"vgg16": {"layer": None, "seconds": {}, "times": {"2": {"1": some_times(forward=1.0)}}}}
    bench_page.write(partial, out)
    assert "Not measured." in out.with_suffix(".md").read_text(encoding="utf-8")


def test_the_readmes_lines_are_replaced_and_nothing_else():
    start, end = bench_page.MARKS
    text = bench_page.with_speed(f"before\n{start}\nold\n{end}\nafter\n", some_results())
    assert text.startswith(f"before\n{start}\nAn image") and text.endswith(f"\n{end}\nafter\n") and "old" not in text
    assert "costs 2.5 forward passes" in text.replace("\n", " ")


def test_the_documents_say_what_was_measured():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    page = bench_page.page(results, Path("images/bench.svg"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    advice = "run python scripts/bench.py --render"
    assert (ROOT / "docs" / "bench.md").read_text(encoding="utf-8") == page, advice
    assert bench_page.with_speed(readme, results) == readme, advice


def test_what_is_measured_already_is_not_measured_again(tmp_path, monkeypatch):
    out = tmp_path / "bench.json"
    out.write_text(json.dumps(some_results()), encoding="utf-8")
    monkeypatch.setattr(bench, "version", lambda name: "1")
    monkeypatch.setattr(bench.Bench, "_exported", lambda self, name: True)
    asked = ["bench.py", "resnet50", "--threads", "2", "1", "--parts", "times", "files", "--out", str(out)]
    measured = []

    def measure(self, network, task, **options):
        measured.append((network, task, options.get("threads"), options.get("batch"), *options["contestants"]))
        return some_times(forward=1.0)

    monkeypatch.setattr(bench.Bench, "_measure", measure)
    monkeypatch.setattr(sys, "argv", asked)
    assert bench.main() == 0
    everyone = ("forward", "explained", "saliency", "captum")
    assert measured == [
        ("resnet50", "times", 2, 1, "compiled"),
        ("resnet50", "times", 1, 1, *everyone, "onnx_ad"),
        ("resnet50", "times", 1, 8, *everyone),
    ]
    kept = json.loads(out.read_text(encoding="utf-8"))["networks"]
    assert kept["resnet50"]["times"]["1"]["8"] == some_times(forward=1.0) and "vit_b_16" in kept
    assert kept["resnet50"]["times"]["2"]["1"]["captum"] == some_times(captum=75.0)["captum"]


@pytest.mark.skipif(runtime.cuda_obstacle() is None, reason="a GPU is here")
def test_without_a_gpu_cuda_is_refused_with_the_reason(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cuda"])
    assert bench.main() == 7
    assert runtime.cuda_obstacle() in capsys.readouterr().err


def test_a_profile_is_summed_up_by_operator():
    def event(name: str, kind: str, us: int) -> dict:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": us, "args": {"op_name": kind}}

    events = [{"cat": "Session", "name": "model_run", "dur": us} for us in (9000, 500, 700, 600)]
    events += [event("a", "Conv", us) for us in (8000, 100, 300, 200)] + [event("b", "Conv", 50)] * 4
    events += [event("c", "Mul", 10)] * 4 + [{"cat": "Node", "name": "a_fence_before", "dur": 1, "args": {}}]
    found = profile_operators.summary(events, dropped=1)
    assert found == {"run": 0.6, "operators": {"Conv": [0.25, 2], "Mul": [0.01, 1]}}


def test_a_profiles_table_adds_up_to_what_stands_above_the_limit():
    one = {"operators": {"Conv": [4.0, 3], "Mul": [0.001, 1]}}
    explained = {"operators": {"Conv": [9.0, 7], "ReorderInput": [2.0, 5], "Mul": [0.002, 2]}}
    lines = profile_operators._table(None, {"forward": one, "explained": explained}).splitlines()[2:]
    above = [float(line.split("|")[-2]) for line in lines]
    assert sum(above[:-1]) == pytest.approx(above[-1], abs=2e-3)
    assert above[-1] == pytest.approx(11.002 / 4.001 - 2, abs=1e-3)
    assert [line.split("|")[1].strip() for line in lines] == ["ReorderInput", "Conv", "1 others", "**all**"]


def test_the_names_of_networks_are_torchvisions():
    pytest.importorskip("torchvision")
    import torchvision

    assert set(bench_networks.TITLES) <= set(torchvision.models.list_models())
