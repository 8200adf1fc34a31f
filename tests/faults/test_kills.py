"""A run that is killed at any moment and resumed is, bit for bit, the run that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import packsft_kernels
import pytest

import packsft

HERE = Path(__file__).parent
STRATEGIES = {
    "step": {},
    "bfd": {"packing_strategy": "bfd", "max_length": 16, "per_device_train_batch_size": 2},
    "bfd_split": {"packing_strategy": "bfd_split", "max_length": 8, "gradient_accumulation_steps": 2,
                  "per_device_train_batch_size": 2},
    "wrapped": {"packing_strategy": "wrapped", "max_length": 8, "gradient_accumulation_steps": 2,
                "per_device_train_batch_size": 2},
    "none": {"packing": False},
}  # fmt: skip


class Server:
    def __init__(self):
        roots = [HERE, HERE.parent, *(Path(package.__file__).parents[1] for package in (packsft, packsft_kernels))]
        path = os.pathsep.join([*map(str, roots), os.environ.get("PYTHONPATH", "")])
        self.environment = os.environ | {"PYTHONPATH": path}
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=self.environment,
        )  # fmt: skip

    def run(self, folder, **job):
        self.process.stdin.write(json.dumps({"folder": str(folder), **job}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.process.stdin.close()
    server.process.wait(timeout=60)


def job_of(strategy, stream=False, workers=0, ranks=1):
    options = STRATEGIES[strategy] | {"dataloader_num_workers": workers}
    if ranks > 1:
        options["per_device_train_batch_size"] = options.get("per_device_train_batch_size", 4) // 2
    if stream:
        options["max_steps"] = 9
    return {"options": options, "stream": stream, "ranks": ranks}


def check_kills(server, tmp_path, job, choose):
    """Kills at what `choose(operations of the save at step 4, steps)` gives; each run then resumes."""
    whole = server.run(tmp_path / "whole", kill={"save": 4, "operation": -1}, **job)["result"]
    assert whole is not None
    kills = choose(len(whole["operations"]), whole["steps"])
    for i, kill in enumerate(kills):
        folder = tmp_path / str(i)
        killed = server.run(folder, kill=kill, **job)
        assert -9 in killed["exit"], (kill, killed["log"])
        assert killed["result"] is None
        resumed = server.run(folder, resume=True, **job)
        assert resumed["result"] is not None, (kill, resumed["log"])
        assert resumed["result"]["weights"] == whole["weights"], kill
        assert resumed["result"]["history"] == whole["history"], kill


def every_operation(operations, steps):
    return [{"save": 4, "operation": i, "half": half} for i in range(operations) for half in (False, True)]


def some(operations, steps):
    late = operations - 3  # the record is written, but the folder is not in its place
    return [
        {"save": 4, "operation": operations // 2, "half": True}, {"save": 4, "operation": late},
        {"step": steps // 2 + 2}, {"step": steps - 1},
    ]  # fmt: skip


def test_a_killed_run_resumes_on_the_same_bits(server, tmp_path):
    check_kills(server, tmp_path, job_of("step"), some)


@pytest.mark.slow
def test_a_save_may_be_killed_before_and_within_every_file_operation(server, tmp_path):
    check_kills(server, tmp_path, job_of("step"), every_operation)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_does_so_with_every_kind_of_data(strategy, stream, workers, ranks, server, tmp_path):
    def choose(operations, steps):
        within, between, late, last = some(operations, steps)
        late["rank"] = ranks - 1
        if workers and ranks > 1:
            return [late]
        return [within, late] if workers or ranks > 1 else [within, between, late, last]

    check_kills(server, tmp_path, job_of(strategy, stream, workers, ranks), choose)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_sigterm_saves_at_the_end_of_the_step_and_ends_the_process(ranks, workers, server, tmp_path):
    job = job_of("step", ranks=ranks, workers=workers)
    whole = server.run(tmp_path / "whole", **job)["result"]
    ended = server.run(tmp_path / "ended", kill={"signal": 5, "rank": ranks - 1}, **job)
    assert ended["exit"] == [-15] * ranks
    assert (tmp_path / "ended" / f"checkpoint-{5 if ranks == 1 else 6}").is_dir()
    resumed = server.run(tmp_path / "ended", resume=True, **job)["result"]
    assert resumed["trained"] == whole["steps"] - (5 if ranks == 1 else 6)
    assert (resumed["weights"], resumed["history"]) == (whole["weights"], whole["history"])


def test_sigterm_neither_evaluates_nor_saves_what_the_epoch_would_have(server, tmp_path):
    job = job_of("step")
    job["options"] |= {"eval_strategy": "epoch", "save_strategy": "epoch"}
    job["evaluates"] = True
    server.run(tmp_path, kill={"signal": 2}, **job)
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert not any("eval_loss" in entry for entry in state["log_history"])


@pytest.mark.parametrize("case", ["switched off", "saves nothing", "twice", "in the last step"])
def test_sigterm_ends_the_process_in_any_case(case, server, tmp_path):
    job, kill = job_of("step"), {"signal": 3}
    if case == "switched off":
        job["options"]["enable_jit_checkpoint"] = False
    if case == "saves nothing":
        job["options"]["save_strategy"] = "no"
    if case == "twice":
        kill["times"] = 2
    if case == "in the last step":
        kill["signal"] = 12
    ended = server.run(tmp_path, kill=kill, **job)
    assert ended["exit"] == [-15]
    assert (tmp_path / "checkpoint-3").exists() is False
    assert (tmp_path / "checkpoint-12").exists() == (case == "in the last step")


SCRIPT = """
import sys
from runs import trainer
ours = trainer(sys.argv[1], max_steps=2, dataloader_num_workers=1, dataloader_persistent_workers=sys.argv[2] == "ends")
if sys.argv[2] == "fails":
    from transformers import TrainerCallback
    class Fails(TrainerCallback):
        def on_step_end(self, *given, **named):
            raise RuntimeError("of the user")
    ours.add_callback(Fails())
ours.train()
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ends", "fails"])
def test_workers_do_not_keep_a_process_alive(how, server, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), how], env=server.environment, capture_output=True, timeout=120
    )
    assert done.returncode == (0 if how == "ends" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_one_process_goes_on_as_two(strategy, stream, server, tmp_path):
    one, two = ({**job_of(strategy, stream, ranks=ranks), "model": {}} for ranks in (1, 2))  # no dropout
    if strategy == "bfd_split" and not stream:
        one["options"]["per_device_train_batch_size"] = 4  # another split of the same total
        one["options"]["gradient_accumulation_steps"] = 1
    whole = server.run(tmp_path / "whole", **one)["result"]
    server.run(tmp_path / "killed", kill={"step": 5}, **one)
    resumed = server.run(tmp_path / "killed", resume=True, **two)
    assert resumed["result"] is not None, resumed["log"]
    assert "is of a run with other settings" not in resumed["log"]
    assert "do not match" not in resumed["log"]
    for ours, theirs in zip(resumed["result"]["history"], whole["history"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["num_tokens"] == theirs["num_tokens"]
