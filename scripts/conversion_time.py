"""How long conversion takes, by the number of nodes: it must grow with them and no faster.

    python scripts/conversion_time.py [--nodes 100 300 1000 3000 10000] [--rounds 3] [MODEL.onnx ...]

Networks of one kind of block each, then the files that are named, from their path and as a loaded model; the least
of the rounds, in a warm process.
"""

import argparse
import sys
import time
from pathlib import Path

import onnx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import graphgbp
from tests.deep_networks import KINDS

METHOD = "guided_gradcam"


def seconds(model: onnx.ModelProto | Path, rounds: int) -> float:
    """The least time of several conversions."""
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        graphgbp.convert(model, METHOD)
        taken.append(time.perf_counter() - start)
    return min(taken)


def by_nodes(counts: list[int], rounds: int) -> None:
    print(f"{'kind':<12}{'nodes':>8}{'converted':>11}{'seconds':>9}{'us/node':>9}")
    for kind, make in KINDS.items():
        for count in counts:
            network = make(count)
            taken = seconds(network, rounds)
            nodes, made = len(network.graph.node), len(graphgbp.convert(network, METHOD).graph.node)
            print(f"{kind:<12}{nodes:>8}{made:>11}{taken:>9.2f}{taken / nodes * 1e6:>9.0f}", flush=True)


def by_file(paths: list[Path], rounds: int) -> None:
    print(f"{'file':<28}{'nodes':>8}{'converted':>11}{'from path':>11}{'from model':>11}{'growth':>9}")
    for path in paths:
        model = onnx.load(path)
        of_path = seconds(path, rounds)
        of_model = seconds(model, rounds)
        converted = graphgbp.convert(model, METHOD)
        nodes, made = len(model.graph.node), len(converted.graph.node)
        growth = converted.ByteSize() / model.ByteSize() - 1
        print(f"{path.stem:<28}{nodes:>8}{made:>11}{of_path:>11.2f}{of_model:>11.2f}{growth:>9.2%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="*", default=[100, 300, 1000, 3000, 10000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("models", type=Path, nargs="*")
    given = parser.parse_args()
    graphgbp.convert(KINDS["chain"](100), METHOD)
    if given.nodes:
        by_nodes(given.nodes, given.rounds)
    if given.models:
        by_file(given.models, given.rounds)


if __name__ == "__main__":
    main()
