import numpy as np
import pytest
from cellmill.randomness import hash64
from cellmill.shards.order import Order, hash_edges

JOINIDS = np.arange(1_000, 101_000, 3)


def test_every_cell_has_one_shard_and_shards_follow_the_keys():
    order = Order("hash", 3, {"validation": hash_edges(2), "train": hash_edges(7)})
    assert order.shards == [("train", n) for n in range(7)] + [("validation", 0), ("validation", 1)]
    keys = order.keys(JOINIDS)
    assert np.array_equal(keys, hash64(3, "shuffle", JOINIDS))
    for split, first, stop in (("train", 0, 7), ("validation", 7, 9)):
        shard = order.shard_of(split, np.sort(keys))
        assert np.unique(shard).tolist() == list(range(first, stop))
        assert (np.diff(shard) >= 0).all()
        # a hash fills shards evenly: five standard deviations of a binomial count
        expected = len(keys) / (stop - first)
        assert (np.abs(np.bincount(shard - first) - expected) < 5 * np.sqrt(expected)).all()


def test_edges_belong_to_the_shard_that_they_begin():
    edges = [0, 10, 20]
    order = Order("joinid", 0, {"all": edges})
    assert order.shard_of("all", order.keys(np.array([0, 9, 10, 19, 20, 10**9]))).tolist() == [0, 0, 1, 1, 2, 2]
    hashed = Order("hash", 0, {"all": hash_edges(3)})
    keys = np.array([hashed.edges["all"][1] - 1, hashed.edges["all"][1], 2**64 - 1], np.uint64)
    assert hashed.shard_of("all", keys).tolist() == [0, 1, 2]


@pytest.mark.parametrize("order", [Order("hash", 5, {"train": hash_edges(3)}), Order("joinid", 0, {"all": [0, 7]})])
def test_an_order_goes_through_json(order):
    assert Order(**order.as_dict()) == order
