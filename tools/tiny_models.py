"""Every causal language model of transformers, so small that a test trains it: two or more layers of width 32, random
weights in float64.

A configuration is shrunk by the names of its fields, which families share; what they do not share is in `EXTRAS`, with
the reason. A family that a new transformers brings is therefore built without a line here, or says why it is not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB_SIZE = 64  # that of `shapes.tiny_tokenizer`
# Smaller than the documents, so that a window inside of them counts
WINDOW = 4
KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_layers", "attn_layers")


def _named(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# By the name of the field, wherever a configuration has it and it is not None.
SIZES: dict[str, Any] = {
    **_named(32, "hidden_size n_embd d_model emb_dim embedding_dim embedding_size lru_width word_embed_proj_dim"),
    **_named(32, "input_embedding_size output_embedding_size attention_hidden_size cross_attention_hidden_size"),
    **_named(4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads"),
    **_named(4, "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    **_named(4, "swa_num_attention_heads linear_num_value_heads linear_num_heads num_query_groups"),
    **_named(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads linear_num_key_heads"),
    # of two heads, both rectified, many scores would be 0, and which of them are the largest is arbitrary
    **_named(16, "index_n_heads indexer_n_heads"),
    **_named(8, "head_dim kv_channels d_head dim_head attention_head_size swa_head_dim v_head_dim global_head_dim"),
    **_named(8, "linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim qk_nope_head_dim"),
    **_named(4, "qk_rope_head_dim rotary_dim"),
    **_named(12, "qk_head_dim"),
    **_named(16, "q_lora_rank kv_lora_rank o_lora_rank gated_norm_rank hc_lowrank laurel_rank d_rel"),
    **_named(48, "intermediate_size ffn_dim d_inner dff dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"),
    **_named(48, "n_inner"),
    **_named(48, "intermediate_size_mlp dense_intermediate_size feed_forward_size prefix_dense_intermediate_size"),
    **_named(16, "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size"),
    **_named(16, "shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size"),
    **_named(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts"),
    **_named(1, "n_group topk_group num_expert_group first_k_dense_replace n_shared_experts num_shared_experts"),
    **_named(VOCAB_SIZE, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    **_named(8, "hidden_size_per_layer_input"),
    # positions for a pack as a whole, for what counts through it
    **_named(128, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length"),
    **_named(128, "max_source_positions model_max_length rel_extent relative_max_distance"),
    **_named(WINDOW, "sliding_window attention_window_size window_size sliding_window_size local_attention"),
    **_named(WINDOW, "attention_chunk_size keep_window_size index_topk"),
    **_named(8, "mamba_d_state state_size ssm_state_size mamba_dt_rank time_step_rank mamba_d_head mamba_head_dim"),
    **_named(8, "mamba_headdim mamba_chunk_size chunk_size block_size n_mamba_d_head router_hidden_size"),
    **_named(8, "mamba_n_heads mamba_num_heads"),
    **_named(2, "n_groups n_mamba_heads"),
    # what would be 1 or, with weights this small, do nothing
    **_named(2.0, "logits_scaling embedding_multiplier logits_mup_width_multiplier"),
    **_named(0.5, "lm_head_multiplier residual_multiplier"),
    **_named(0.3, "attention_multiplier"),
    **_named(5.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    **_named(3.0, "attn_logit_softcapping"),
    # one kind of layer each, from the second on
    **_named(1, "max_window_layers moe_layer_start_index num_dense_layers"),
    **_named(0.0, "router_jitter_noise input_jitter_noise"),
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
}  # fmt: skip
LAYERS = _named(
    2,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers "
    "num_blocks num_layers_per_stack",
)

_MLA = {"num_key_value_heads": 4}
_CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
_SWA = ("num_attention_heads", "num_key_value_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")

# Fields that the rules above do not set, and why.
EXTRAS: dict[str, dict[str, Any]] = {
    # by default all layers are of one kind, which would leave the other out
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": _CONVOLUTION,
    "lfm2_moe": _CONVOLUTION,
    "smollm3": {"no_rope_layers": [1, 0]},
    "llama4_text": {"no_rope_layers": [1, 0], "moe_layers": [1]},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"], "num_experts_per_tok": 1, "sliding_window": WINDOW},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "position_embedding_type": "rope"},
    # fields that have to fit each other
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        "full_attention": None,
    }},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "nemotron": {"num_key_value_heads": 2},
    "dots3_note_text": _MLA | {f"swa_{name}": SIZES[name] for name in _SWA} | {
        "swa_num_key_value_heads": 4, "swa_head_dim": 12, "head_dim": 12,
    },
    "flint": {"mlp_only_layers": [0]},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "per_layer_config": None},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [48] * 4,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 4,
        "indexer_compress_ratio": 2, "hc_count": 2,
    },
    "reformer": {"axial_pos_embds": False, "num_buckets": 4},
    "xmod": {"default_language": "en_XX"},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4, "n_mamba_heads": 8,
        "num_key_value_heads": 4, "adapter_rank": 8, "attention_hidden_size": 64, "attention_head_dim": 16,
    },
}  # fmt: skip
# Not built, and why.
LEFT_OUT: dict[str, str] = {
    "gemma4_assistant": "drafts for another model, whose keys and values it takes; no language model by itself",
    "gemma3n": "its vision tower needs the package timm; gemma3n_text is its language model",
    "musicgen": "predicts several codebooks of audio at each position",
    "musicgen_melody": "predicts several codebooks of audio at each position",
    "gemma4_unified_assistant": "drafts for another model, whose keys and values it takes; no language model by itself",
}


def families() -> list[str]:
    """Every `model_type` that `AutoModelForCausalLM` knows."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def is_adapted(model_type: str) -> bool:
    """Whether it is the decoder of an encoder-decoder, or an encoder with a causal mask: no decoder by default."""
    if model_type.startswith("gpt_neox"):  # a decoder whose configuration has the field all the same
        return False
    default = CONFIG_MAPPING[model_type]()
    return default.is_encoder_decoder or getattr(default, "is_decoder", None) is False


