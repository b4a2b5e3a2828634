"""The server over HTTP, against generation without it; then curation against the server."""

import concurrent.futures
import json
import urllib.error
import urllib.request

import jax
import pytest

from davinci_jax.data.tokenizer import load_tokenizer
from davinci_jax.data.train_tokenizer import train
from davinci_jax.errors import ConfigError
from davinci_jax.experiment import MeshConfig, ModelConfig
from davinci_jax.inference import Sampling, generate
from davinci_jax.inference.server import ModelServer
from davinci_jax.models.decoder import build
from davinci_jax.sharding import make_mesh

# Compiles many programs; left out of the fast subset.
pytestmark = pytest.mark.slow

CONFIG = ModelConfig(
    vocab_size=290, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_size=8, mlp_size=24,
    compute_dtype="float32", init_std=0.5, max_positions=512,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [f"The quick brown fox number {n} jumps over the lazy dog, {n * n} times. é" for n in range(300)]
    train(iter(texts), CONFIG.vocab_size).save(str(file))
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        return build(CONFIG, jax.random.key(0)), load_tokenizer(file), mesh


@pytest.fixture(scope="module")
def server(model):
    with ModelServer(*model, name="tiny") as server:
        yield server


def post(server, path, body):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data), timeout=300) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def expected(model, prompt, count, **sampling):
    decoder, tokenizer, mesh = model
    with jax.set_mesh(mesh):
        return generate(decoder, tokenizer, [prompt], count, Sampling(**sampling))[0]


def test_models(server):
    with urllib.request.urlopen(f"{server.url}/v1/models", timeout=30) as response:
        assert [item["id"] for item in json.loads(response.read())["data"]] == ["tiny"]


def test_a_completion_is_what_generate_gives(model, server):
    body = {"model": "tiny", "prompt": "The quick", "max_tokens": 12, "temperature": 0}
    status, answer = post(server, "/v1/completions", body)
    assert status == 200
    assert answer["choices"][0]["text"] == expected(model, "The quick", 12, temperature=0)
    assert answer["usage"]["total_tokens"] == sum(list(answer["usage"].values())[:2])
    sampled = {**body, "temperature": 0.9, "top_p": 0.8}
    texts = [post(server, "/v1/completions", {**sampled, "seed": seed})[1]["choices"][0]["text"] for seed in (7, 7, 8)]
    assert texts[0] == texts[1] == expected(model, "The quick", 12, temperature=0.9, top_p=0.8, seed=7)
    assert texts[2] == expected(model, "The quick", 12, temperature=0.9, top_p=0.8, seed=8) != texts[0]


def test_messages_are_one_text(model, server):
    messages = [{"role": "system", "content": "The lazy"}, {"role": "user", "content": "dog"}]
    status, answer = post(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 8, "temperature": 0})
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == expected(model, "The lazy\n\ndog", 8, temperature=0)
    assert answer["choices"][0]["finish_reason"] in ("length", "stop")


def test_requests_that_wait_together_are_answered_as_if_alone(model, server):
    prompts = [f"fox number {n}" + " jumps" * n for n in range(11)]
    bodies = [{"prompt": prompt, "max_tokens": 8, "temperature": 0} for prompt in prompts]
    with concurrent.futures.ThreadPoolExecutor(11) as pool:
        answers = list(pool.map(lambda body: post(server, "/v1/completions", body)[1], bodies))
    assert [answer["choices"][0]["text"] for answer in answers] == [
        expected(model, prompt, 8, temperature=0) for prompt in prompts
    ]


def test_a_stop_cuts_the_text(model, server):
    whole = expected(model, "The quick", 12, temperature=0)
    body = {"prompt": "The quick", "max_tokens": 12, "temperature": 0, "stop": whole[3:5]}
    answer = post(server, "/v1/completions", body)[1]["choices"][0]
    assert answer == {"index": 0, "finish_reason": "stop", "text": whole[: whole.index(whole[3:5])]}


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/v1/completions", b"no", 400, "not JSON"),
        ("/v1/completions", [], 400, "no JSON object"),
        ("/v1/completions", {}, 400, "'prompt' is no text"),
        ("/v1/completions", {"prompt": ""}, 400, "is empty"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 9999}, 400, "512 positions"),
        ("/v1/completions", {"prompt": "a", "max_tokens": "9"}, 400, "no integer"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "is negative"),
        ("/v1/completions", {"prompt": "a", "stream": True}, 400, "'stream' is not supported"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "'n' is not supported"),
        ("/v1/completions", {"prompt": "a", "model": "large"}, 404, "'large' is not served"),
        ("/v1/chat/completions", {"messages": [{"content": None}]}, 400, "no text"),
        ("/v1/embeddings", {"input": "a"}, 404, "there is no"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_server_goes_on(server, path, body, status, told):
    found, answer = post(server, path, body)
    assert found == status
    assert told in answer["error"]["message"]
    assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 1, "temperature": 0})[0] == 200


def test_a_port_that_is_taken(model, server):
    with pytest.raises(ConfigError, match=r"--port = \d+: cannot be listened on at 127\.0\.0\.1 .*; give another"):
        ModelServer(*model, name="second", port=int(server.url.rsplit(":", 1)[1]))
