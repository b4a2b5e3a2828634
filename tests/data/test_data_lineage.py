"""Every token of a row leads back to its document."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_sets import write_shards

from davinci_jax.data.best_fit import BestFitRows
from davinci_jax.data.lineage import trace
from davinci_jax.data.rows import ConcatRows
from davinci_jax.data.shards import ShardSet


@pytest.mark.slow
@pytest.mark.parametrize("kind", [ConcatRows, BestFitRows])
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=20), length=st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_tokens_are_those_of_the_traced_documents(tmp_path_factory, kind, lengths, length):
    folder = tmp_path_factory.mktemp("traced") / "s"
    documents = [[100 * n + k for k in range(count)] for n, count in enumerate(lengths)]
    write_shards(folder, documents, block_tokens=7)
    rows = kind(ShardSet(folder), length)
    batch = rows.read(np.arange(rows.num_rows))
    for row in range(rows.num_rows):
        found = []
        for document in trace(rows, row):
            number = int(document.id.removeprefix("train/"))
            assert document.document_tokens == len(documents[number])
            assert (document.level, document.lineage) == ("L2", [{"name": "made", "n": number}])
            assert document.first_column == len(found)
            found += documents[number][document.first_token : document.first_token + document.num_tokens]
        assert batch.tokens[row][batch.segment_ids[row] > 0].tolist() == found
