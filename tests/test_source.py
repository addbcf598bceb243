"""Files that ONNX Runtime saved for one machine are refused once, with what to do."""

import onnx
import pytest
from onnx import helper

import graphgbp
from tests.build import small_cnn
from tests.optimised import operators, optimised


def in_domain(domain: str, op: str) -> onnx.ModelProto:
    """A network whose second node is of another domain."""
    made = small_cnn()
    made.opset_import.append(helper.make_opsetid(domain, 1))
    made.graph.node[1].domain, made.graph.node[1].op_type = domain, op
    return made


@pytest.mark.parametrize("act", [graphgbp.convert, graphgbp.inspect, graphgbp.vjp])
@pytest.mark.parametrize("domain", ["com.microsoft.nchwc", "com.ms.internal.nhwc"])
def test_a_layout_of_the_runtime(act, domain):
    with pytest.raises(
        graphgbp.UnsupportedError, match=rf"\({domain}, as of node 'r1' \(Conv\)\).*EXTENDED, or"
    ) as error:
        act(in_domain(domain, "Conv"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("act", [graphgbp.convert, graphgbp.inspect])
def test_a_compiled_part(act):
    with pytest.raises(graphgbp.UnsupportedError, match=r"'r1' \(EPContext\) holds.*compiled.*convert the model"):
        act(in_domain("com.microsoft", "EPContext"))


def test_the_layout_is_the_last_level_of_optimisation_and_what_is_advised_helps():
    """Wide enough a convolution is rewritten on every CPU with vector instructions."""
    model = small_cnn()
    wide = [value for value in model.graph.initializer if value.name in ("w1", "b1", "w2")]
    for value in wide:
        values = onnx.numpy_helper.to_array(value)
        repeated = values.repeat(8, 0) if value.name != "w2" else values.repeat(8, 1)
        value.CopyFrom(onnx.numpy_helper.from_array(repeated, value.name))
    del model.graph.value_info[:]
    blocked = optimised(model, "all")
    if not any(node.domain == "com.microsoft.nchwc" for node in blocked.graph.node):
        pytest.skip("ONNX Runtime has no blocked layout for this CPU")
    with pytest.raises(graphgbp.UnsupportedError, match="blocked layout"):
        graphgbp.convert(blocked)
    advised = optimised(model, "extended")
    assert operators(advised)["com.microsoft.FusedConv"] == 2
    assert len(graphgbp.inspect(advised).rectifiers) == 2
    graphgbp.convert(advised)
