"""packsft: packed supervised fine-tuning, a drop-in for TRL's `SFTTrainer`.

    from packsft import PackedSFTTrainer  # was: from trl import SFTTrainer

Names are imported when they are first used, so that `import packsft` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from packsft_kernels.version import __version__

if TYPE_CHECKING:
    from packsft.config import PackedSFTConfig
    from packsft.packing import PackPlan, plan_packs
    from packsft.stdlib_docstrings import stdlib_docstrings
    from packsft.trainer import PackedSFTTrainer

_HOMES = {
    "PackPlan": "packsft.packing",
    "PackedSFTConfig": "packsft.config",
    "PackedSFTTrainer": "packsft.trainer",
    "plan_packs": "packsft.packing",
    "stdlib_docstrings": "packsft.stdlib_docstrings",
}

__all__ = ["PackPlan", "PackedSFTConfig", "PackedSFTTrainer", "__version__", "plan_packs", "stdlib_docstrings"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'packsft' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value  # the submodule stdlib_docstrings would otherwise take the function's place
    return value


def __dir__() -> list[str]:
    return __all__
