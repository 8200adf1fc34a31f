"""A checkpoint folder is whole or it is not one."""

import json
import os
from pathlib import Path

import pytest
import torch
from runs import trainer

from packsft.checkpoints import folders
from packsft.checkpoints.folders import find_whole, finish_interrupted, publish, rotate, why_not_whole


def staged(run_dir, step, text="content"):
    folder = run_dir / "_incomplete" / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "model.bin").write_text(text)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def published(run_dir, step, text="content"):
    return publish(staged(run_dir, step, text), {"settings": {}})


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


def test_a_published_checkpoint_is_whole_and_lists_its_files(tmp_path):
    place = published(tmp_path, 3)
    assert place == tmp_path / "checkpoint-3"
    assert why_not_whole(place) is None
    assert json.loads((place / "packsft.json").read_text())["files"] == {"shards/model.bin": 7, "trainer_state.json": 2}


DAMAGE = {
    "a missing file": (lambda place: (place / "shards" / "model.bin").unlink(), "shards/model.bin is missing"),
    "a short file": (lambda place: os.truncate(place / "shards" / "model.bin", 3), "model.bin has 3 of 7 bytes"),
    "no state": (lambda place: (place / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    "half a state": (lambda place: os.truncate(place / "trainer_state.json", 1), "trainer_state.json is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_and_said(damage, tmp_path):
    published(tmp_path, 9)
    harm, reason = DAMAGE[damage]
    harm(published(tmp_path, 10))
    whole, reasons = find_whole(tmp_path)
    assert whole == [tmp_path / "checkpoint-9"]
    assert reasons[0].startswith("checkpoint-10 is not whole: ")
    assert reasons[0].endswith(reason)


def test_it_replaces_one_of_the_same_step(tmp_path):
    published(tmp_path, 3, "old")
    place = published(tmp_path, 3, "new")
    assert (place / "shards" / "model.bin").read_text() == "new"
    assert names(tmp_path / "_incomplete") == []


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_kill_between_the_renames_loses_nothing(renames, tmp_path, monkeypatch):
    published(tmp_path, 3, "old")
    rename, done = os.rename, []

    def killed(source, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(source)
        rename(source, target)

    monkeypatch.setattr(folders.os, "rename", killed)
    if renames < 2:
        with pytest.raises(KeyboardInterrupt):
            published(tmp_path, 3, "new")
    else:
        published(tmp_path, 3, "new")
    monkeypatch.undo()
    finish_interrupted(tmp_path)
    (whole,), _ = find_whole(tmp_path)
    assert (whole / "shards" / "model.bin").read_text() == "new"
    assert names(tmp_path) == ["checkpoint-3"]


def test_what_was_not_whole_is_deleted_when_the_next_run_begins(tmp_path):
    staged(tmp_path, 4)
    finish_interrupted(tmp_path)
    assert names(tmp_path) == []


def test_rotation_takes_what_is_not_whole_first_and_never_the_last_whole_one(tmp_path):
    for step in (2, 4, 6):
        published(tmp_path, step)
    os.truncate(tmp_path / "checkpoint-4" / "shards" / "model.bin", 1)
    os.truncate(tmp_path / "checkpoint-6" / "shards" / "model.bin", 1)
    rotate(tmp_path, 1, {tmp_path / "checkpoint-2"})
    assert names(tmp_path) == ["checkpoint-2"]
    for step in (8, 10):
        published(tmp_path, step)
    rotate(tmp_path, 2, {tmp_path / "checkpoint-2", tmp_path / "checkpoint-10"})  # the best and the newest
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-2"]
    rotate(tmp_path, None, set())
    assert len(names(tmp_path)) == 2


def test_a_checkpoint_of_another_library_is_judged_by_its_formats(tmp_path):
    from safetensors.torch import save_file

    place = tmp_path / "checkpoint-1"
    place.mkdir()
    (place / "trainer_state.json").write_text("{}")
    save_file({"weight": torch.zeros(8), "bias": torch.zeros(2)}, place / "model.safetensors")
    torch.save({}, place / "optimizer.pt")
    assert why_not_whole(place) is None
    size = (place / "model.safetensors").stat().st_size
    for cut in (size - 1, size // 2, 4, 0):
        os.truncate(place / "model.safetensors", cut)
        assert why_not_whole(place) == "model.safetensors is cut short"
    save_file({}, place / "model.safetensors")
    os.truncate(place / "optimizer.pt", (place / "optimizer.pt").stat().st_size - 1)
    assert why_not_whole(place) == "optimizer.pt is cut short"
    torch.save({}, place / "optimizer.pt")
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert why_not_whole(place) == "model-2.safetensors is missing"


# ---- in a run ----

SAVES = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "per_device_train_batch_size": 4}


def test_the_best_checkpoint_is_kept_loaded_and_found_under_its_name(tmp_path):
    from tiny import token_rows

    ours = trainer(
        tmp_path, eval_dataset=token_rows(4, seed=3), eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        save_total_limit=1, **SAVES,
    )  # fmt: skip
    ours.train()
    best = f"{tmp_path}/checkpoint-{ours.state.best_global_step}"
    assert ours.state.best_model_checkpoint == best
    state = json.loads((tmp_path / f"checkpoint-{ours.state.best_global_step}" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == best


def test_the_best_checkpoint_is_known_by_its_place_and_not_by_its_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2, 3):
        published(tmp_path, step)
    rotate(tmp_path, 1, {Path("checkpoint-1"), tmp_path / "checkpoint-3"})
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-3"]


def test_saved_arguments_are_those_of_the_user(tmp_path):
    ours = trainer(tmp_path, gradient_accumulation_steps=2, **SAVES)
    ours.train()
    saved = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    for name in ("logging_nan_inf_filter", "enable_jit_checkpoint"):
        assert getattr(saved, name) is True
    assert (saved.per_device_train_batch_size, saved.gradient_accumulation_steps) == (4, 2)


def test_only_what_is_whole_is_pushed(tmp_path, monkeypatch):
    from packsft import PackedSFTTrainer

    pushed = []
    monkeypatch.setattr(PackedSFTTrainer, "init_hf_repo", lambda self, **named: None)
    monkeypatch.setattr(
        PackedSFTTrainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((folder, why_not_whole(Path(folder)))),
    )
    ours = trainer(tmp_path, **SAVES)
    ours.args.push_to_hub = True
    ours._finish_current_push = lambda: None
    ours.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (1, 2, 3)]


def test_a_run_begun_again_in_the_same_folder_replaces_the_checkpoints(tmp_path):
    for _ in range(2):
        trainer(tmp_path, **SAVES).train()
    assert names(tmp_path) == ["README.md", "checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert find_whole(tmp_path)[0][0] == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("asked", [True, "missing", "checkpoint-2"])
def test_what_cannot_be_resumed_is_named(asked, tmp_path):
    ours = trainer(tmp_path, **SAVES)
    message = {True: f"resume_from_checkpoint=True: {tmp_path} holds no whole", "missing": "there is no such folder"}
    if asked == "checkpoint-2":
        ours.train()
        (tmp_path / asked / "optimizer.pt").unlink()
        message[asked] = "is not a whole checkpoint: optimizer.pt is missing; the newest whole one beside it is "
    with pytest.raises(ValueError, match=message[asked]):
        ours.train(resume_from_checkpoint=True if asked is True else str(tmp_path / asked))


def test_weights_that_a_checkpoint_lacks_are_named(tmp_path):
    from safetensors.torch import load_file, save_file

    ours = trainer(tmp_path, **SAVES)
    ours.train()
    file = tmp_path / "checkpoint-3" / "model.safetensors"
    weights = load_file(file)
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, file, metadata={"format": "pt"})
    record = json.loads((tmp_path / "checkpoint-3" / "packsft.json").read_text())
    record["files"]["model.safetensors"] = file.stat().st_size
    (tmp_path / "checkpoint-3" / "packsft.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"lacks weights of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj"):
        trainer(tmp_path, **SAVES | {"max_steps": 4}).train(resume_from_checkpoint=True)
