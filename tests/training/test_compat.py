"""What packsft relies on inside TRL, transformers and accelerate is still where it was: else a message says what moved.

`compat.py` is where it reaches; the trainer overrides methods of its parents. Neither is a public interface, so a new
release may change it without a word. These tests then name the place before a training goes wrong.
"""

import importlib
import inspect

import accelerate
import pytest
import transformers
import trl

from packsft import PackedSFTTrainer, compat

VERSIONS = f"trl {trl.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"

# module: names that compat.py takes from it, or puts something else in the place of
NAMES = {
    "trl.trainer.sft_trainer": "SFTTrainer add_fused_lm_head BaseTunerLayer DataCollatorForLanguageModeling "
    "get_training_chat_template has_generation_markers is_conversational is_conversational_from_value",
    "trl.trainer.utils": "maybe_gather_lm_head_ctx",
    "trl.cli": "main",
    "trl.cli.accelerate_launcher": "launch_training_script",
    "accelerate.commands.launch": "launch_command launch_command_parser",
    "accelerate.data_loader": "BatchSamplerShard IterableDatasetShard",
    "transformers.integrations.sdpa_attention": "sdpa_attention_forward",
    "transformers.masking_utils": "sdpa_mask _preprocess_mask_arguments",
}

# where: what its source does by that very text
SOURCES = {
    "trl.trainer.sft_trainer.SFTTrainer.__init__": ["add_fused_lm_head(", "BaseTunerLayer", "self._tokenizer ="],
    "trl.trainer.sft_trainer.SFTTrainer._prepare_dataset": ["args.max_length", "args.shuffle_dataset"],
    "trl.trainer.sft_trainer.SFTTrainer.log": ["super().log("],
    "trl.trainer.sft_trainer.SFTTrainer": ["self._total_train_tokens", "self.aux_loss_enabled"],
    "transformers.trainer.Trainer": [
        "self._tr_loss", "self._globalstep_last_logged", "self._train_batch_size", "self._signature_columns",
        "self.current_gradient_accumulation_steps", "self.model_accepts_loss_kwargs",
    ],
    "accelerate.data_loader.BatchSamplerShard": [
        "self.num_processes", "self.process_index", "self.even_batches", "self.split_batches",
    ],
    "accelerate.data_loader.IterableDatasetShard": [
        "self.num_processes", "self.process_index", "self.batch_size", "self.split_batches", "self.dataset",
    ],
    "transformers.masking_utils._preprocess_mask_arguments": ["ALL_MASK_ATTENTION_FUNCTIONS._global_mapping"],
}  # fmt: skip


def resolve(path):
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name, None)
        return found
    return None


def what_moved(names=NAMES, sources=SOURCES):
    """A line for each thing that is not where packsft looks for it."""
    moved = [
        f"{module}.{name} is gone ({VERSIONS}): see packsft/compat.py"
        for module, listed in names.items()
        for name in listed.split()
        if resolve(f"{module}.{name}") is None
    ]
    for path, texts in sources.items():
        source = inspect.getsource(resolve(path)) if resolve(path) is not None else ""
        moved += [
            f"{path} no longer has {text!r} ({VERSIONS}): see packsft/compat.py and packsft/trainer.py"
            for text in texts
            if text not in source
        ]
    return moved


def overrides():
    parent = trl.SFTTrainer
    own = vars(PackedSFTTrainer)
    return sorted(name for name in own if callable(own[name]) and callable(getattr(parent, name, None)))


def changed_parameters(name):
    """What a parent's method takes that ours does not pass on, or None."""

    def takes_anything(parameters):
        kinds = {parameter.kind for parameter in parameters.values()}
        return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds

    definitions = [vars(parent)[name] for parent in trl.SFTTrainer.__mro__ if name in vars(parent)]
    signatures = [inspect.signature(definition).parameters for definition in definitions]
    theirs = next((parameters for parameters in signatures if not takes_anything(parameters)), {})
    ours = inspect.signature(vars(PackedSFTTrainer)[name]).parameters
    if takes_anything(ours) or list(theirs) == list(ours):
        return None
    return f"SFTTrainer.{name} takes {list(theirs)}, and ours {list(ours)} ({VERSIONS}): see packsft/trainer.py"


def test_nothing_has_moved():
    assert what_moved() == []


def test_the_parents_methods_take_what_ours_take():
    assert len(overrides()) >= 15
    assert [line for name in overrides() if (line := changed_parameters(name)) is not None] == []


def test_what_has_moved_is_named(monkeypatch):
    monkeypatch.delattr("trl.trainer.sft_trainer.add_fused_lm_head")
    monkeypatch.setattr(trl.SFTTrainer, "log", lambda self, logs, step: None)
    gone, changed = what_moved()[0], changed_parameters("log")
    assert gone == f"trl.trainer.sft_trainer.add_fused_lm_head is gone ({VERSIONS}): see packsft/compat.py"
    assert changed.startswith("SFTTrainer.log takes ['self', 'logs', 'step'], and ours ['self', 'logs', 'start_time']")
    assert any(line.startswith("trl.trainer.sft_trainer.SFTTrainer.log no longer has") for line in what_moved())


@pytest.mark.parametrize(
    ("module", "version", "message"),
    [
        ("trl", "1.15.2", "packsft works with trl >= 1.16, < 2; found trl 1.15.2"),
        ("trl", "2.0.0", "packsft works with trl >= 1.16, < 2; found trl 2.0.0"),
        ("transformers", "5.16.1", "packsft works with transformers >= 5.17; found transformers 5.16.1"),
    ],
)
def test_a_version_outside_the_range_is_refused_by_name(module, version, message, monkeypatch):
    monkeypatch.setattr(getattr(compat, module), "__version__", version)
    with pytest.raises(ImportError) as refused:
        compat.check_versions()
    assert str(refused.value) == message


def test_the_range_is_that_of_the_requirements():
    from importlib.metadata import requires

    from packaging.requirements import Requirement

    ranges = {r.name: r.specifier for r in map(Requirement, requires("packsft"))}
    low, high = compat.TRL_RANGE
    assert str(low) in ranges["trl"]
    assert str(high) not in ranges["trl"]
    assert {str(one) for one in ranges["transformers"]} == {f">={compat.TRANSFORMERS_MIN}"}
