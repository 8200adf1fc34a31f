"""What packsft relies on inside TRL, transformers and accelerate is still where it was: else a message says what moved.

`compat.py` is where it reaches; the trainer overrides methods of its parents. Neither is a public interface, so a new
release may change it without a word. These tests then name the place before a training goes wrong.
"""

import importlib
import inspect
import re
import sys

import accelerate
import pytest
import transformers
import trl

from packsft import PackedSFTTrainer, compat
from packsft.checkpoints.resuming import WholeCheckpoints
from packsft.data.loaders import PackedLoaders
from packsft.step.boundary import StepBoundary
from packsft.step.exact import ExactSteps
from packsft.step.metrics import DeviceMetrics

VERSIONS = f"trl {trl.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"

# module: names that compat.py takes from it, or puts something else in the place of
NAMES = {
    "trl.trainer.sft_trainer": "SFTTrainer add_fused_lm_head BaseTunerLayer DataCollatorForLanguageModeling "
    "get_training_chat_template has_generation_markers is_conversational is_conversational_from_value",
    "trl.models.selective_activation_checkpointing": "_aten_attention_ops",
    "trl.trainer.utils": "maybe_gather_lm_head_ctx",
    "trl.cli": "main",
    "trl.cli.accelerate_launcher": "launch_training_script",
    "accelerate.commands.launch": "launch_command launch_command_parser",
    "accelerate.data_loader": "SeedableRandomSampler prepare_data_loader",
    "accelerate.utils.memory": "should_reduce_batch_size",
    "transformers.integrations.sdpa_attention": "sdpa_attention_forward",
    "transformers.trainer": "compare_trainer_and_checkpoint_args",
    "transformers.masking_utils": "sdpa_mask _preprocess_mask_arguments",
}

# where: what its source does by that very text
SOURCES = {
    "trl.trainer.sft_trainer.SFTTrainer.__init__": ["add_fused_lm_head(", "BaseTunerLayer", "self._tokenizer ="],
    "trl.trainer.sft_trainer.SFTTrainer._prepare_dataset": ["args.max_length", "args.shuffle_dataset"],
    "trl.trainer.sft_trainer.SFTTrainer.log": ["super().log("],
    "trl.trainer.sft_trainer.SFTTrainer": ["self._total_train_tokens", "self.aux_loss_enabled"],
    "transformers.trainer.Trainer": [
        "self._train_batch_size", "self._signature_columns", "self.current_gradient_accumulation_steps",
        "self.model_accepts_loss_kwargs",
    ],
    "transformers.trainer.Trainer._save_checkpoint": [
        "self._get_output_dir(", "self._push_from_checkpoint(", "output_dir = os.path.join(run_dir, checkpoint_folder)",
    ],
    "transformers.trainer.Trainer._init_training_state": ["compare_trainer_and_checkpoint_args("],
    "transformers.modeling_layers.GradientCheckpointingLayer": ["_gradient_checkpointing_func("],
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


OURS = (PackedSFTTrainer, PackedLoaders, WholeCheckpoints, StepBoundary, ExactSteps, DeviceMetrics)


def overrides():
    """(class, method) of what our classes define and SFTTrainer has."""
    inherited = {name for parent in trl.SFTTrainer.__mro__[:-1] for name in vars(parent)}
    return [(own, name) for own in OURS for name, value in vars(own).items() if name in inherited and callable(value)]


def private_names():
    """Names with an underscore that our classes define or use and that are the parents'."""

    def names(classes):
        found = {name for one in classes for name in vars(one)}
        return found | {name for one in classes for name in re.findall(r"self\.(\w+)", inspect.getsource(one))}

    shared = names(OURS) & names(trl.SFTTrainer.__mro__[:-1])
    return {name for name in shared if name.startswith("_") and not name.startswith("__")} - {"_tag_names"}


def changed_parameters(own, name):
    """What a parent's method takes that ours does not pass on, or None."""

    def takes_anything(parameters):
        kinds = {parameter.kind for parameter in parameters.values()}
        return {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds

    definitions = [vars(parent)[name] for parent in trl.SFTTrainer.__mro__ if name in vars(parent)]
    signatures = [inspect.signature(definition).parameters for definition in definitions]
    theirs = next((parameters for parameters in signatures if not takes_anything(parameters)), {})
    ours = inspect.signature(vars(own)[name]).parameters
    if takes_anything(ours) or list(theirs) == list(ours):
        return None
    return f"SFTTrainer.{name} takes {list(theirs)}, and {own.__name__} {list(ours)} ({VERSIONS})"


def test_nothing_has_moved():
    assert what_moved() == []


def test_the_parents_methods_take_what_ours_take():
    assert len(overrides()) >= 15
    assert [line for own, name in overrides() if (line := changed_parameters(own, name)) is not None] == []


def test_private_names_of_the_parents_are_listed_with_what_they_are_for():
    assert private_names() == set(compat.PRIVATE)


def test_what_has_moved_is_named(monkeypatch):
    monkeypatch.delattr("trl.trainer.sft_trainer.add_fused_lm_head")
    monkeypatch.setattr(trl.SFTTrainer, "log", lambda self, logs, step: None)
    gone, changed = what_moved()[0], changed_parameters(DeviceMetrics, "log")
    assert gone == f"trl.trainer.sft_trainer.add_fused_lm_head is gone ({VERSIONS}): see packsft/compat.py"
    assert changed.startswith("SFTTrainer.log takes ['self', 'logs', 'step'], and DeviceMetrics ['self', 'logs', ")
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


def test_the_trainer_says_rightly_who_calls_whom():
    written = re.findall(r"^    (\w+) +(\w+(?: > \w+)+)", sys.modules[PackedSFTTrainer.__module__].__doc__, re.M)
    names = {"PackedSFTTrainer": "trainer", "SFTTrainer": "TRL", "Trainer": "transformers"}
    assert len(written) == 5
    for method, order in written:
        classes = [cls.__name__ for cls in PackedSFTTrainer.__mro__ if method in vars(cls)]
        order_of_classes = " > ".join(names.get(name, name) for name in classes)
        assert order_of_classes.startswith(order)
        assert order.endswith((" > TRL", " > transformers"))
