"""Operators through which no cotangent passes, and why."""

from graphgbp.registry import nondifferentiable

_EVERY_TYPE = (19, 21, 23, 24, 25)  # versions that only admitted more element types

NO_REAL_NUMBER = {  # the output is an index, a size or a truth value
    "And": (7,),
    "ArgMax": (13,),
    "ArgMin": (13,),
    "Equal": (13, 19),
    "Greater": (13,),
    "GreaterOrEqual": (16,),
    "IsInf": (10, 20),
    "IsNaN": (13, 20),
    "Less": (13,),
    "LessOrEqual": (16,),
    "NonMaxSuppression": (11,),
    "NonZero": (13,),
    "Not": (1,),
    "Or": (7,),
    "Shape": (15, *_EVERY_TYPE),
    "Size": (13, *_EVERY_TYPE),
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
PIECEWISE_CONSTANT = {  # the derivative is zero almost everywhere
    "Ceil": (13,),
    "Floor": (13,),
    "Hardmax": (13,),
    "Round": (11, 22),
    "Sign": (13,),
}

for family in (NO_REAL_NUMBER, NO_VALUE_READ, PIECEWISE_CONSTANT):
    for operator, versions in family.items():
        nondifferentiable(operator, versions)
