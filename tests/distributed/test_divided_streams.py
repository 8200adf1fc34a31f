"""Exact steps over a stream of texts: the same on any number of ranks, each of which tokenises its part of the rows."""

import json
from pathlib import Path

import pytest
from launch import results_of
from numerics import error

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("stream_tiny.py")
BATCH = 8  # on all ranks; 7 examples of 9 have tokens to score and are short enough
WORKERS = {"dataloader_num_workers": 2}
EVALUATES = {"evaluates": True, "eval_strategy": "steps", "eval_steps": 3}
RUNS = {
    "one shard": {"shards": 1},
    "four shards": {},
    "one shard, workers": WORKERS | {"shards": 1},
    "four shards, workers": WORKERS,
    "shuffled": WORKERS | {"shuffle_dataset": True},
    "workers that are not forked": WORKERS | {"dataloader_multiprocessing_context": "spawn"},
    "workers that stay, three passes": WORKERS | {"dataloader_persistent_workers": True, "max_steps": 20},
    "by example": {"loss_normalization": "example"},
    "fewer rows than ranks": {"rows": 3, "max_steps": 3},
    "auto": WORKERS | {"tokens_per_pass": "auto"},
    "evaluation": EVALUATES,
    "evaluation, workers": WORKERS | EVALUATES,
}
PARTS = {"shared rows": {"sequence_parallel_size": 2}, "shared rows, workers": WORKERS | {"sequence_parallel_size": 2}}
REFUSED = {
    "a bad row": (WORKERS | {"bad_row": 26}, "row 22 of the train stream: text is 7, expected a text"),
    "too much lost": ({"rows": 1500, "max_lost_fraction": 0.01}, "loses 1102 of 4991 tokens"),
    "nothing to score": ({"rows": 1}, "none of the 1 examples of the train stream"),
}
DIFFERENT = {
    "other rows on one rank": {"rank_1_differs": True},
    "fewer rows on one rank": {"rank_1_lacks": 5},
}


def results(folder, ranks, runs, shares=None):
    size = {"max_steps": 9, "per_device_train_batch_size": BATCH // (shares or ranks), "per_device_eval_batch_size": 4}
    return results_of(SCRIPT, ranks, folder / f"{ranks}.pt", json.dumps({name: size | runs[name] for name in runs}))


@pytest.fixture(scope="module")
def refusals():
    return {name: options | {"refused": True, "max_steps": 400} for name, (options, _) in REFUSED.items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory, refusals):
    return results(tmp_path_factory.mktemp("one"), 1, RUNS | refusals)


@pytest.fixture(scope="module")
def two(tmp_path_factory, refusals):
    different = {name: options | {"refused": True, "max_steps": 20} for name, options in DIFFERENT.items()}
    return results(tmp_path_factory.mktemp("two"), 2, RUNS | refusals | different)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return results(folder, 4, {name: RUNS[name] for name in ("four shards, workers", "fewer rows than ranks")})


def check_same(ours, expected):
    assert len(ours["losses"]) == len(expected["losses"])
    assert error(ours["weights"], expected["weights"]) < 1e-10
    assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-6)  # logged as float32
    assert ours["tokens"] == expected["tokens"]
    assert ours["digests"] == expected["digests"]
    assert ours["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-12)


def check_divided(tokenised, of_one, ahead=2 * BATCH):
    """What was read ahead counts, too."""
    assert max(tokenised) <= of_one / len(tokenised) + ahead
    assert of_one <= sum(tokenised) <= of_one + ahead * len(tokenised)


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_take_the_steps_of_one_and_tokenise_half_of_the_texts(name, one, two):
    check_same(two[name], one[name])
    check_divided(two[name]["tokenised"], one[name]["tokenised"][0])


@pytest.mark.parametrize("name", ["four shards, workers", "fewer rows than ranks"])
def test_so_do_four(name, one, four):
    check_same(four[name], one[name])
    check_divided(four[name]["tokenised"], one[name]["tokenised"][0])


def test_ranks_that_share_rows_tokenise_a_part_each(one, tmp_path):
    ours = results(tmp_path, 2, PARTS, shares=1)
    for name, expected in (("shared rows", "four shards"), ("shared rows, workers", "four shards, workers")):
        check_same(ours[name], one[expected])
        check_divided(ours[name]["tokenised"], one[expected]["tokenised"][0])


@pytest.mark.parametrize("name", REFUSED)
def test_an_error_is_that_of_one_process_on_all_ranks(name, one, two):
    (expected,) = one[name]["errors"]
    assert REFUSED[name][1] in expected
    assert len(two[name]["errors"]) == 2
    for found in two[name]["errors"]:
        assert REFUSED[name][1] in found


@pytest.mark.parametrize("name", DIFFERENT)
def test_ranks_that_read_other_rows_are_refused(name, two):
    assert len(two[name]["errors"]) == 2
    for found in two[name]["errors"]:
        assert "the train stream gives other rows on one rank than on another" in found


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_with_other_ranks(workers, tmp_path):
    options = {"dataloader_num_workers": workers, "max_steps": 12}
    begun = {"run": options | {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 7}}
    whole = results(tmp_path, 1, begun)["run"]
    resumed = options | {"output_dir": str(tmp_path / "run"), "resume_from": str(tmp_path / "run" / "checkpoint-7")}
    check_same(results(tmp_path, 2, {"run": resumed})["run"], whole)
