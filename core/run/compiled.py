"""numba's compiler with its results kept on disk, where there is a place for them."""

from collections.abc import Callable

from numba import njit


def compiled(function: Callable) -> Callable:
    """Compiles a function over arrays; releases the GIL, with fast floating-point arithmetic.

    The machine code is kept next to the source or else in the user's cache folder. Where neither
    can be written to, as in a container that runs as an unknown user, each process compiles anew.
    """
    options = {"nogil": True, "fastmath": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # "no locator available"
        return njit(**options)(function)
