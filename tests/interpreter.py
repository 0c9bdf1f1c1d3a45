"""Triton's interpreter as the tests need it, where there is no GPU; import it before any kernel."""

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated

import numpy as np
import triton
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def _fma(self, x, y, z):
    """Rounded once, as on a chip; the interpreter rounds the product too."""
    with np.errstate(all="ignore"):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)


InterpreterBuilder.create_fma = _fma


def _with_index(patch):
    """Numbers are arrays of one element, and numpy 2.4 makes no integer of one (triton#9171)."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    return patched


if triton.__version__.startswith("3.6"):
    interpreter._patch_lang_tensor = _with_index(interpreter._patch_lang_tensor)
