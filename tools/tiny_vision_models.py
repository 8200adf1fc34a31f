"""Every vision-language model of transformers, so small that a test trains it, with its own processor, made offline.

Widths and layers are shrunk as in `tiny_models.py`. What a model and its processor have to agree on, the sizes of
pictures and patches, stays as it is by default. The tokenizer has the special tokens that the processor's source names.
What families do not share is in `EXTRAS`, with the reason.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any

import any_torchvision  # noqa: F401
import numpy as np
import PIL.Image
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from tiny_models import shrunk, with_random_weights
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from packsft.data.pictures import placeholder_of

WIDTH, VOCAB_SIZE, POSITIONS = 32, 256, 8192
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# What a tower and its processor agree on, and what its output has to fit
AS_IT_IS = ["image_size", "patch_size", "temporal_patch_size", "spatial_merge_size"]
NOT_SHRUNK = ["window_size", "max_position_embeddings", "chunk_size", "block_size", "sliding_window", "vocab_size"]
OUTPUTS = ["out_hidden_size", "embed_dim", "projection_dim", "output_dim", "projector_hidden_size", "text_hidden_size"]

ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "partial_rotary_factor": 1.0}
MROPE = {"config": {"text_config": {"rope_parameters": ROPE}}}
CLASS_TOKEN = {"processor": {"num_additional_image_tokens": 1}}
IDEFICS = {
    "config": {"vision_config": {"patch_size": 14}}, "processor": {"image_seq_len": 64},
    "image_processor": {"size": {"longest_edge": 448}, "max_image_size": {"longest_edge": 224}},
}  # fmt: skip
MINICPM = {"config": {"insert_layer_id": 0, "vision_config": {"insert_layer_id": 0}}}
GEMMA3 = {
    "config": {"vision_config": {"patch_size": 14}, "mm_tokens_per_image": 16}, "processor": {"image_seq_length": 16},
    "ids": {"image_token_id": "<image>"},
}  # fmt: skip
GEMMA4 = {"config": {"vision_config": {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8,
    "intermediate_size": 48,
}}}  # fmt: skip
OMNI = {
    "processors_of": "qwen2_vl", "asks": "<vision_bos> <image> <vision_eos>",
    "ids": {"vision_start_token_id": "<vision_bos>", "audio_start_token_id": "<audio_bos>"},
}  # fmt: skip

# Per family: `config` and arguments of the `processor` and the `image_processor` over the rules; `tokens`, further ones
# of the tokenizer, by name; `ids`, the tokens of fields of the configuration; `asks`, what a text has for a picture;
# `processor_class` and `processors_of` where the registry has none; `always`, a picture in every row;
# `texts`, no prompts and completions.
EXTRAS: dict[str, dict[str, Any]] = {
    # their sections of the rotary dimensions, which have to fit
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), MROPE),
    **dict.fromkeys(("glm4v", "glm46v", "paddleocr_vl"), MROPE),
    "qwen3_vl_moe": MROPE | {"processors_of": "qwen3_vl"},
    "glm4v_moe": MROPE | {"processors_of": "glm4v"},
    "glm_ocr": MROPE | {"processor_class": "Glm46VProcessor", "processors_of": "glm46v"},
    "glmga": MROPE | {"processor_class": "Glm46VProcessor"},
    "cosmos3_omni": MROPE | {"processor_class": "Qwen3VLProcessor"},
    "hunyuan_vl": {
        "config": {"text_config": {"head_dim": 8, "rope_parameters": ROPE}}, "asks": "<image_start><image><image_end>",
    },
    # the class token of CLIP, which the processor has to know of
    **dict.fromkeys(["llava", "llava_next", "llava_next_video"], CLASS_TOKEN),
    "vipllava": {
        "processor": {"num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"},
        "config": {"vision_feature_layers": [-1, -2]},
    },
    # defaults of model and processor that do not fit each other
    "aria": {
        "config": {"vision_config": {"image_size": 980, "patch_size": 14}}, "image_processor": {"max_image_size": 490},
    },
    "aya_vision": {
        "config": {"vision_config": {"image_size": 364}}, "processor": {"patch_size": 28, "img_size": 364},
    },
    **dict.fromkeys(("idefics3", "smolvlm"), IDEFICS),
    **dict.fromkeys(("gemma3", "t5gemma2", "shieldgemma2"), GEMMA3),
    **dict.fromkeys(("gemma4", "gemma4_unified"), GEMMA4),
    "kimi_k25": {"config": {"projection_hidden_size": 32, "vision_config": {"projection_hidden_size": 32}}},
    "muse_glimmer": {"config": {"out_hidden_size": 128, "projector_hidden_size": 32}},
    "mllama": {"texts": True, "config": {
        "vision_config": {"intermediate_layers_indices": [0], "vision_output_dim": 64},
        "text_config": {"cross_attention_layers": [1]},
    }},
    "llama4": {
        "config": {"vision_config": {
            "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "intermediate_size": 128,
        }},
        "ids": {"image_token_id": "<|patch|>"},
    },
    "ovis2": {
        "tokens": {"atom_token": "<IMG_ATOM>"}, "ids": {"image_token_id": "<IMG_ATOM>"},
        "config": {"visual_indicator_token_ids": [245, 246, 247, 248, 249]},
    },
    # a merger that has to be in one of the layers
    **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), MINICPM),
    "deepseek_ocr2": {"config": {"text_config": {"mlp_layer_types": ["dense", "sparse"]}}},
    # tokens that no rule finds
    "minimax_m3_vl": {"tokens": {
        "image_token": "]<]image[>[", "video_token": "]<]video[>[", "vision_start_token": "]<]start of image[>[",
        "vision_end_token": "]<]end of image[>[",
    }},
    "qwen2_5_omni_thinker": MROPE | OMNI | {"processor_class": "Qwen2_5OmniProcessor"},
    "qwen3_omni_moe_thinker": MROPE | OMNI | {"processor_class": "Qwen3OmniMoeProcessor"},
    # the processor or the model takes no row without a picture
    "blip-2": {"always": True, "processor": {"num_query_tokens": 32}},
    "paligemma": {"always": True, "texts": True, "image_processor": {"image_seq_length": 256}},
    # fewer crops, for a shorter run
    "internvl": {"image_processor": {"max_patches": 2}},
    "mistral3": {"processor_class": "PixtralProcessor"},
}  # fmt: skip
_NO_PLACEHOLDER = "its processor has no token for a picture in a text"
_ENCODER = "an encoder-decoder: the labels are another text than the input, which TRL does not train"
_TIMM = "its tower needs the package timm"
LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(["blip", "git", "idefics", "kosmos-2", "pp_chart2table", "instructblipvideo"], _NO_PLACEHOLDER),
    **dict.fromkeys(
        ["florence2", "pix2struct", "pp_formulanet", "t5gemma2", "udop", "vision-encoder-decoder"], _ENCODER
    ),
    **dict.fromkeys(["fast_vlm", "gemma3n", "perception_lm"], _TIMM),
    **dict.fromkeys(("chameleon", "emu3"), "its pictures are words of a vocabulary that only a real tokenizer has"),
    "diffusion_gemma": "denoises blocks; no causal language model",
    "evolla": "its second input are proteins",
    "pi0": "predicts the movements of a robot",
    "mistral4": "a language model without a tower",
}


def families() -> list[str]:
    """Every `model_type` that `AutoModelForImageTextToText` knows."""
    return list(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)


def tiny_vision_model(model_type: str) -> tuple[PreTrainedModel, Any, Dataset]:
    """(model in float64, processor, rows with pictures)."""
    extras = EXTRAS.get(model_type, {})
    processor = tiny_processor(model_type)
    config = tiny_config(model_type, processor)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float64, experts_implementation="eager")
    asks = extras.get("asks", placeholder_of(processor))
    rows = rows_with_pictures(asks, extras.get("always", False))
    if extras.get("texts"):
        texts = [row["prompt"] + row["completion"] for row in rows]
        rows = rows.remove_columns(["prompt", "completion"]).add_column("text", texts)
    return with_random_weights(model), processor, rows


def tiny_config(model_type: str, processor: Any) -> PreTrainedConfig:
    extras, config_class = EXTRAS.get(model_type, {}), CONFIG_MAPPING[model_type]
    default, fields = config_class(), shrunk(config_class)
    for name in config_class.sub_configs:
        part = getattr(default, name, None)
        if isinstance(fields.get(name), dict):
            fields[name] = _text(fields[name]) if part is default.get_text_config() else _tower(part, fields[name])
    values = default.to_dict()
    fields |= {name: WIDTH for name in OUTPUTS if values.get(name) is not None}
    fields |= {"vocab_size": VOCAB_SIZE} if "vocab_size" in fields else {}
    for name in values:
        if (match := re.fullmatch(r"(\w+_token)_(id|index)", name)) and name not in fields:
            token = _token_of(processor, match[1])
            fields |= {} if token is None else {name: token}
    for name, token in extras.get("ids", {}).items():
        fields[name] = processor.tokenizer.convert_tokens_to_ids(token)
        if (other := name.replace("_id", "_index")) in values:
            fields[other] = fields[name]
    return config_class(**_merged(fields, extras.get("config", {})))


def _text(fields: dict[str, Any]) -> dict[str, Any]:
    fields |= {name: VOCAB_SIZE for name in ("vocab_size", "vocab_size_per_layer_input") if name in fields}
    return fields | {"max_position_embeddings": POSITIONS}


def _tower(default: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    values = default.to_dict()
    fields = {name: value for name, value in fields.items() if name not in NOT_SHRUNK}
    fields |= {name: values[name] for name in AS_IT_IS if name in values}
    fields |= {name: WIDTH for name in OUTPUTS if isinstance(values.get(name), int)}
    return fields | {name: 2 for name in ("depth", "num_blocks") if name in values}


def _token_of(processor: Any, name: str) -> int | None:
    if name == "image_token" and hasattr(processor, "image_token_id"):
        return processor.image_token_id
    for holder in (processor, processor.tokenizer):
        if isinstance(token := getattr(holder, name, None), str):
            return processor.tokenizer.convert_tokens_to_ids(token)
    return getattr(processor, f"{name}_id", None)


def _merged(fields: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """Of nested configurations, every field over."""
    return fields | {
        name: _merged(fields[name], value) if isinstance(value, dict) and isinstance(fields.get(name), dict) else value
        for name, value in more.items()
    }


def tiny_processor(model_type: str) -> Any:
    """With the sizes of pictures and patches of the model's configuration."""
    extras = EXTRAS.get(model_type, {})
    processor_class = getattr(transformers, extras.get("processor_class") or PROCESSOR_MAPPING_NAMES[model_type])
    default = CONFIG_MAPPING[model_type](**extras.get("config", {}))
    sizes = _sizes(default)
    registered = extras.get("processors_of", model_type)
    given: dict[str, Any] = {}
    for name in inspect.signature(processor_class.__init__).parameters:
        if name == "tokenizer":
            given[name] = _tokenizer(processor_class, extras.get("tokens", {}))
        elif name == "image_processor":
            image_class = _registered(IMAGE_PROCESSOR_MAPPING_NAMES, registered)
            given[name] = image_class(**_image_options(image_class, sizes))
            vars(given[name]).update(extras.get("image_processor", {}))
        elif name == "video_processor":
            video_class = _registered(VIDEO_PROCESSOR_MAPPING_NAMES, registered)
            given[name] = video_class() if video_class else None
        elif name == "feature_extractor":
            given[name] = transformers.WhisperFeatureExtractor()
        elif sizes.get(name) is not None:
            given[name] = sizes[name]
    return processor_class(**given | extras.get("processor", {}))


