"""The derivative rules, one family of operators per file. Importing the package fills the registry."""

from graphgbp.rules import activation, elementwise

__all__ = ["activation", "elementwise"]
