"""Loader processes where few files may be open, and where a batch cannot be sent."""

import multiprocessing
import os
import resource
import sys

import pytest
import torch

from runtime import shared

FORK = multiprocessing.get_context("fork")


def encode(key):
    """An example with as many tensors as a study with 20 teachers."""
    return {"id": key, "prefix_ids": torch.full((30,), key), "pixel_values": torch.ones(4, 1176),
            "image_grid_thw": torch.ones(1, 3).long(),
            "responses": [torch.full((5,), key + column) for column in range(20)] + [None]}


def in_child(work, seconds=60):
    """The exit code of work() in a process of its own, which a hang does not outlive."""
    def run():
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # the traceback of a worker that is meant to fail
        work()

    process = FORK.Process(target=run)
    process.start()
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        process.join()
        pytest.fail(f"still runs after {seconds} s")
    return process.exitcode


def load_all(soft, hard):
    """Loads batches of 64 studies with these limits, and holds them all."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    batches = [list(range(at, at + 64)) for at in range(0, 512, 64)]
    loaded = list(shared.loader(encode, batches, num_workers=2))
    assert [[example["id"] for example in batch] for batch in loaded] == batches
    for batch in loaded:
        for example in batch:
            for ours, fresh in zip(example["responses"], encode(example["id"])["responses"]):
                assert (ours is fresh is None) or torch.equal(ours, fresh)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)


@pytest.mark.parametrize("soft, hard", [(1024, 1024), (200, 200), (200, 1000)])
def test_large_batches_of_many_teachers_need_few_open_files(soft, hard):
    assert in_child(lambda: load_all(soft, hard)) == 0


def fail_to_send(monkeypatch):
    """A loader whose batches cannot be pickled, which shows in the worker's sending thread."""
    monkeypatch.setattr(shared, "as_one_tensor", lambda examples: (_ for _ in examples))
    try:
        list(shared.loader(encode, [[0], [1], [2]], num_workers=2))
    except RuntimeError as error:
        assert "exited unexpectedly" in str(error)
        sys.exit(7)


def test_a_batch_that_cannot_be_sent_ends_the_command(monkeypatch):
    """torch would print a traceback, lose the batch and wait for it for ever."""
    assert in_child(lambda: fail_to_send(monkeypatch)) == 7


@pytest.mark.parametrize("limits, after", [
    ((100, 1000), (1000, 1000)),
    ((100, resource.RLIM_INFINITY), (2**16, resource.RLIM_INFINITY)),
    ((2**16, 2**20), None), ((1024, 1024), None), ((resource.RLIM_INFINITY,) * 2, None),
    ((1024, 2**20), (2**16, 2**20))])
def test_the_limit_of_open_files_is_raised_where_that_is_allowed(monkeypatch, limits, after):
    given = []
    monkeypatch.setattr(resource, "getrlimit", lambda of: limits)
    monkeypatch.setattr(resource, "setrlimit", lambda of, new: given.append(new))
    shared.allow_open_files()
    assert given == ([after] if after else [])


def test_examples_are_the_same_with_and_without_loader_processes():
    one, other = (list(shared.loader(encode, [[1, 2], [3]], workers)) for workers in (0, 2))
    for ours, theirs in zip(sum(one, []), sum(other, []), strict=True):
        assert ours["id"] == theirs["id"] and ours["responses"][-1] is theirs["responses"][-1]
        for key in ("prefix_ids", "pixel_values", "image_grid_thw"):
            assert torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype
