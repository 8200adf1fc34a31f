"""Tiny models, a tiny tokenizer and five literal examples, small enough to check by hand."""

from __future__ import annotations

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3Config,
    StableLmConfig,
)

WORDS = "what is the capital of france paris . tell me a joke no why two plus four user assistant yes hello"
VOCAB = ["<pad>", "<eos>", "<unk>", *WORDS.split()]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}assistant "
    "{% generation %}{{ message['content'] }} <eos>{% endgeneration %}"
    "{% else %}user {{ message['content'] }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def tiny_tokenizer(eos: bool = True) -> PreTrainedTokenizerFast:
    """A word a token: what a test's text becomes can be read off `VOCAB`."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCAB)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>"} | ({"eos_token": "<eos>"} if eos else {})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """Two layers, random weights from a fixed seed, the vocabulary of the tiny tokenizer."""
    common = {"vocab_size": len(VOCAB), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    llama_like = common | {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    configs = {
        "llama": lambda: LlamaConfig(**llama_like | {"tie_word_embeddings": True} | overrides),
        "qwen3": lambda: Qwen3Config(**llama_like | {"head_dim": 8} | overrides),
        "gemma2": lambda: Gemma2Config(
            **llama_like | {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8} | overrides
        ),
        "gpt2": lambda: GPT2Config(
            **common | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256,
                        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} | overrides
        ),
        "opt": lambda: OPTConfig(
            **common | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
                        "word_embed_proj_dim": 32, "max_position_embeddings": 256, "dropout": 0.0} | overrides
        ),
        "mixtral": lambda: MixtralConfig(**llama_like | {"num_local_experts": 4, "num_experts_per_tok": 2} | overrides),
        "qwen2_moe": lambda: Qwen2MoeConfig(
            **llama_like | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
                            "shared_expert_intermediate_size": 16, "experts_implementation": "eager"} | overrides
        ),
        "gpt_oss": lambda: GptOssConfig(
            **llama_like | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4,
                            "layer_types": ["sliding_attention", "full_attention"],
                            "experts_implementation": "eager"} | overrides
        ),
        "stablelm": lambda: StableLmConfig(**llama_like | overrides),
    }  # fmt: skip
    generator_state = torch.get_rng_state()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configs[family](), dtype=dtype)
    torch.set_rng_state(generator_state)
    return model


# Token ids of the tiny vocabulary; -100 where nothing is scored. Lengths 5, 2, 3, 1 and 4: at 8 tokens a pack,
# best fit decreasing gives [5, 3], [4, 2, 1].
ROWS = [
    {"input_ids": [3, 4, 5, 6, 1], "labels": [-100, -100, 5, 6, 1]},
    {"input_ids": [7, 1], "labels": [7, 1]},
    {"input_ids": [8, 9, 1], "labels": [-100, 9, 1]},
    {"input_ids": [10], "labels": [10]},
    {"input_ids": [11, 12, 13, 1], "labels": [-100, -100, 13, 1]},
]


def token_rows(count: int, max_length: int = 12, seed: int = 0) -> Dataset:
    """Random rows of 2 to `max_length` tokens, the first third of each a prompt that is not scored."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(2, max_length + 1, (1,), generator=generator))
        ids = torch.randint(3, len(VOCAB), (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return Dataset.from_list(rows)
