"""The tests, and the check they run the package under.

jaxtyping's import hook applies `shapes` to every function of g4lens (see `addopts` in
pyproject.toml). It looks at annotations that speak of shapes and at no others: that an argument of
the wrong type raises our own error is what many tests are about, and types are pyright's.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def shapes(function: Callable) -> Callable:
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)
    }
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))
