"""States written while training goes on: a copy of the moment, in order, with errors that reach the run."""

import threading

import pyarrow as pa
import pytest
import torch
from cellmill.errors import CellmillError
from cellmill.training.state import Aside, State, load_state, save_state


def state(step: int) -> State:
    return State(
        step=step,
        seconds=1.5,
        cells=8 * step,
        genes=100,
        limit=16384,
        loader={"epoch": 0, "position": 8 * step},
        tensors={"model.weight": torch.full((3,), float(step))},
        log=pa.table({"step": [step]}),
    )


def test_what_is_written_is_the_moment_that_was_handed_over(tmp_path):
    ready = threading.Event()

    def save(kept):
        ready.wait(10)
        save_state(tmp_path, kept, "mine")

    given = state(3)
    with Aside() as aside:
        aside.write(given, save)
        given.tensors["model.weight"].fill_(7)  # the next step of training
        ready.set()
    found, remarks = load_state(tmp_path, "mine")
    assert remarks == []
    assert found.tensors["model.weight"].tolist() == [3, 3, 3]
    assert (found.step, found.cells, found.genes, found.limit, found.loader["position"]) == (3, 24, 100, 16384, 24)


def test_training_goes_on_meanwhile_and_states_keep_their_order(tmp_path):
    began, go_on, done = threading.Event(), threading.Event(), []

    def save(kept):
        began.set()
        go_on.wait(10)
        done.append(kept.step)

    with Aside() as aside:
        aside.write(state(1), save)
        assert began.wait(10)
        assert done == []  # and we are here
        aside.check()
        go_on.set()
        aside.write(state(2), save)  # waits for the first
        assert done[0] == 1
    assert done == [1, 2]


def fail(_):
    raise CellmillError("the disk is full")


def _check(aside):
    aside._writing.exception()  # until it has failed
    aside.check()


CALLS = {
    "check": _check,
    "wait": lambda aside: aside.wait(),
    "write": lambda aside: aside.write(state(2), fail),
    "leave": lambda aside: None,
}


@pytest.mark.parametrize("call", CALLS)
def test_an_error_reaches_the_run(call):
    def run():
        with Aside() as aside:
            aside.write(state(1), fail)
            CALLS[call](aside)

    with pytest.raises(CellmillError, match="the disk is full"):
        run()


def test_the_runs_own_error_goes_before_that_of_a_state():
    def run():
        with Aside() as aside:
            aside.write(state(1), fail)
            raise KeyError

    with pytest.raises(KeyError):
        run()


def test_a_state_is_whole_or_absent(tmp_path, monkeypatch):
    save_state(tmp_path, state(1), "mine")

    def torn(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cellmill.training.state.write_tensors", torn)
    with pytest.raises(CellmillError, match="step-00000002 could not be written"), Aside() as aside:
        aside.write(state(2), lambda kept: save_state(tmp_path, kept, "mine"))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_state(tmp_path, "mine")[0].step == 1
