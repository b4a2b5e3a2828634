"""The mixture index: shares, order, epochs and rows against exact integers and brute force."""

import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from davinci_jax.data.mixture import PERIOD, MixtureIndex, Tree, integer_shares
from davinci_jax.errors import DataError

PAPER = (  # shares of stage 2-1: domain -> billions of tokens of its sources
    ("General", 10, (4280,)),
    ("Code", 30, (187, 220, 171, 20)),
    ("Science", 30, (13, 176, 5, 74, 68, 47, 251, 215, 440)),
    ("QA", 30, (21, 138, 12, 5, 10, 0.4, 9, 1, 46)),
)
GROUPS = [domain for domain, _, pool in PAPER for _ in pool]
SHARES = [share * tokens / sum(pool) for _, share, pool in PAPER for tokens in pool]
NAMES = [f"source-{n}" for n in range(len(SHARES))]

shares_strategy = st.lists(
    st.one_of(st.just(0.0), st.floats(1e-6, 1.0), st.sampled_from([0.1, 0.25, 1.0])), min_size=1, max_size=12
).filter(lambda shares: sum(shares) > 0)


def stage_of_two(num_sequences: int) -> list[tuple[int, list[float]]]:
    return [(num_sequences, [0.7, 0.2, 0.1]), (num_sequences, [0.1, 0.1, 0.8])]


def deviation(chosen: np.ndarray, weight: int) -> float:
    """Returns the largest |count - x weight / PERIOD| over all prefixes x of booleans [k]; exact below k = 2^31."""
    x = np.arange(1, len(chosen) + 1)
    return np.abs(np.cumsum(chosen) * PERIOD - x * weight).max() / PERIOD


def proven_bounds(tree):
    """How far each source's count can be from its share at any prefix: the sum in the module's docstring."""
    bounds = np.zeros(len(tree.weights))
    open_paths = [(len(tree.nodes) - 1, 0.0)]
    while open_paths:
        position, inverse_weights = open_paths.pop()
        node = tree.nodes[position]
        if node.source >= 0:
            bounds[node.source] = node.weight * inverse_weights / 2
            continue
        for child in (node.left, node.right):
            open_paths.append((child, inverse_weights + 1 / tree.nodes[child].weight))
    return bounds


@given(shares_strategy)
@settings(max_examples=60, deadline=None)
def test_every_prefix_has_its_shares(shares):
    tree = Tree.build(shares, [str(n) for n in range(len(shares))])
    source, draw = tree.lookup(np.arange(600))
    bounds = proven_bounds(tree)
    assert bounds.max() < 1.7
    for number, weight in enumerate(tree.weights):
        chosen = source == number
        assert deviation(chosen, weight) <= bounds[number] + 1e-9
        assert np.array_equal(draw[chosen], np.arange(chosen.sum()))


def test_shares_are_exact_to_the_last_of_two_to_the_32():
    assert integer_shares([1, 1, 1]) == [1431655766, 1431655765, 1431655765]
    assert integer_shares([0.0, 68.2, 31.8]) == [0, 2929167696, 1365799600]
    assert sum(integer_shares(SHARES)) == PERIOD
    for weight, share in zip(integer_shares(SHARES), SHARES, strict=True):
        assert abs(weight - Fraction(share) / sum(map(Fraction, SHARES)) * PERIOD) < 1


@pytest.mark.parametrize("shares", [[], [0.0, 0.0], [0.5, -0.1]])
def test_shares_that_are_none(shares):
    with pytest.raises(ValueError, match="at least 0"):
        integer_shares(shares)


def test_domains_of_the_report_are_within_one_sequence_at_every_prefix():
    tree = Tree.build(SHARES, NAMES, GROUPS)
    source, _ = tree.lookup(np.arange(60_000))
    for domain, share, _ in PAPER:
        members = np.array([group == domain for group in GROUPS])
        weight = sum(w for w, member in zip(tree.weights, members, strict=True) if member)
        assert deviation(members[source], weight) < 1
        assert abs(weight / PERIOD - share / 100) < 1e-8
    for number, weight in enumerate(tree.weights):
        assert deviation(source == number, weight) < 1.5


@pytest.mark.parametrize("start", [0, 2 * 10**9, PERIOD - 700, PERIOD + 3, 5 * PERIOD - 1, 10**15])
def test_lookup_agrees_with_counts_in_exact_integers(start):
    tree = Tree.build(SHARES, NAMES, GROUPS)
    source, draw = tree.lookup(np.arange(start, start + 400))
    before = tree.counts(start)
    for x in range(400):
        after = tree.counts(start + x + 1)
        assert np.flatnonzero(after - before).tolist() == [source[x]]
        assert before[source[x]] == draw[x]
        before = after


def test_whole_periods_are_exact():
    tree = Tree.build(SHARES, NAMES, GROUPS)
    assert tree.counts(3 * PERIOD).tolist() == [3 * weight for weight in tree.weights]


