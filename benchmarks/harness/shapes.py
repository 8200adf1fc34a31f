"""Makes what is measured on: shapes, models from tiny to 7B, a tiny tokenizer, real and random examples.

Knows models, tokenizers and data; knows no clock and no competitor.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset


@dataclass(frozen=True)
class HeadShape:
    """T tokens in a pack, N of them scored, model width M, vocabulary V."""

    T: int
    N: int
    M: int
    V: int


@dataclass(frozen=True)
class AttentionShape:
    """H query heads, G key and value heads, head size K."""

    H: int
    G: int
    K: int


# SmolLM2-135M; a pack of instruction data in which the completions, 58% of the tokens, are scored
SMOLLM2_HEAD = HeadShape(T=893, N=520, M=576, V=49_152)
SMOLLM2_ATTENTION = AttentionShape(H=9, G=3, K=64)
LLAMA_1B_ATTENTION = AttentionShape(H=32, G=8, K=64)
# Documents of one pack of 1,024 tokens: log-normal lengths as instruction data have (mu 4.7, sigma 0.82), sorted
PACK_LENGTHS = (24, 38, 51, 66, 84, 103, 131, 172, 355)
assert sum(PACK_LENGTHS) == 1024
# What the tiny models share: the vocabulary of `tiny_tokenizer` and its special tokens
TINY: dict[str, Any] = {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 3}


@dataclass(frozen=True)
class ModelShape:
    """A decoder as transformers configures it: `model_type` and the fields of its configuration."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    tie_word_embeddings: bool = True

    def shrunk(self) -> ModelShape:
        """The same architecture so small that it trains anywhere, over the vocabulary of `tiny_tokenizer`."""
        tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": TINY["vocab_size"]}
        return replace(self, num_attention_heads=2, num_key_value_heads=1, **tiny)


MODELS = {
    "Llama-3.2-1B": ModelShape("llama", 2048, 8192, 16, 32, 8, 128_256),
    "Qwen2.5-0.5B": ModelShape("qwen2", 896, 4864, 24, 14, 2, 151_936),
    "Llama-3.1-8B": ModelShape("llama", 4096, 14_336, 32, 32, 8, 128_256, tie_word_embeddings=False),
    "Qwen2.5-7B": ModelShape("qwen2", 3584, 18_944, 28, 28, 4, 152_064, tie_word_embeddings=False),
}


def random_model(shape: ModelShape, dtype: torch.dtype, device: torch.device) -> Any:
    """A causal language model of this shape with random weights, made on the device, the same ones every time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**(vars(shape) | {name: TINY[name] for name in TINY if name != "vocab_size"}))
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def gpu_heads() -> dict[str, HeadShape]:
    """Packs of 8,192 tokens; of 2,048 where a card could not hold the first one's logits in float64 four times over."""
    T = 8192 if torch.cuda.get_device_properties(0).total_memory > 70 * 2**30 else 2048
    return {
        "Llama-3.2-1B": HeadShape(T=T, N=T, M=2048, V=128_256),
        "Llama-3.1-8B": HeadShape(T=T, N=T, M=4096, V=128_256),
    }


def smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """(model, tokenizer): pretrained SmolLM2-135M-Instruct, downloaded on first use, a fresh copy each time."""
    return copy.deepcopy(_loaded_smollm2(dtype))


@functools.cache
def _loaded_smollm2(dtype: torch.dtype) -> tuple[Any, Any]:
    """Read once a process: that takes twenty seconds, most of them for the tokenizer."""
    from packsft.app.smollm2 import load_smollm2

    return load_smollm2(dtype)


def tiny_tokenizer() -> Any:
    """A tokenizer of 64 words that needs no download: `w0` to `w59`, and the special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "<bos>", *(f"w{i}" for i in range(60))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", bos_token="<bos>"
    )


def tiny_llama(dtype: torch.dtype, **sizes: int) -> Any:
    """Two layers of width 32 over the vocabulary of `tiny_tokenizer`, grouped-query attention, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**tiny | {"num_key_value_heads": 2} | TINY | sizes)).to(dtype)


def docstrings(count: int) -> Dataset:
    """`count` functions of Python's standard library and their docstrings, the same ones every time."""
    from packsft import stdlib_docstrings

    return stdlib_docstrings().shuffle(seed=0).select(range(count))


def random_documents(count: int, vocabulary: int, longest: int, *, prompt_share: float = 0.4) -> Dataset:
    """`count` examples of random tokens as `input_ids` and `labels`, the same ones every time.

    Their lengths are log-normal, as those of instruction data: of median 134 and cut at 8 and 1,024 where `longest` is
    1,024, and in proportion elsewhere. The first `prompt_share` of each is not scored.
    """
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(count, generator=generator, dtype=torch.float64)
    lengths = (normal * 0.9 + 4.9 + math.log(longest / 1024)).exp().clamp(8, longest).int().tolist()
    rows = []
    for length in lengths:
        # below 4 are the special tokens of `tiny_tokenizer`
        ids = torch.randint(4, vocabulary, (length,), generator=generator).tolist()
        prompt = int(length * prompt_share)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def tokenised(dataset: Dataset, tokenizer: Any) -> Dataset:
    """Prompt/completion examples as `input_ids` and `labels`, the prompt not scored, as TRL makes them."""
    from trl import SFTConfig

    from packsft.compat import prepare_rows

    args = SFTConfig("unused", use_cpu=True, bf16=False, report_to="none")
    return prepare_rows(dataset, tokenizer, args).select_columns(["input_ids", "labels"])


def packed_row(lengths: tuple[int, ...], vocabulary: int, *, seed: int, prompt_share: float = 0.4) -> dict[str, Any]:
    """One pack of random documents as a row for the collator: `input_ids`, `labels`, `seq_lengths`.

    The first `prompt_share` of every document is not scored, its last token always is.
    """
    generator = torch.Generator().manual_seed(seed)
    # below 4 are the special tokens of `tiny_tokenizer`
    ids = torch.randint(4, vocabulary, (sum(lengths),), generator=generator).tolist()
    labels: list[int] = []
    for length in lengths:
        prompt = min(int(length * prompt_share), length - 1)
        labels += [-100] * prompt + ids[len(labels) + prompt : len(labels) + length]
    return {"input_ids": ids, "labels": labels, "seq_lengths": list(lengths)}
