"""The exceptions of graphgbp, and the exit code the command line gives each.

    GraphgbpError                   1   base: catch this for all of them
    |-- ModelFileError              3   the file is no usable ONNX model
    |   |-- MissingWeightsError     3   its external data is not there
    |   `-- AlreadyConvertedError   3   graphgbp wrote it
    |-- UnsupportedError            4   no exact explanation exists for this graph
    |   |-- UnsupportedOperatorError 4  an operator on the path has no derivative rule
    |   `-- OpsetError              4   the model cannot be raised to a supported opset
    |-- RequestError                5   unknown method, layer, tensor, option
    |   `-- TargetError             5   a class out of range, labels of a wrong shape
    |-- ImageError                  6   a photo that cannot be read, an array that does not fit
    |-- DeviceError                 7   the asked device cannot be had
    |-- OutputError                 8   a result cannot be written
    `-- VerificationError           9   a converted file is not what it says it is

Exit code 2 is a command line that does not parse.
"""


class GraphgbpError(Exception):
    """Base of every error graphgbp raises on purpose; its text says what, where, and what to do next."""

    exit_code = 1


class ModelFileError(GraphgbpError):
    """The file is missing, truncated, not ONNX, or not a valid model."""

    exit_code = 3


class MissingWeightsError(ModelFileError):
    """The model keeps its weights in external files that cannot be found or are cut short."""


class AlreadyConvertedError(ModelFileError):
    """The model already holds a graph that graphgbp appended."""


class UnsupportedError(GraphgbpError):
    """The graph cannot be explained exactly, so it is refused."""

    exit_code = 4


class UnsupportedOperatorError(UnsupportedError):
    """Operators on the float path from input to target have no derivative rule; all of them are listed."""


class OpsetError(UnsupportedError):
    """The model's opset cannot be raised without changing its outputs, or is newer than what is known."""


class RequestError(GraphgbpError):
    """The request names something the model does not have or graphgbp does not know."""

    exit_code = 5


class TargetError(RequestError):
    """A class is out of range, or labels do not fit the batch."""


class ImageError(GraphgbpError):
    """An image cannot be read or does not fit the model's input."""

    exit_code = 6


class DeviceError(GraphgbpError):
    """The asked device cannot be used; the text says what is missing and how to install it."""

    exit_code = 7


class OutputError(GraphgbpError):
    """A result cannot be written: it exists, the folder is missing, or no space is left."""

    exit_code = 8


class VerificationError(GraphgbpError):
    """A converted file does not stand up to its source: a check of `verify` failed."""

    exit_code = 9