def test_rows_are_drawn_once_an_epoch_and_stages_continue_each_other():
    rows = (23, 7, 11)
    index = MixtureIndex(stage_of_two(100), rows, seed=3, names=["a", "b", "c"])
    found = index.lookup(np.arange(200))
    orders = set()
    for source, size in enumerate(rows):
        row, epoch = found.row[found.source == source], found.epoch[found.source == source]
        assert np.array_equal(epoch, np.arange(len(row)) // size)
        for first in range(0, len(row) - size + 1, size):
            assert sorted(row[first : first + size]) == list(range(size))
            orders.add((source, tuple(row[first : first + size])))
        assert len(set(row[len(row) // size * size :])) == len(row) % size
    assert len(orders) == sum(int((found.source == source).sum()) // size for source, size in enumerate(rows))


def test_order_does_not_depend_on_how_it_is_asked():
    index = MixtureIndex(stage_of_two(500), (90, 80, 70), seed=0)
    whole = np.stack(index.lookup(np.arange(1000)))
    shuffled = np.random.default_rng(0).permutation(1000)
    assert np.array_equal(np.stack(index.lookup(shuffled)), whole[:, shuffled])
    for hosts in (2, 4, 8):
        parts = [np.stack(index.lookup(np.arange(host, 1000, hosts))) for host in range(hosts)]
        assert all(np.array_equal(part, whole[:, host::hosts]) for host, part in enumerate(parts))
    assert [part.size for part in index.lookup(np.array([], np.int64))] == [0, 0, 0]


def test_appending_or_cutting_a_stage_moves_nothing_before():
    rows = (90, 80, 70)
    found = np.stack(MixtureIndex(stage_of_two(400), rows, seed=0).lookup(np.arange(800)))
    longer = MixtureIndex([*stage_of_two(400), (50, [0, 1, 0])], rows, seed=0)
    assert np.array_equal(np.stack(longer.lookup(np.arange(800))), found)
    (_, first), second = stage_of_two(400)
    cut = MixtureIndex([(123, first), second], rows, seed=0)
    assert np.array_equal(np.stack(cut.lookup(np.arange(123))), found[:, :123])
    # The stage after the cut goes on with the draws that the cut one left.
    assert cut.draws(123).tolist() == np.bincount(found[0, :123], minlength=3).tolist()
    assert cut.draws(523)[0] == cut.draws(123)[0] + Tree.build(second[1], "012").counts(400)[0]


@given(st.integers(0, 800))
@settings(max_examples=40, deadline=None)
def test_draws_count_the_prefix(x):
    index = MixtureIndex(stage_of_two(400), (90, 80, 70), seed=0)
    assert index.draws(x).tolist() == np.bincount(index.lookup(np.arange(x)).source, minlength=3).tolist()


def test_seed_moves_rows_and_never_sources():
    one, two = (MixtureIndex(stage_of_two(300), (90, 80, 70), seed=seed).lookup(np.arange(600)) for seed in (0, 1))
    assert np.array_equal(one.source, two.source)
    assert np.array_equal(one.epoch, two.epoch)
    assert (one.row != two.row).mean() > 0.9


def test_another_source_in_the_pool_reshuffles_none():
    first = MixtureIndex([(300, [0.6, 0.4])], (50, 60), seed=0, names=["a", "b"]).lookup(np.arange(300))
    wider = MixtureIndex([(300, [0.3, 0.3, 0.4])], (20, 50, 60), seed=0, names=["new", "a", "b"]).lookup(np.arange(300))
    for before, after in ((0, 1), (1, 2)):
        rows = first.row[first.source == before], wider.row[wider.source == after]
        shared = min(map(len, rows))
        assert shared > 50
        assert np.array_equal(rows[0][:shared], rows[1][:shared])


def test_position_of_an_unused_source_does_not_matter():
    first = MixtureIndex([(300, [0.5, 0.5])], (50, 60), seed=0, names=["a", "b"]).lookup(np.arange(300))
    wider = MixtureIndex([(300, [0, 0.5, 0.5])], (0, 50, 60), seed=0, names=["new", "a", "b"]).lookup(np.arange(300))
    assert np.array_equal(first.source + 1, wider.source)
    assert np.array_equal(first.row, wider.row)


def test_size_does_not_grow_with_the_run():
    small, large = (MixtureIndex([(n, SHARES)] * 4, [10**6] * len(SHARES), 0, NAMES, GROUPS) for n in (10, 5 * 10**8))
    assert abs(len(pickle.dumps(large)) - len(pickle.dumps(small))) < 2000
    again = pickle.loads(pickle.dumps(large))
    indices = np.random.default_rng(1).integers(0, 2 * 10**9, 1000)
    assert np.array_equal(np.stack(again.lookup(indices)), np.stack(large.lookup(indices)))


def test_source_without_rows_is_refused_by_name():
    with pytest.raises(DataError, match=r"data.sources\[web\]: has 0 rows, and the stages draw 50"):
        MixtureIndex([(100, [0.5, 0.5])], (10, 0), seed=0, names=["code", "web"])


@pytest.mark.parametrize("indices", [[-1], [0, 800]])
def test_indices_outside_the_run(indices):
    index = MixtureIndex(stage_of_two(400), (90, 80, 70), seed=0)
    with pytest.raises(IndexError, match="outside"):
        index.lookup(np.array(indices))
    with pytest.raises(IndexError, match="outside"):
        index.draws(801)
