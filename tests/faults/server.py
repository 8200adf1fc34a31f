"""Runs trainings in forked processes, and kills them where it is told to.

Reads one job per line as JSON, and answers with one line each. Everything is imported once; a job then takes half a
second. A job: `folder`, `options` of the configuration, `stream`, `ranks`, `resume`, `rows` and
    kill: null, {"step": N} for the end of a step, {"signal": N} for SIGTERM at a step, or
          {"save": N, "operation": K, "half": bool} for file operation K of the save at step N (-1 counts them); with
          `half`, the file that was written last is first cut to half its size.
Answer: `exit` codes by rank, `error`, and what the run left in `folder/result.json`.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}

import datasets
import torch
from accelerate.data_loader import prepare_data_loader  # noqa: F401 (imported before the fork)
from runs import config
from tiny import tiny_model, tiny_tokenizer, token_rows
from transformers import TrainerCallback

from packsft import PackedSFTTrainer

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class FileOperations:
    """Counts operations that change files, and kills the process before one of them."""

    def __init__(self, kill):
        self.kill, self.count, self.active, self.last_written, self.names = kill, 0, False, None, []
        sys.addaudithook(self.hook)
        for module, name, argument in ((torch, "save", 1), (__import__("safetensors.torch").torch, "save_file", 1)):
            setattr(module, name, self.announced(getattr(module, name), argument))
        import transformers.modeling_utils as modeling

        modeling.safe_save_file = __import__("safetensors.torch").torch.save_file

    def announced(self, function, argument):
        def call(*given, **named):
            path = given[argument] if len(given) > argument else named.get("f", named.get("filename"))
            self.operation(function.__name__, str(path))
            function(*given, **named)
            self.last_written = str(path)

        return call

    def hook(self, event, arguments):
        if not self.active:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, (str, bytes)) and flags is not None and flags & WRITES:
                self.operation("open", os.fsdecode(path), written=True)
        elif event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"):
            self.operation(event, str(arguments[0]))

    def operation(self, name, path, written=False):
        if not self.active:
            return
        if self.count == self.kill.get("operation"):
            self.active = False
            if self.kill.get("half") and self.last_written and os.path.exists(self.last_written):
                os.truncate(self.last_written, os.path.getsize(self.last_written) // 2)
            die()
        self.count += 1
        self.names.append(f"{name} {os.path.basename(path)}")
        if written:
            self.last_written = path


class Killer(TrainerCallback):
    def __init__(self, kill):
        self.kill, self.steps = kill, 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1
        if state.global_step == self.kill.get("step"):
            die()
        if state.global_step == self.kill.get("signal"):
            # all processes of the job, as Slurm does; not from here, since workers obey their parent
            processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
            for _ in range(self.kill.get("times", 1)):
                subprocess.run(["kill", "-TERM", *map(str, processes)], check=True)


def train(job, rank):
    kill = job.get("kill") or {}
    mine = kill.get("rank", 0) == rank
    operations = FileOperations(kill) if mine and "save" in kill else None
    rows = token_rows(job.get("rows", 24), seed=job.get("rows_seed", 0))
    if job.get("stream"):
        rows = rows.to_iterable_dataset(num_shards=job.get("shards", 1))
    options = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    args = config(job["folder"], **options | job.get("options", {}))
    model = tiny_model(job.get("family", "gpt2"), **job.get("model", {"resid_pdrop": 0.1}))

    killer = Killer(kill if mine else {})

    class Trainer(PackedSFTTrainer):
        def _save_checkpoint(self, *given):
            if operations is not None and self.state.global_step == kill["save"]:
                operations.active = True
            super()._save_checkpoint(*given)
            if operations is not None:
                operations.active = False

    trainer = Trainer(
        model=model, args=args, train_dataset=rows, processing_class=tiny_tokenizer(),
        eval_dataset=token_rows(4, seed=3) if job.get("evaluates") else None,
        callbacks=[killer],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=job.get("resume"))
    if rank == 0:
        keys = ("loss", "grad_norm", "learning_rate", "num_tokens", "entropy", "epoch", "step")
        history = [{k: entry.get(k) for k in keys} for entry in trainer.state.log_history if "loss" in entry]
        weights = torch.cat([p.detach().double().flatten() for p in trainer.model.parameters()])
        result = {
            "history": history, "steps": trainer.state.global_step,
            "weights": hashlib.sha256(weights.numpy().tobytes()).hexdigest(),
            "trained": killer.steps,
            "operations": operations.names if operations else [],
        }  # fmt: skip
        (Path(job["folder"]) / "result.json").write_text(json.dumps(result))


def start(job, rank, port):
    child = os.fork()
    if child:
        return child
    log = os.open(Path(job["folder"]) / f"log-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 0
    try:
        ranks = job.get("ranks", 1)
        if ranks > 1:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        train(job, rank)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(job):
    folder = Path(job["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    port = free_port()
    running = {start(job, rank, port): rank for rank in range(job.get("ranks", 1))}
    exits, deadline = {}, time.monotonic() + job.get("timeout", 60)
    while running:
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                exits[running.pop(child)] = os.waitstatus_to_exitcode(status)
                if any(exits.values()):  # a launcher ends the others
                    deadline = min(deadline, time.monotonic() + 5)
        if running and (time.monotonic() > deadline or any(code == -signal.SIGKILL for code in exits.values())):
            for child in running:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    result = folder / "result.json"
    log = (folder / "log-0.txt").read_text()
    return {
        "exit": [exits[rank] for rank in sorted(exits)], "log": log[-6000:],
        "result": json.loads(result.read_text()) if result.exists() else None,
    }  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
