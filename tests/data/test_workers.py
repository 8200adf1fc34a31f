"""SIGTERM and the workers of a data loader: one for the whole job is left to the training process."""

import multiprocessing
import subprocess
import sys
import time

import pytest
from runs import trainer
from tiny import token_rows
from transformers import TrainerCallback

from packsft.data.loaders import _start_worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="others cannot tell who sent a signal")


def work(ready):
    _start_worker(0, None)
    ready.set()
    time.sleep(60)


@pytest.fixture
def worker():
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=work, args=(ready,), daemon=True)
    process.start()
    assert ready.wait(10)
    yield process
    process.kill()


def sent_by_another_process(process):
    subprocess.run(["kill", "-TERM", str(process.pid)], check=True)


def test_a_signal_of_its_parent_ends_a_worker(worker):
    """`multiprocessing` sends it when Python exits, and then waits for the worker."""
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_a_signal_of_another_process_does_not(worker):
    sent_by_another_process(worker)
    worker.join(0.5)
    assert worker.is_alive()


def test_an_evaluation_outlives_a_signal_to_its_workers(tmp_path):
    class Sends(TrainerCallback):
        sent = 0

        def on_prediction_step(self, args, state, control, **kwargs):
            if not self.sent:
                for process in multiprocessing.active_children():
                    sent_by_another_process(process)
                    self.sent += 1

    sends = Sends()
    rows = token_rows(24, seed=3)
    ours = trainer(
        tmp_path, eval_dataset=rows, dataloader_num_workers=1, per_device_eval_batch_size=2, callbacks=[sends]
    )
    assert ours.evaluate()["eval_loss"] == pytest.approx(trainer(tmp_path, eval_dataset=rows).evaluate()["eval_loss"])
    assert sends.sent == 1
