"""A pytest plugin: Triton's interpreter computes `exp` as a card does, which rounds x * log2(e) before it goes on.

    TRITON_INTERPRET=1 PYTHONPATH=tests/ops pytest -p card_exp tests/ops/test_cross_entropy.py

NumPy's own `exp` is right to half a unit in the last place, a card's off by 4e-8 * |x|: an accuracy that only the
interpreter has would be found out on the first card.
"""

from typing import Any

import numpy as np
from triton.runtime import interpreter

LOG2_E = np.float32(1.4426950408889634)


def create_exp(builder: Any, argument: Any) -> Any:
    x = argument.data
    y = np.exp2((x * LOG2_E).astype(np.float64)).astype(np.float32) if x.dtype == np.float32 else np.exp(x)
    return interpreter.TensorHandle(y, argument.dtype.scalar)


interpreter.InterpreterBuilder.create_exp = create_exp
