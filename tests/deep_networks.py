"""Networks of any depth, of one kind of block each: what conversion takes must grow with them and no faster."""

from collections.abc import Callable

import numpy as np
import onnx

from tests.build import drawn, model

CHANNELS = 4
_BLOCK = 20  # layers that a dense block concatenates
_IMAGE = {"x": ("N", CHANNELS, 8, 8)}
_KERNEL = {"w": drawn(CHANNELS, CHANNELS, 3, 3, scale=0.1), "b": drawn(1, CHANNELS, 1, 1)}
_HEAD = ["p = GlobalAveragePool({})", "f = Flatten(p)", "y = MatMul(f, head)"]


def chain(count: int) -> onnx.ModelProto:
    """Convolution, ReLU, sum with a weight, one after the other."""
    nodes, x = [], "x"
    for index in range(count // 3):
        nodes += [
            f"c{index} = Conv<pads=[1, 1, 1, 1]>({x}, w)",
            f"r{index} = Relu(c{index})",
            f"s{index} = Add(r{index}, b)",
        ]
        x = f"s{index}"
    return _network(nodes, x, _KERNEL)


def residual(count: int) -> onnx.ModelProto:
    """Each convolution and ReLU added to what it reads."""
    nodes, x = [], "x"
    for index in range(count // 3):
        nodes += [
            f"c{index} = Conv<pads=[1, 1, 1, 1]>({x}, w)",
            f"r{index} = Relu(c{index})",
            f"s{index} = Add(r{index}, {x})",
        ]
        x = f"s{index}"
    return _network(nodes, x, _KERNEL)


def dense(count: int) -> onnx.ModelProto:
    """As DenseNet: in each block every layer reads all that were before it, concatenated."""
    nodes, x = [], "x"
    for block in range(count // (3 * _BLOCK)):
        features = [x]
        for index in range(_BLOCK):
            at = f"{block}_{index}"
            nodes += [
                f"k{at} = Concat<axis=1>({', '.join(features)})",
                f"c{at} = Conv(k{at}, w{index})",
                f"r{at} = Relu(c{at})",
            ]
            features.append(f"r{at}")
        x = features[-1]
    weights = {f"w{index}": drawn(CHANNELS, CHANNELS * (index + 1), 1, 1, scale=0.1) for index in range(_BLOCK)}
    return _network(nodes, x, weights)


def transformer(count: int) -> onnx.ModelProto:
    """Tokens of an image through blocks of attention and a dense layer, as a ViT has them before its norm."""
    width, heads = 8, 2
    nodes, x = ["e = Conv<strides=[2, 2]>(x, patch)", "v = Reshape(e, tokens)", "t = Transpose<perm=[0, 2, 1]>(v)"], "t"
    for i in range(count // 20):
        nodes += [f"n{i} = LayerNormalization({x}, scale, bias)"]
        for part, perm in (("q", "0, 2, 1, 3"), ("k", "0, 2, 3, 1"), ("v", "0, 2, 1, 3")):
            nodes += [
                f"{part}{i} = MatMul(n{i}, square)",
                f"{part}s{i} = Reshape({part}{i}, split)",
                f"{part}t{i} = Transpose<perm=[{perm}]>({part}s{i})",
            ]
        nodes += [
            f"a{i} = MatMul(qt{i}, kt{i})",
            f"p{i} = Softmax<axis=-1>(a{i})",
            f"o{i} = MatMul(p{i}, vt{i})",
            f"ot{i} = Transpose<perm=[0, 2, 1, 3]>(o{i})",
            f"om{i} = Reshape(ot{i}, merged)",
            f"s{i} = Add({x}, om{i})",
            f"m{i} = LayerNormalization(s{i}, scale, bias)",
            f"d{i} = MatMul(m{i}, square)",
            f"g{i} = Relu(d{i})",
            f"z{i} = Add(s{i}, g{i})",
        ]
        x = f"z{i}"
    weights = {
        "patch": drawn(width, CHANNELS, 2, 2), "tokens": np.array([0, width, -1]), "square": drawn(width, width),
        "scale": drawn(width), "bias": drawn(width), "split": np.array([0, 0, heads, width // heads]),
        "merged": np.array([0, 0, width]), "head": drawn(width, 10), "first": np.array(0),
    }  # fmt: skip
    return model([*nodes, f"f = Gather<axis=1>({x}, first)", "y = MatMul(f, head)"], _IMAGE, ["y"], weights)


def _network(nodes: list[str], last: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    head = [line.format(last) for line in _HEAD]
    return model([*nodes, *head], _IMAGE, ["y"], weights | {"head": drawn(CHANNELS, 10)})


KINDS: dict[str, Callable[[int], onnx.ModelProto]] = {
    "chain": chain,
    "residual": residual,
    "dense": dense,
    "transformer": transformer,
}
"""Each makes a network of about so many nodes."""
