"""Generation against the forward pass recomputed at every step, and the filters against NumPy."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax

from davinci_jax.errors import ConfigError
from davinci_jax.experiment import MeshConfig, ModelConfig
from davinci_jax.inference import Sampling, generate, generate_ids
from davinci_jax.inference.sampling import draw, filter_logits
from davinci_jax.models.decoder import build
from davinci_jax.sharding import make_mesh

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

VOCAB, EOS = 48, 0
CONFIG = ModelConfig(
    vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_size=4, mlp_size=24,
    compute_dtype="float32", init_std=0.5, max_positions=400,
)  # fmt: skip
GREEDY = Sampling(temperature=0)
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(1, 41)), [3, 3]]


def run(prompts, max_new_tokens, num_devices=1, eos_id=EOS, **settings):
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:num_devices])):
        decoder = build(CONFIG, jax.random.key(0))
        return [row.tolist() for row in generate_ids(decoder, prompts, max_new_tokens, eos_id=eos_id, **settings)]


def recomputed(prompt, max_new_tokens, eos_id=EOS):
    """Greedy continuation by whole forward passes, one prompt at a time."""
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        logits = jax.jit(build(CONFIG, jax.random.key(0)).logits)
        ids, length = list(prompt), len(prompt) + max_new_tokens
        for _step in range(max_new_tokens):
            tokens = np.zeros((1, length), np.int32)
            tokens[0, : len(ids)] = ids
            segments = (np.arange(length) < len(ids)).astype(np.int32)[None]
            ids.append(int(np.argmax(logits(tokens, segments, np.arange(length)[None])[0, len(ids) - 1])))
            if ids[-1] == eos_id:
                return ids[len(prompt) : -1]
    return ids[len(prompt) :]


@pytest.mark.parametrize("num_devices", [8, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_greedy_equals_whole_forward_passes(num_devices):
    assert run(PROMPTS, 12, num_devices, sampling=GREEDY) == [recomputed(prompt, 12) for prompt in PROMPTS]


def test_prompts_longer_than_a_piece():
    prompts = [np.random.default_rng(n).integers(1, VOCAB, size).tolist() for n, size in enumerate((300, 129, 2))]
    assert run(prompts, 4, sampling=GREEDY) == [recomputed(prompt, 4) for prompt in prompts]


def test_a_row_stops_at_its_end_and_others_go_on():
    free = run(PROMPTS, 12, sampling=GREEDY, eos_id=VOCAB + 1)
    eos_id = free[1][3]
    stopped = run(PROMPTS, 12, sampling=GREEDY, eos_id=eos_id)
    for row, whole in zip(stopped, free, strict=True):
        assert row == (whole[: whole.index(eos_id)] if eos_id in whole else whole)
    assert len(stopped[1]) <= 3
    assert any(len(row) == 12 for row in stopped)


def test_seeds_reproduce_and_differ():
    first = run(PROMPTS, 16, sampling=Sampling(seed=1))
    assert first == run(PROMPTS, 16, sampling=Sampling(seed=1))
    assert first != run(PROMPTS, 16, sampling=Sampling(seed=2))


def test_a_row_does_not_depend_on_the_rows_beside_it():
    both = run(PROMPTS, 16, sampling=Sampling(seed=1))
    assert run(PROMPTS[:1], 16, sampling=Sampling(seed=1)) == both[:1]
    assert run(PROMPTS[:3], 16, 8, sampling=Sampling(seed=1)) == both[:3]


def test_top_k_of_one_is_greedy():
    assert run(PROMPTS, 12, sampling=Sampling(top_k=1, temperature=2.0)) == run(PROMPTS, 12, sampling=GREEDY)


def test_ids_beyond_the_tokenizer_are_never_drawn():
    rows = run(PROMPTS, 40, sampling=Sampling(temperature=5.0), vocab_size=6, eos_id=VOCAB)
    assert {token for row in rows for token in row} == set(range(6))


def kept_by_numpy(logits, temperature, top_k, top_p):
    """The filtered distribution of one row [V], float64: temperature, then the k largest, then the nucleus."""
    probabilities = softmax(np.asarray(logits, np.float64) / temperature)
    order = np.argsort(-probabilities, kind="stable")[: top_k or len(logits)]
    kept, total = [], 0.0
    for token in order:
        if top_p is not None and kept and total >= top_p * probabilities[order].sum():
            break
        kept.append(token)
        total += probabilities[token]
    result = np.zeros(len(logits))
    result[kept] = probabilities[kept] / total
    return result


@pytest.mark.parametrize("temperature", [0.5, 1.3])
@pytest.mark.parametrize("top_k", [None, 1, 7, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.3, 0.9, 1.0])
def test_filtered_distribution_equals_numpy(temperature, top_k, top_p):
    logits = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32) * 3
    values, ids = filter_logits(jnp.asarray(logits), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    ours = np.zeros(logits.shape)
    np.put_along_axis(ours, np.asarray(ids), np.asarray(jax.nn.softmax(values, axis=-1)), axis=-1)
    expected = [kept_by_numpy(row, temperature, top_k, top_p) for row in logits]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_draws_follow_the_filtered_distribution():
    logits = np.random.default_rng(0).normal(size=8).astype(np.float32) * 2
    sampling = Sampling(temperature=0.7, top_p=0.95)
    draws = np.asarray(jax.jit(lambda x: draw(x, sampling, 0))(jnp.tile(logits, (20000, 1))))
    frequencies = np.bincount(draws, minlength=8) / len(draws)
    expected = kept_by_numpy(logits, 0.7, None, 0.95)
    assert not frequencies[expected == 0].any()
    # Five standard deviations of a binomial share of 20,000 draws.
    np.testing.assert_allclose(frequencies, expected, atol=5 * 0.5 / np.sqrt(20000))


def test_every_step_has_random_numbers_of_its_own():
    logits = jnp.zeros((64, 1000))
    first, second = (np.asarray(draw(logits, Sampling(), step)) for step in (0, 1))
    assert (first != second).mean() > 0.9


def test_text_goes_in_and_out():
    tokenizer = types.SimpleNamespace(
        encode_batch=lambda texts: [np.frombuffer(text.encode(), np.uint8).astype(np.int32) - 96 for text in texts],
        decode=lambda ids: "".join(chr(96 + i) for i in ids),
        eos_id=EOS,
        vocab_size=27,
    )
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        texts = generate(build(CONFIG, jax.random.key(0)), tokenizer, ["abc", "z"], 8, GREEDY)
    assert [tokenizer.encode_batch([text])[0].tolist() for text in texts] == run(
        [[1, 2, 3], [26]], 8, sampling=GREEDY, vocab_size=27
    )


@pytest.mark.parametrize(
    ("prompts", "max_new_tokens", "message"),
    [
        ([[1], []], 4, "prompt 2: is empty"),
        ([[1] * 397], 4, "has 397 tokens"),
        ([[1]], 0, "max_new_tokens = 0"),
        ([[1], [VOCAB]], 4, "prompt 2 = 48: is an id outside"),
    ],
)
def test_prompts_that_cannot_be_continued(prompts, max_new_tokens, message):
    with pytest.raises(ConfigError, match=message):
        run(prompts, max_new_tokens)


@pytest.mark.parametrize(
    "settings", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_settings_that_draw_nothing(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Sampling(**settings)
