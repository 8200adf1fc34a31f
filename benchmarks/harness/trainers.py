"""Builds every trainer that is compared, with the same settings. Knows TRL; knows no clock."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from harness.measure import training_dtype

OURS = "packsft"
EXACT = "packsft, exact steps"
OURS_COMPILED = "packsft, compiled layers"
OURS_LIGER = "packsft + Liger layer kernels"
TRL_PACKED = "TRL, packing=True"
TRL_OUR_ATTENTION = "TRL, packing=True, packsft's attention"
TRL_LIGER = "TRL, packing=True + Liger layer kernels"
TRL_PADDED = "TRL, padded, batch 8"


@dataclass(frozen=True)
class Competitor:
    """A trainer and its configuration.

    Args:
        ours: `PackedSFTTrainer` instead of TRL's `SFTTrainer`.
        strategy: how examples are packed; "" for padded batches of 8.
        liger: Liger's kernels for RMSNorm, SwiGLU and RoPE. Its losses are not among them: TRL refuses to be given its
            fused one, and `cross_entropy` is off in Liger itself.
        attention: the `attn_implementation` that is set on the model; "" for the best that TRL can pack with.
        arguments: further ones, of `SFTConfig` or `PackedSFTConfig`.
    """

    ours: bool
    strategy: str = "bfd"
    liger: bool = False
    attention: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def why_not(self) -> str:
        """The reason why it cannot run on this machine, or ''."""
        if self.liger and importlib.util.find_spec("liger_kernel") is None:
            return "liger-kernel is not installed"
        if self.liger and not torch.cuda.is_available():
            return "Liger's kernels are written in Triton and need a GPU"
        return ""

    def configuration(self) -> dict[str, Any]:
        """What differs from the other competitors, as arguments of the configuration."""
        if not self.strategy:
            return {"packing": False, "per_device_train_batch_size": 8, **self.arguments}
        chosen: dict[str, Any] = {"packing": True, "packing_strategy": self.strategy, "per_device_train_batch_size": 1}
        chosen |= {"use_liger_kernel": True} if self.liger else {}
        return chosen | dict(self.arguments)

    @contextlib.contextmanager
    def contained(self, model: Any) -> Iterator[None]:
        """Open around constructor and `train()`: what they change outside of the model is as before afterwards.

        Liger puts its RoPE and its classes in the place of those in the model's module, for all models to come.
        packsft's attention is handed a mask outside of `packed_forward`, for which TRL would build one in vain; inside
        it raises an error where boundaries do not arrive.
        """
        from packsft.model.attention import packed_forward

        module = vars(sys.modules[type(model).__module__])
        before = dict(module)
        try:
            with packed_forward() if self.attention == "packsft" else contextlib.nullcontext():
                yield
        finally:
            module.update(before)


COMPETITORS = {
    OURS: Competitor(True),
    TRL_PACKED: Competitor(False),
    TRL_OUR_ATTENTION: Competitor(False, attention="packsft"),
    OURS_LIGER: Competitor(True, liger=True),
    OURS_COMPILED: Competitor(True, arguments={"compile_layers": True}),
    TRL_LIGER: Competitor(False, liger=True),
    TRL_PADDED: Competitor(False, strategy=""),
    # its steps are those of padded batches of 8
    EXACT: Competitor(True, "step", arguments={"per_device_train_batch_size": 8}),
}


def flash_attention() -> str:
    """The flash attention that transformers finds here, as an `attn_implementation`; '' without one."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    found = {"flash_attention_3": is_flash_attn_3_available, "flash_attention_2": is_flash_attn_2_available}
    return next((name for name, is_available in found.items() if torch.cuda.is_available() and is_available()), "")


def build_trainer(
    name: str, model: Any, tokenizer: Any, dataset: Any, output_dir: str, *, peft_config: Any = None, **arguments: Any
) -> Any:
    """One of `COMPETITORS`, ready for `train()`, with the same settings for all.

    Args:
        dataset: prompt/completion examples, or `input_ids` and `labels`.
        peft_config: of an adapter to train instead of the model.
        arguments: of `SFTConfig`, over the defaults here.
    """
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    from packsft import PackedSFTConfig, PackedSFTTrainer

    competitor = COMPETITORS[name]
    defaults: dict[str, Any] = {
        "output_dir": output_dir,
        "max_length": 1024,
        "gradient_checkpointing": False,  # TRL's default is True
        "num_train_epochs": 1,
        "learning_rate": 1e-5,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": training_dtype() == torch.bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    settings = defaults | competitor.configuration() | arguments
    if competitor.attention:
        model.set_attn_implementation(competitor.attention)
    elif not competitor.ours and model.dtype.itemsize == 2 and flash_attention():
        model.set_attn_implementation(flash_attention())
    if competitor.strategy == "step":
        settings["tokens_per_pass"] = settings["max_length"]
    config = (PackedSFTConfig if competitor.ours and competitor.arguments else SFTConfig)(**settings)
    trainer = (PackedSFTTrainer if competitor.ours else SFTTrainer)(
        model=model, args=config, train_dataset=dataset, processing_class=tokenizer, peft_config=peft_config
    )
    trainer.remove_callback(PrinterCallback)  # a line of metrics per step would bury the tables
    return trainer
