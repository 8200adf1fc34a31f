"""packsft: packed supervised fine-tuning, a drop-in for TRL's `SFTTrainer`.

    from packsft import PackedSFTTrainer  # was: from trl import SFTTrainer

Names that need torch are imported on first use, so `import packsft` is fast.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from packsft.app.patch import patch_trl
    from packsft.app.stdlib_docstrings import stdlib_docstrings
    from packsft.config import PackedSFTConfig
    from packsft.loops.data import load, pack
    from packsft.loops.model import prepare, unprepare
    from packsft.packing import PackPlan, plan_packs
    from packsft.trainer import PackedSFTTrainer

_HOMES = {
    "PackPlan": "packsft.packing",
    "PackedSFTConfig": "packsft.config",
    "PackedSFTTrainer": "packsft.trainer",
    "__version__": "packsft_kernels.version",
    "axolotl": "packsft.loops.axolotl",  # for `plugins: [packsft.axolotl]`
    "load": "packsft.loops.data",
    "pack": "packsft.loops.data",
    "patch_trl": "packsft.app.patch",
    "plan_packs": "packsft.packing",
    "prepare": "packsft.loops.model",
    "stdlib_docstrings": "packsft.app.stdlib_docstrings",
    "unprepare": "packsft.loops.model",
}

__all__ = [
    "PackPlan", "PackedSFTConfig", "PackedSFTTrainer", "__version__", "load", "pack", "patch_trl", "plan_packs",
    "prepare", "stdlib_docstrings", "unprepare",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'packsft' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), "PackingPlugin" if name == "axolotl" else name)


def __dir__() -> list[str]:
    return __all__
