"""Rows with pictures: planning from the headers of files, loading, and `train()` against TRL on padded batches of 8.

Texts are log-normal, pictures JPEG files of log-normal sizes. A tiny Idefics3 model with its real processor (the splits
and the tokens per picture of SmolVLM, scaled down): what is compared is how much of the work is padding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import torch
from harness.measure import Figure, Settings, device, figure, synchronize, training_dtype
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from packsft import PackedSFTConfig, PackedSFTTrainer
from packsft.data.pictures import PictureRows, with_hidden_pictures

PLANNED, MAX_LENGTH, FILES = 100_000, 2048, 200
ASKS = "<image> "


def bench(settings: Settings) -> Iterator[Figure]:
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        files = picture_files(Path(folder))
        yield planning(files, PLANNED // 50 if settings.quick else PLANNED)
        rows = rows_with_pictures(files, 16 if settings.quick else 96)
        yield from training(rows, folder)
        yield from loading(rows, folder)


def planning(files: list[str], count: int) -> Figure:
    """Seconds to plan rows from headers, in one process."""
    rows, processor = with_hidden_pictures(rows_with_pictures(files, count)), make_processor()
    collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)
    start = time.perf_counter()
    planned = PictureRows(rows, collator, MAX_LENGTH, None, "train")
    seconds = time.perf_counter() - start
    share = planned.picture_tokens.sum() / planned.lengths.sum()
    return figure(
        f"planning {count:,} rows from headers, one process", seconds, "s", rate=count / seconds, rate_unit="rows/s",
        ratio=seconds * PLANNED / count, ratio_of=f"seconds for {PLANNED:,} rows", at_most=60,
        note=f"{share:.0%} of the tokens are of pictures; longest row / mean: "
        f"{planned.lengths.max() / planned.lengths.mean():.1f}",
    )  # fmt: skip


def training(rows: datasets.Dataset, folder: str) -> Iterator[Figure]:
    """Tokens per second of the second epoch of `train()`, ours with the steps of TRL's padded batches of 8."""
    ours, theirs = make_trainer(rows, folder, True), make_trainer(rows, folder, False)
    tokens = int(ours.train_dataset.rows.lengths.sum())
    seconds = {}
    for name, trainer in (("packsft, exact steps", ours), ("TRL, padded, batch 8", theirs)):
        trainer.train()  # warm
        synchronize()
        start = time.perf_counter()
        trainer.train()
        synchronize()
        seconds[name] = time.perf_counter() - start
    speed = {name: tokens / taken for name, taken in seconds.items()}
    (first, fast), (second, slow) = speed.items()
    yield figure(first, fast, "tokens/s", ratio=fast / slow, ratio_of=f"speed of {first} / {second}", at_least=1.0)
    yield figure(second, slow, "tokens/s")
    report = ours.packing_report
    batches = np.array_split(ours.train_dataset.rows.lengths, max(1, len(rows) // 8))
    padded = sum(batch.max() * len(batch) for batch in batches)
    yield figure("fill of passes", 100 * report.fill, "%", note=f"of padded batches of 8: {tokens / padded:.0%}")
    losses = [[entry["loss"] for entry in trainer.state.log_history if "loss" in entry] for trainer in (ours, theirs)]
    difference = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    allowed = {torch.bfloat16: 2e-2}.get(training_dtype(), 1e-3)
    yield figure("losses of the steps, ours beside TRL's", difference, "relative", at_most=allowed, parity=True)


def loading(rows: datasets.Dataset, folder: str) -> Iterator[Figure]:
    """Rows per second of the loader alone: decoded, processed and packed."""
    for workers in (0, 2):
        loader = make_trainer(rows, folder, True, dataloader_num_workers=workers).get_train_dataloader()
        start = time.perf_counter()
        documents = sum(batch["num_documents"] for step in loader for batch in step["passes"])
        rate = documents / (time.perf_counter() - start)
        yield figure(f"the loader alone, {workers} workers", rate, "rows/s")


def picture_files(folder: Path) -> list[str]:
    """JPEG files of `FILES` log-normal sizes, median 480 by 480."""
    rng, files = np.random.default_rng(0), []
    for number in range(FILES):
        height, width = np.clip(np.exp(rng.normal(np.log(480), 0.6, 2)), 64, 2048).astype(int)
        shades = np.add.outer(np.linspace(0, 127, height), np.linspace(0, 127, width)).astype(np.uint8)
        files.append(str(folder / f"{number}.jpg"))
        PIL.Image.fromarray(np.stack([shades] * 3, axis=-1)).save(files[-1])
    return files


def rows_with_pictures(files: list[str], count: int) -> datasets.Dataset:
    """Prompts with no, one or two pictures, and completions of log-normal length."""
    rng = np.random.default_rng(1)
    numbers = rng.choice([0, 1, 1, 1, 2], count)
    words = np.clip(np.exp(rng.normal(np.log(60), 0.8, (2, count))), 2, 600).astype(int)
    text, pictures = datasets.Value("string"), datasets.List(datasets.Image())
    columns = {
        "prompt": [ASKS * number + "a " * length for number, length in zip(numbers, words[0] // 2, strict=True)],
        "completion": ["b " * length for length in words[1]],
        "images": [[{"path": files[rng.integers(FILES)], "bytes": None} for _ in range(number)] for number in numbers],
    }
    features = datasets.Features({"prompt": text, "completion": text, "images": pictures})
    return datasets.Dataset.from_dict(columns, features=features)


def make_processor() -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "\n", "\n\n", "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")  # the processor counts its line breaks
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    fast.add_tokens([AddedToken(token, special=True) for token in ("<global-img>", *places)])
    pil = Idefics3ImageProcessorPil(size={"longest_edge": 256}, max_image_size={"longest_edge": 64})
    return Idefics3Processor(pil, fast, image_seq_len=16)


def make_trainer(rows: datasets.Dataset, folder: str, ours: bool, **options: Any) -> Any:
    processor = make_processor()
    tokenizer = processor.tokenizer
    torch.manual_seed(0)
    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": len(tokenizer), "pad_token_id": 0}  # fmt: skip
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
             "patch_size": 8, "image_size": 64}  # fmt: skip
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = Idefics3Config(
        text_config={"model_type": "llama", **text}, vision_config=tower, scale_factor=2, image_token_id=image,
        pad_token_id=0,
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config).to(device(), training_dtype())
    settings = {
        "output_dir": folder, "max_length": MAX_LENGTH, "per_device_train_batch_size": 8, "num_train_epochs": 1,
        "gradient_checkpointing": False, "learning_rate": 1e-4, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "bf16": training_dtype() == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(), "dataloader_pin_memory": torch.cuda.is_available(), **options,
    }  # fmt: skip
    if ours:
        return PackedSFTTrainer(model, PackedSFTConfig(**settings), train_dataset=rows, processing_class=processor)
    return SFTTrainer(model, SFTConfig(packing=False, **settings), train_dataset=rows, processing_class=processor)
