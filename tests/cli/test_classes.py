import pytest

from graphgbp.cli.classes import find_class
from graphgbp.errors import RequestError, TargetError

NAMES = ["tench", "crane", "cat", "Crane", "tabby cat", "7", "8"]


def test_by_index_and_by_name():
    assert find_class("3", NAMES) == 3 and find_class("3", None) == 3 and find_class("-1", None) == -1
    assert find_class("tench", NAMES) == 0 and find_class("Tabby Cat", NAMES) == 4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("crane", "'crane' may be class 1 and 3; give the index"),
        ("7", "'7' may be class 5 and 7; give the index"),
        ("tensch", "no class is named 'tensch'; near it are 'tench' (0)"),
        ("abby", "near it are 'tabby cat' (4)"),
        ("xylophone", "no class is named 'xylophone'; give its index"),
    ],
)
def test_refused_with_what_to_do(given, message):
    with pytest.raises(TargetError) as caught:
        find_class(given, NAMES)
    assert message in str(caught.value)


def test_digits_as_names():
    digits = [str(digit) for digit in range(10)]
    assert [find_class(digit, digits) for digit in digits] == list(range(10))


def test_without_names():
    with pytest.raises(RequestError, match="no class names are known"):
        find_class("cat", None)