def _sizes(config: PreTrainedConfig) -> dict[str, Any]:
    """What processors take from a configuration, by the names of their arguments."""
    tower = getattr(config, "vision_config", None)
    sizes = {name: _side(getattr(tower, name, None)) for name in AS_IT_IS}
    sizes["merge_size"] = sizes["spatial_merge_size"] or getattr(tower, "merge_size", None)
    if sizes["image_size"] and sizes["patch_size"]:
        sizes["num_image_tokens"] = (sizes["image_size"] // sizes["patch_size"]) ** 2
    names = ("vision_feature_select_strategy", "vision_aspect_ratio", "spatial_merge_size")
    return sizes | {name: getattr(config, name, None) for name in names}


def _side(size: Any) -> Any:
    return size[0] if isinstance(size, list | tuple) else size


def _registered(mapping: Any, model_type: str) -> Any:
    names = mapping.get(model_type)
    if isinstance(names, dict):
        names = names.get("torchvision" if is_torchvision_available() else "pil", names.get("pil"))
    return names and getattr(transformers, names)


def _image_options(image_class: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    options = {}
    for name in ("patch_size", "temporal_patch_size", "merge_size"):
        if (default := getattr(image_class, name, None)) is not None and sizes[name]:
            options[name] = dict.fromkeys(default, sizes[name]) if isinstance(default, dict) else sizes[name]
    for name in ("size", "crop_size"):
        default = getattr(image_class, name, None) or {}
        if isinstance(sizes["image_size"], int) and set(default) in ({"height", "width"}, {"shortest_edge"}):
            options[name] = dict.fromkeys(default, sizes["image_size"])
    return options


def _tokenizer(processor_class: type, more: dict[str, str]) -> PreTrainedTokenizerFast:
    """Words, and the special tokens that the source of the processor names: as attributes of the tokenizer, and as
    they are written."""
    source = inspect.getsource(importlib.import_module(processor_class.__module__))
    own = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    names = re.findall(r"tokenizer(?:\.|, \")((?!add_)\w+_token)\b", source)
    named = {name: f"<{name.removesuffix('_token')}>" for name in names if name not in own} | more
    written = re.findall(r"\"([<\[][^\"\s{}]+[>\]])\"", source)
    special = list(dict.fromkeys([*own.values(), *named.values(), *written]))
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS, "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, extra_special_tokens=named, **own)
    fast.add_tokens([AddedToken(token, special=True) for token in special])
    return fast


def rows_with_pictures(asks: str, always: bool = False) -> Dataset:
    """Prompts with no, one or two pictures of several sizes, and completions; `always`: only those with a picture."""
    rows = []
    for number, sizes in enumerate([[(40, 60)], [], [(64, 48)], [(30, 90), (56, 56)], [], [(84, 56)]]):
        if sizes or not always:
            prompt = f"{asks} zero " * len(sizes) + " ".join(WORDS[: number + 1]) + " "
            completion = " ".join(WORDS[number:][:4]) + " <eos>"
            rows.append({"prompt": prompt, "completion": completion, "images": [drawn(*size) for size in sizes]})
    text = Value("string")
    return Dataset.from_list(rows, features=Features({"prompt": text, "completion": text, "images": List(Image())}))


def drawn(height: int, width: int) -> PIL.Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)
