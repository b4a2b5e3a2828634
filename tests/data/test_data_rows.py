"""Rows of both packings against a reference in plain Python, for any documents and any length."""

import pathlib
import pickle
import tempfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_shards

from davinci_jax.data.best_fit import BestFitRows
from davinci_jax.data.rows import ConcatRows, expand
from davinci_jax.data.shards import ShardSet


@st.composite
def corpora(draw):
    """(documents, spans): token lists in which every token is its own position in the stream, and masked spans."""
    lengths = draw(st.lists(st.one_of(st.integers(1, 6), st.integers(1, 60)), min_size=1, max_size=25))
    firsts = np.cumsum([0, *lengths])
    documents = [list(range(first, first + n)) for first, n in zip(firsts, lengths, strict=False)]
    spans = []
    for n in lengths:
        edges = sorted(draw(st.sets(st.integers(0, n), max_size=4)))
        spans.append([edges[i : i + 2] for i in range(0, len(edges) - 1, 2)])
    return documents, spans


def reference(documents, spans, mask):
    """Returns for each position of the stream (document, whether it is masked as a target)."""
    return [
        (d, mask and any(a <= n < b for a, b in spans[d]))
        for d, tokens in enumerate(documents)
        for n in range(len(tokens))
    ]


def expected_label(stream, at):
    """Returns the label of the token at a position: the next position, or -1."""
    if at + 1 == len(stream) or stream[at + 1][0] != stream[at][0] or stream[at + 1][1]:
        return -1
    return at + 1


def check_row(row, stream, length):
    """Checks one row (tokens, labels, segments, positions) token by token; returns the positions it holds."""
    held, before, segment, position = [], None, 0, 0
    for token, label, segment_id, place in zip(*(array.tolist() for array in row), strict=True):
        if segment_id == 0:
            assert (token, label, place) == (0, -1, 0)
            before = "padding"
            continue
        assert before != "padding", "padding stands only at the end of a row"
        joined = before is not None and token == before + 1 and stream[token][0] == stream[before][0]
        segment, position = (segment, position + 1) if joined else (segment + 1, 0)
        assert (segment_id, place) == (segment, position)
        assert label == expected_label(stream, token)
        held.append(token)
        before = token
    assert len(row[0]) == length
    return held


def rows_of(batch):
    return list(zip(*batch[:4], strict=True))


@pytest.mark.slow
@given(corpora(), st.integers(1, 40), st.integers(1, 17), st.booleans(), st.randoms())
@settings(max_examples=40, deadline=None)
def test_concatenated_rows_are_the_stream(corpus, length, block_tokens, mask, random):
    documents, spans = corpus
    stream = reference(documents, spans, mask)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(pathlib.Path(folder, "s"), documents, spans, block_tokens=block_tokens)
        rows = ConcatRows(ShardSet(pathlib.Path(folder, "s")), length, source=5, mask_questions=mask)
        assert rows.num_rows == -(-len(stream) // length)
        order = random.sample(range(rows.num_rows), rows.num_rows)
        batch = rows.read(np.array(order))
    assert (batch.sources == 5).all()
    assert all(array.dtype == np.int32 for array in batch)
    held = [check_row(row, stream, length) for row in rows_of(batch)]
    in_order = [token for row in range(rows.num_rows) for token in held[order.index(row)]]
    assert in_order == list(range(len(stream)))


@pytest.mark.slow
@given(corpora(), st.integers(1, 40), st.integers(1, 17), st.booleans())
@settings(max_examples=40, deadline=None)
def test_best_fit_rows_hold_every_token_once_and_whole_documents(corpus, length, block_tokens, mask):
    documents, spans = corpus
    stream = reference(documents, spans, mask)
    with tempfile.TemporaryDirectory() as folder:
        write_shards(pathlib.Path(folder, "s"), documents, spans, block_tokens=block_tokens)
        rows = BestFitRows(ShardSet(pathlib.Path(folder, "s")), length, mask_questions=mask)
        batch = rows.read(np.arange(rows.num_rows))
        assert rows.fill == pytest.approx((batch.segment_ids > 0).mean())
    held = [check_row(row, stream, length) for row in rows_of(batch)]
    assert sorted(token for row in held for token in row) == list(range(len(stream)))
    for document in documents:
        pieces = [sorted(set(document) & set(row)) for row in held]
        sizes = sorted((len(piece) for piece in pieces if piece), reverse=True)
        whole, rest = divmod(len(document), length)
        if rest + whole <= 1:
            assert sizes == [len(document)]
        else:
            assert sum(sizes) == len(document)
            assert len(sizes) <= whole + (rest > 0)


@pytest.mark.parametrize(("span", "labels"), [([8, 10], [7, -1, -1, 10]), ([7, 8], [-1, 8, 9, 10])])
def test_spans_at_the_border_of_blocks(tmp_path, span, labels):
    write_shards(tmp_path / "s", [list(range(16))], [[span]], block_tokens=8)
    rows = ConcatRows(ShardSet(tmp_path / "s"), 8, mask_questions=True).read(np.arange(2))
    assert [*rows.labels[0, 6:].tolist(), *rows.labels[1, :2].tolist()] == labels


def test_repeated_and_single_reads_give_the_same_rows(tmp_path):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 40)
    documents = [rng.integers(0, 60000, n).tolist() for n in lengths]
    write_shards(tmp_path / "s", documents)
    rows = ConcatRows(ShardSet(tmp_path / "s"), 24)
    batch = rows.read(np.array([3, 0, 3]))
    for n, row in enumerate((3, 0, 3)):
        for whole, alone in zip(batch, rows.read(np.array([row])), strict=True):
            np.testing.assert_array_equal(whole[n], alone[0])


def test_rows_survive_pickling(tmp_path):
    write_shards(tmp_path / "s", [[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    for rows in (ConcatRows(ShardSet(tmp_path / "s"), 4, 2, True), BestFitRows(ShardSet(tmp_path / "s"), 4, 2, True)):
        before = rows.read(np.arange(3))
        again = pickle.loads(pickle.dumps(rows))
        assert (again.source, again.mask_questions) == (2, True)
        for a, b in zip(before, again.read(np.arange(3)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_outside_are_refused(tmp_path):
    write_shards(tmp_path / "s", [[1, 2, 3]])
    rows = ConcatRows(ShardSet(tmp_path / "s"), 2)
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match="outside"):
            rows.read(np.array([wrong]))
    assert rows.read(np.array([], np.int64)).tokens.shape == (0, 2)


def test_an_empty_split_has_no_rows(tmp_path):
    write_shards(tmp_path / "s", [[1, 2, 3]])
    assert ConcatRows(ShardSet(tmp_path / "s", "heldout"), 2).num_rows == 0
    assert BestFitRows(ShardSet(tmp_path / "s", "heldout"), 2).num_rows == 0


def test_tokens_above_16_bits(tmp_path):
    documents = [[70000, 151935, 3], [2**31 - 1]]
    write_shards(tmp_path / "s", documents, dtype="uint32")
    batch = ConcatRows(ShardSet(tmp_path / "s"), 4).read(np.array([0]))
    assert batch.tokens[0].tolist() == [70000, 151935, 3, 2**31 - 1]
    assert batch.labels[0].tolist() == [151935, 3, -1, -1]


def test_expand():
    owner, value = expand(np.array([3, 9, 5]), np.array([5, 9, 6]))
    assert owner.tolist() == [0, 0, 2]
    assert value.tolist() == [3, 4, 5]
