"""Operators through which no cotangent passes, and why."""

from graphgbp.registry import nondifferentiable

_EVERY_TYPE = (19, 21, 23, 24, 25)  # versions that only admitted more element types

NO_REAL_NUMBER = {  # the output is an index, a size or a truth value
    "And": (7,),
    "ArgMax": (13,),
    "ArgMin": (13,),
    "BitShift": (11,),
    "BitwiseAnd": (18,),
    "BitwiseNot": (18,),
    "BitwiseOr": (18,),
    "BitwiseXor": (18,),
    "Equal": (13, 19),
    "Greater": (13,),
    "GreaterOrEqual": (16,),
    "ImageDecoder": (20,),
    "IsInf": (10, 20),
    "IsNaN": (13, 20),
    "Less": (13,),
    "LessOrEqual": (16,),
    "Multinomial": (7, 22),
    "NonMaxSuppression": (11,),
    "NonZero": (13,),
    "Not": (1,),
    "OptionalHasElement": (15, 18),
    "Or": (7,),
    "RegexFullMatch": (20,),
    "SequenceLength": (11,),
    "Shape": (15, *_EVERY_TYPE),
    "Size": (13, *_EVERY_TYPE),
    "StringConcat": (20,),
    "StringNormalizer": (10,),
    "StringSplit": (20,),
    "Xor": (7,),
}
NO_VALUE_READ = {  # the output depends on shapes, attributes or chance, on no input's value
    "Constant": (13, *_EVERY_TYPE),
    "ConstantOfShape": (9, 20, 21, 23, 24, 25),
    "EyeLike": (9, 22),
    "RandomNormal": (1, 22),
    "RandomNormalLike": (1, 22),
    "RandomUniform": (1, 22),
    "RandomUniformLike": (1, 22),
}
NO_REAL_INPUT = {  # the output is a real number made of integers or text
    "BlackmanWindow": (17,),
    "HammingWindow": (17,),
    "HannWindow": (17,),
    "TfIdfVectorizer": (9,),
}
PIECEWISE_CONSTANT = {  # the derivative is zero almost everywhere
    "Bernoulli": (15, 22),
    "Ceil": (13,),
    "Floor": (13,),
    "Hardmax": (13,),
    "Round": (11, 22),
    "Sign": (13,),
}

for family in (NO_REAL_NUMBER, NO_VALUE_READ, NO_REAL_INPUT, PIECEWISE_CONSTANT):
    for operator, versions in family.items():
        nondifferentiable(operator, versions)
