"""The workers of a data loader: SIGTERM for the whole job is left to the training process, and streams reach them."""

import multiprocessing
import pickle
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler

import pytest
from datasets import Dataset
from runs import losses, trainer
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


# ---- streams ----

TEXTS = Dataset.from_list([{"text": text} for text in ("tell me a joke no", "why two plus four", "hello") * 8])


@pytest.mark.parametrize("strategy", ["step", "bfd"])
def test_a_stream_of_texts_goes_to_a_worker_that_is_not_forked(strategy, tmp_path):
    stream = TEXTS.to_iterable_dataset().map(lambda row: {"text": f"{row['text']} yes"})
    ours = trainer(tmp_path, train_dataset=stream, packing_strategy=strategy, max_steps=1)
    with pytest.raises((AttributeError, pickle.PicklingError)):  # of TRL's functions
        pickle.dumps(ours.train_dataset)
    sent = pickle.loads(ForkingPickler.dumps(ours.train_dataset))
    packs = [
        [[document.input_ids.tolist() for document in pack] for pack in source] for source in (sent, ours.train_dataset)
    ]
    assert packs[0] == packs[1] != []


def test_what_cannot_be_sent_to_a_worker_names_the_option(tmp_path):
    numbers = iter(range(100))
    stream = TEXTS.to_iterable_dataset().map(lambda row, run=(number for number in numbers): row)
    ours = trainer(tmp_path, train_dataset=stream, max_steps=1)
    with pytest.raises(ValueError, match="dataloader_multiprocessing_context: the stream cannot be sent to a worker"):
        ForkingPickler.dumps(ours.train_dataset)


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_are_not_forked_read_the_same(context, tmp_path):
    found = []
    for how in ("fork", context):
        ours = trainer(
            tmp_path, train_dataset=TEXTS.to_iterable_dataset(), max_steps=2, dataloader_num_workers=1,
            dataloader_multiprocessing_context=how, formatting_func=lambda row: row["text"],
        )  # fmt: skip
        ours.train()
        found.append(losses(ours))
    assert found[0] == found[1]
