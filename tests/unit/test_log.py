"""The tidy log."""

from cellmill.training.log import LOG_SCHEMA, MACHINE, Log


def test_rows_are_added_to_those_of_earlier_processes():
    first = Log()
    assert first.table().schema == LOG_SCHEMA
    assert first.table().num_rows == 0
    first.add(1, "train", {"loss": 2.5, "learning_rate": 1e-3}, seconds=0.5)
    first.add(1, MACHINE, {"mfu": 0.25}, seconds=0.5)
    then = Log(first.table())
    then.add(2, "validation", {"loss": 2}, seconds=1.25)
    assert then.table().to_pylist() == [
        {"step": 1, "split": "train", "metric": "loss", "value": 2.5, "seconds": 0.5},
        {"step": 1, "split": "train", "metric": "learning_rate", "value": 1e-3, "seconds": 0.5},
        {"step": 1, "split": "machine", "metric": "mfu", "value": 0.25, "seconds": 0.5},
        {"step": 2, "split": "validation", "metric": "loss", "value": 2.0, "seconds": 1.25},
    ]
    assert then.table().schema == LOG_SCHEMA
    assert first.table().num_rows == 3
    assert then.table().equals(then.table())
