"""Tiny vision-language models with real processors, made offline, and rows with pictures that are drawn here."""

from __future__ import annotations

import random
import sys
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import torch
import transformers
from datasets import Dataset, Features, Image, List, Value
from tiny import WORDS
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import CLIPVisionConfig, LlamaConfig, PixtralVisionConfig, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

with mock.patch.dict(sys.modules, {f"torchvision{name}": mock.MagicMock() for name in ("", ".transforms.v2")}):
    # it only reads sizes, but imports what needs torchvision
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

QWEN = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
IDEFICS = ["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"] + [
    f"<row_{row}_col_{col}>" for row in range(1, 5) for col in range(1, 5)
]
TEXT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
MROPE = {"type": "mrope", "mrope_section": [1, 1, 2]}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'][0]['text'] }} <eos>{% endgeneration %}"
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}"
    "{{ part['text'] }} {% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def tokenizer_with(special: list[str], **named: str) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *WORDS.split(), "\n", "\n\n", *special]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=named or special,
    )  # fmt: skip
    fast.add_tokens([AddedToken(token, special=True) for token in special])
    return fast


def of_pictures_alone(processor_class: type) -> type:
    """The processor without videos, whose processors need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **own):
        with mock.patch.object(ProcessorMixin, "__init__", return_value=None):
            processor_class.__init__(self, image_processor, tokenizer, None, **own)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    return type(processor_class.__name__, (processor_class,), {"__init__": __init__})


def _qwen(family: str) -> tuple[Any, Any, str]:
    tokenizer = tokenizer_with(QWEN)
    ids = dict(zip(QWEN, tokenizer.convert_tokens_to_ids(QWEN), strict=True))
    processor = of_pictures_alone(Qwen2VLProcessor)(
        Qwen2VLImageProcessorPil(min_pixels=16 * 16, max_pixels=64 * 64, patch_size=4, merge_size=2), tokenizer
    )
    tower = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    tower |= {
        "Qwen2VL": {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        "Qwen2_5_VL": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16,
                       "fullatt_block_indexes": [1]},
        "Qwen3VL": {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24,
                    "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64},
    }[family]  # fmt: skip
    text = TEXT | {"vocab_size": len(tokenizer), "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                                     "mrope_section": [1, 1, 2]}}  # fmt: skip
    text |= {"head_dim": 8} if family == "Qwen3VL" else {}
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=tower, image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"], vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForConditionalGeneration")
    return config, (model, processor), "<|vision_start|> <|image_pad|> <|vision_end|> "


def _llava(family: str) -> tuple[Any, Any, str]:
    pixtral = family == "Pixtral"
    special = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"] if pixtral else ["<image>"]
    tokenizer = tokenizer_with(special)
    image = tokenizer.convert_tokens_to_ids(special[0])
    text = LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)})
    size = {"height": 32, "width": 32}
    if pixtral:
        tower = PixtralVisionConfig(**TOWER | {"image_size": 64})
        processor = PixtralProcessor(
            PixtralImageProcessorPil(patch_size=8, size={"longest_edge": 64}), tokenizer, patch_size=8
        )
    else:
        tower = CLIPVisionConfig(**TOWER | {"image_size": 32})
        pil = CLIPImageProcessorPil(size=size, crop_size=size)
        if family == "LlavaNext":
            pil = LlavaNextImageProcessorPil(
                size={"shortest_edge": 32}, crop_size=size, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]]
            )
        processor = getattr(transformers, f"{family}Processor")(
            pil, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1
        )
    name = "Llava" if pixtral else family
    more = {"image_grid_pinpoints": [[32, 64], [64, 32], [64, 64]]} if family == "LlavaNext" else {}
    more |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1} if pixtral else {}
    config = getattr(transformers, f"{name}Config")(
        text_config=text, vision_config=tower, image_token_index=image, image_token_id=image, **more
    )
    return config, (getattr(transformers, f"{name}ForConditionalGeneration"), processor), f"{special[0]} "


def _idefics(family: str) -> tuple[Any, Any, str]:
    tokenizer = tokenizer_with(IDEFICS)
    image = tokenizer.convert_tokens_to_ids("<image>")
    pil = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    processor = transformers.Idefics3Processor(pil, tokenizer, image_seq_len=4)
    if family == "SmolVLM":
        pil = SmolVLMImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
        with mock.patch(f"{SmolVLMProcessor.__module__}.num2words", object()):  # for videos
            processor = of_pictures_alone(SmolVLMProcessor)(pil, tokenizer, image_seq_len=4)
    text = LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)})
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=TOWER | {"image_size": 32}, scale_factor=2, image_token_id=image, pad_token_id=0
    )
    return config, (getattr(transformers, f"{family}ForConditionalGeneration"), processor), "<image> "


def _internvl(family: str) -> tuple[Any, Any, str]:
    special = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    tokenizer = tokenizer_with([*special.values(), "<video>"], **special, video_token="<video>")
    pil = GotOcr2ImageProcessorPil(size={"height": 32, "width": 32}, min_patches=1, max_patches=4, crop_to_patches=True)
    image = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    processor = of_pictures_alone(InternVLProcessor)(pil, tokenizer, image_seq_length=4)
    config = transformers.InternVLConfig(
        text_config=LlamaConfig(**TEXT | {"vocab_size": len(tokenizer)}),
        vision_config=TOWER | {"image_size": [32, 32], "patch_size": [8, 8]}, image_token_id=image, image_seq_length=4,
    )  # fmt: skip
    return config, (transformers.InternVLForConditionalGeneration, processor), "<IMG_CONTEXT> "


def _gemma(family: str) -> tuple[Any, Any, str]:
    special = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    tokenizer = tokenizer_with(list(special.values()), **special)
    pil = Gemma3ImageProcessorPil(size={"height": 32, "width": 32})
    processor = transformers.Gemma3Processor(pil, tokenizer, image_seq_length=4)
    text = TEXT | {"vocab_size": len(tokenizer), "head_dim": 8, "sliding_window": 4, "layer_types": None}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=TOWER | {"image_size": 32}, mm_tokens_per_image=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
    )  # fmt: skip
    return config, (transformers.Gemma3ForConditionalGeneration, processor), "<start_of_image> "


def _mllama(family: str) -> tuple[Any, Any, str]:
    tokenizer = tokenizer_with(["<|image|>", "<|python_tag|>"])
    tokenizer.bos_token = "<eos>"
    pil = MllamaImageProcessorPil(size={"height": 32, "width": 32}, max_image_tiles=4)
    processor = transformers.MllamaProcessor(pil, tokenizer)
    tower = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "attention_heads": 2, "patch_size": 8,
        "num_global_layers": 1, "vision_output_dim": 32, "intermediate_layers_indices": [0], "image_size": 32,
        "max_num_tiles": 4, "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    text = TEXT | {"vocab_size": len(tokenizer), "cross_attention_layers": [1], "num_hidden_layers": 3}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    image = tokenizer.convert_tokens_to_ids("<|image|>")
    config = transformers.MllamaConfig(text_config=text, vision_config=tower, image_token_index=image)
    return config, (transformers.MllamaForConditionalGeneration, processor), "<|image|> "


FAMILIES = {
    **dict.fromkeys(("Qwen2VL", "Qwen2_5_VL", "Qwen3VL"), _qwen),
    **dict.fromkeys(("Llava", "LlavaNext", "Pixtral"), _llava),
    **dict.fromkeys(("Idefics3", "SmolVLM"), _idefics),
    "InternVL": _internvl,
    "Gemma3": _gemma,
    "Mllama": _mllama,
}


def vision_model(family: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Any, str]:
    """(model, processor, how a text asks for a picture)."""
    config, (model_class, processor), asks = FAMILIES[family](family)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    model = (
        model_class._from_config(config, dtype=dtype) if hasattr(model_class, "_from_config") else model_class(config)
    )
    torch.set_rng_state(state)
    processor.chat_template = CHAT_TEMPLATE.replace("IMAGE", asks)
    return model, processor, asks


def drawn(height: int, width: int) -> PIL.Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def rows_with_pictures(count: int, asks: str, seed: int = 0) -> Dataset:
    """Prompts with no, one or two pictures of several sizes, and completions."""
    draw = random.Random(seed)
    words = WORDS.split()
    rows = []
    for _ in range(count):
        pictures = [
            drawn(draw.choice([20, 32, 48]), draw.choice([24, 40, 64])) for _ in range(draw.choice([0, 1, 1, 2]))
        ]
        prompt = asks * len(pictures) + " ".join(draw.choices(words, k=draw.randint(1, 5))) + " "
        rows.append({
            "prompt": prompt, "completion": " ".join(draw.choices(words, k=draw.randint(1, 6))) + " <eos>",
            "images": pictures,
        })  # fmt: skip
    text = Value("string")
    return Dataset.from_list(rows, features=Features({"prompt": text, "completion": text, "images": List(Image())}))