def tiny_config(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**shrunk(CONFIG_MAPPING[model_type]))


def tiny_model(model_type: str) -> PreTrainedModel:
    """Random weights from a fixed seed, none of them zero: a bias or a sink that is not there proves nothing."""
    torch.manual_seed(0)
    # transformers' grouped product of experts takes no float64
    config = tiny_config(model_type)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, experts_implementation="eager")
    return with_random_weights(model)


def with_random_weights(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, dtype=torch.float64)
            if isinstance(tensor, torch.nn.Parameter) and tensor.dim() > 1 and "A_log" not in name:
                tensor.copy_(0.2 * noise)
            elif isinstance(tensor, torch.nn.Parameter) or name.endswith("bias"):
                tensor += 0.1 * noise
    return model.train()


def shrunk(config_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """The fields in which the tiny configuration differs from the default."""
    default = config_class()
    values = default.to_dict()
    fields = {name: size for name, size in SIZES.items() if values.get(name) is not None}
    fields |= {name: 0.0 for name, value in values.items() if isinstance(value, float) and _is_dropout(name)}
    if "head_dim" in values:
        fields["head_dim"] = 8
    if fields.get("kv_lora_rank"):  # MLA: keys are made for every head
        fields |= {"num_key_value_heads": 4} | ({"head_dim": 4} if "head_dim" in values else {})
    if "sliding_window" in values:
        fields["sliding_window"] = WINDOW
    if values.get("is_decoder") is False:
        fields["is_decoder"] = True
    kinds = {name: list(dict.fromkeys(values[name])) for name in KINDS if isinstance(values.get(name), list)}
    if "use_sliding_window" in values:  # from it, the configuration tells the kinds by itself
        fields["use_sliding_window"] = True
        kinds.pop("layer_types", None)
    layers = max([2, *map(len, kinds.values())])
    fields |= {name: [each[i % len(each)] for i in range(layers)] for name, each in kinds.items()}
    fields |= {name: layers for name in LAYERS if isinstance(values.get(name), int)}
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = shrunk(type(part)) | {"model_type": part.model_type}
    return fields | EXTRAS.get(config_class.model_type, {})


def _is_dropout(name: str) -> bool:
    return "dropout" in name or "pdrop" in name or "layerdrop" in name or "drop_path" in name


class Float64Throughout(TorchDispatchMode):
    """While open, what a model casts to float32 or makes in it (norms, softmaxes, rotary tables) is float64.

    Its rounding would otherwise hide whether documents together give what each gives alone. Twenty families do not run
    in float64 without it, since they multiply a float32 by a weight.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        dtype = kwargs.get("dtype")
        if dtype is not None and dtype.is_floating_point:
            kwargs = kwargs | {"dtype": torch.float64}
        return func(*args, **kwargs)

    def __enter__(self) -> Any:
        self._before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_default_dtype(self._before)
