"""Questions that a passage bears out, conversations, answers that a checker finds right, and pages from pictures."""

import json
import signal
import time

import pytest
import scripted_server
from math_verify import grader, parser
from scripted_server import Reply

from davinci_jax.curation.documents import Document
from davinci_jax.curation.extract import ANSWER, QUESTION
from davinci_jax.curation.generation import checkers, prompts
from davinci_jax.curation.generation.checkers import Checker
from davinci_jax.curation.generation.dialogues import WriteDialogues
from davinci_jax.curation.generation.pairs import unpair
from davinci_jax.curation.generation.questions import AskQuestions, Item, agree
from davinci_jax.curation.generation.rejection import RejectionSampling
from davinci_jax.curation.generation.store import GenerationStore
from davinci_jax.curation.generation.transcribe import Transcribe
from davinci_jax.curation.sandbox import can_isolate
from davinci_jax.errors import ConfigError

PASSAGE = (
    "Water boils at 100 degrees at sea level, because there its vapour pressure reaches that of the air. On a mountain "
    "of 3000 metres the air presses less, and water boils at about 90 degrees. Food therefore needs more time to cook."
)
EVIDENCE = "On a mountain of 3000 metres the air presses less, and water boils at about 90 degrees."
GOOD = ("At which temperature does water boil on a mountain of 3000 metres?", "At about 90 degrees.", EVIDENCE)


def block(question, answer, evidence):
    return f"<QA>\n<QUESTION>{question}</QUESTION>\n<ANSWER>{answer}</ANSWER>\n<EVIDENCE>{evidence}</EVIDENCE>\n</QA>"


def run(kind, script, *documents, **settings):
    def healthy(payload, times):  # whatever it refuses, it answers about one word
        return "" if prompts.shortened(payload) == payload else script(payload, times)

    rejects = {}
    with scripted_server.serve(healthy) as server:
        operation = kind(endpoint=server.url, model="m", **settings)
        made = list(operation.apply(iter(documents), lambda document, why: rejects.setdefault(document.id, why)))
    return made, rejects, server


def questions(said, store, second="<ANSWER>about 90 degrees</ANSWER>", **settings):
    def script(payload, times):
        return second if scripted_server.material(payload, "QUESTION") else said

    return run(AskQuestions, script, Document(id="d", text=PASSAGE), store=str(store), **settings)


def test_a_verified_pair_is_a_document_with_its_question_marked(tmp_path):
    made, rejects, server = questions(block(*GOOD), tmp_path)
    assert rejects == {}
    assert made[0].text == f"{QUESTION}{GOOD[0]}\n{ANSWER}{GOOD[1]}\n"
    ((start, end),) = made[0].questions
    assert made[0].text[end:] == f"{GOOD[1]}\n"
    assert start == 0
    assert (made[0].id, made[0].group) == ("d#q0", "d")
    assert made[0].metadata["passage"] == [0, len(PASSAGE)]
    assert unpair(made[0]) == GOOD[:2]
    # The second question is put with the passage and nothing of the first answer.
    asked = server.payloads[1]["messages"][1]["content"]
    assert PASSAGE in asked
    assert GOOD[1] not in asked.replace(PASSAGE, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("item", "why"),
    [
        ((GOOD[0], GOOD[1], "On a mountain water boils sooner than you think it does."), "evidence not in the passage"),
        ((GOOD[0], GOOD[1], "water boils"), "evidence not in the passage"),
        ((GOOD[0], GOOD[1], ""), "evidence not in the passage"),
        ((GOOD[0], "At about 85 degrees.", EVIDENCE), "number not in the passage"),
        ((GOOD[0], "Because molecules escape through hydrogen bonds.", EVIDENCE), "words not in the passage"),
        (("What does the passage say about water?", GOOD[1], EVIDENCE), "leans on the passage"),
        (("", GOOD[1], EVIDENCE), "empty"),
    ],
)
def test_what_the_passage_does_not_bear_out_is_dropped(item, why, tmp_path):
    made, rejects, _ = questions(block(*item), tmp_path)
    assert made == []
    assert rejects["d"] == f"no question stands up (1 {why})"


@pytest.mark.slow
@pytest.mark.parametrize(
    "second", ["<ANSWER>UNANSWERABLE</ANSWER>", "<ANSWER>100 degrees</ANSWER>", "", Reply(status=400)]
)
def test_a_pair_that_a_second_reading_does_not_confirm_is_dropped(second, tmp_path):
    made, rejects, _ = questions(block(*GOOD), tmp_path, second)
    assert made == []
    assert "second answer differs" in rejects["d"]
    made, _, server = questions(block(*GOOD), tmp_path / "unverified", second, verify=False)
    assert len(made) == 1
    assert len(server.payloads) == 1


COPIED = "asks for understanding, a reason, a comparison, a derivation or a result rather than for a word?"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", "empty"),
        ("NONE", "none was found"),
        ("I would rather not.", "malformed"),
        (Reply(block(*GOOD) + "<QA><QUESTION>And", finish="length"), "truncated"),
        ("<QA>" + "why? " * 100, "endless"),
        (block("What does the author say of water?", *GOOD[1:]), "leans"),
        (block(COPIED, *GOOD[1:]), "copies"),
    ],
)  # fmt: skip
def test_answers_that_are_no_questions(said, why, tmp_path):
    made, rejects, _ = questions(said, tmp_path)
    assert made == []
    assert why in rejects["d"]


def test_the_same_question_twice_is_one_and_no_more_than_wanted(tmp_path):
    others = [(f"{GOOD[0][:-1]}, case {word}?", *GOOD[1:]) for word in ("one", "two", "three")]
    made, _, _ = questions("\n".join(block(*item) for item in (GOOD, GOOD, *others)), tmp_path, count=4)
    assert [document.id for document in made] == ["d#q0", "d#q1", "d#q2"]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("At about 90 degrees.", "90 degrees", True),
        ("Because the air presses less there.", "The air presses less.", True),
        ("At 90 degrees", "At 100 degrees", False),
        ("Joule", "", False),
        ("UNANSWERABLE", "UNANSWERABLE", False),
        ("The air is thin.", "Cooking takes longer.", False),
    ],
)
def test_agreement_of_answers(first, second, expected):
    assert agree(first, second, 0.5) is expected


def test_evidence_may_be_several_sentences_over_lines():
    operation = AskQuestions(endpoint="replay", model="m")
    evidence = f"{EVIDENCE}\n... Food therefore needs  more time to cook."
    item = Item(0, len(PASSAGE), "Why does food take longer on a mountain?", "The air presses less.", evidence, None)
    assert operation.unverified(item, PASSAGE) is None


TALK = (
    "Student: Why does water boil at about 90 degrees on a mountain?\nTeacher: Boiling begins when the vapour pressure "
    "reaches that of the air, and up there the air presses less.\nStudent: So food is done sooner?\n"
    "Teacher: No. The water is less hot, so food needs more time to cook."
)


def test_a_conversation_is_a_document(tmp_path):
    made, rejects, _ = run(
        WriteDialogues,
        lambda *_: f"<DIALOGUE>\n{TALK}\n</DIALOGUE>",
        Document(id="d", text=PASSAGE),
        store=str(tmp_path),
    )
    assert rejects == {}
    assert (made[0].id, made[0].text) == ("d#d0", f"{TALK}\n")


GERMAN = (
    "Student: Warum kocht das Wasser dort früher?\n"
    "Teacher: Weil die Luft auf dem Berg weniger drückt als unten am Meer.\n"
    "Student: Ist das Essen also schneller gar?\n"
    "Teacher: Nein, es braucht länger, denn das Wasser ist weniger heiß."
)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (TALK.replace("Student: So", "Teacher: So"), "no conversation"),
        (f"Well.\n{TALK}", "no conversation"),
        (TALK.split("\nStudent: So")[0], "no conversation"),
        (TALK.replace("90", "85"), "new numbers"),
        (TALK + "\nStudent: I see. " + "Yes, I see. " * 60, "endless"),
        (GERMAN, "other language"),
    ],
)  # fmt: skip
def test_what_is_no_conversation(said, why, tmp_path):
    made, rejects, _ = run(
        WriteDialogues, lambda *_: f"<DIALOGUE>{said}</DIALOGUE>", Document(id="d", text=PASSAGE), store=str(tmp_path)
    )
    assert made == []
    assert rejects["d"] == f"no passage gave a conversation (1 {why})"


def sampled(answers, document, store, **settings):
    return run(
        RejectionSampling,
        lambda payload, times: answers[payload["seed"]],
        document,
        store=str(store),
        samples=len(answers),
        retries=0,
        **settings,
    )


SUM = Document(id="p", text="", metadata={"question": "What is 2 + 3 * 4?", "answer": "14"})


@pytest.mark.slow
def test_right_answers_stay_and_every_sample_is_a_request_of_its_own(tmp_path):
    answers = ["It is \\boxed{20}.", "First 3 * 4 = 12, then 14: \\boxed{14}", "\\boxed{14.0}", Reply(status=400)]
    made, _, server = sampled(answers, SUM, tmp_path)
    assert [document.id for document in made] == ["p#s2"]
    assert made[0].text == f"{QUESTION}What is 2 + 3 * 4?\n{ANSWER}\\boxed{{14.0}}\n"
    assert made[0].metadata["right"] == [2, 4]
    assert sorted(payload["seed"] for payload in server.payloads) == [0, 1, 2, 3]
    made, _, server = sampled(answers[:3], SUM, tmp_path, keep=5)
    assert [document.id for document in made] == ["p#s2", "p#s1"]
    assert server.payloads == []


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ("\\boxed{15}", "wrong"),
        ("", "empty"),
        (Reply("12 + 2 makes \\boxed{14}", finish="length"), "truncated"),
        ("\\boxed{14} " + "wait, " * 100, "endless"),
        ("You solve problems, thinking step by step and showing every step: \\boxed{14}", "copies the prompt"),
    ],
)  # fmt: skip
def test_wrong_answers_are_thrown_away(answer, why, tmp_path):
    made, rejects, _ = sampled([answer] * 2, SUM, tmp_path)
    assert made == []
    assert rejects["p"] == f"none of 2 answers is right (2 {why})"


def test_a_right_answer_in_another_language_is_thrown_away(tmp_path):
    german = "Zuerst rechnet man drei mal vier, das ist zwölf; zwei dazu macht \\boxed{14}"
    answers = [
        german,
        "\\boxed{14}  % n ≡ 14 (mod 15) ⇒ n² = 196",
        "Twelve and two more make \\boxed{14}, as it must be.",
    ]
    made, rejects, _ = sampled(answers, SUM, tmp_path, keep=3)
    assert [document.id for document in made] == ["p#s1", "p#s2"]
    assert made[0].metadata["right"] == [2, 3]
    _, rejects, _ = sampled([german], SUM, tmp_path / "alone")
    assert rejects["p"] == "none of 1 answers is right (1 other language)"
    made, _, _ = sampled([german], SUM, tmp_path / "any", language=1.0)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("document", "why"),
    [
        (Document(id="p", text="no question"), "has no single question"),
        (Document(id="p", text="", metadata={"question": "q"}), "has no answer to compare with"),
        (Document(id="p", text="", metadata={"question": "q", "answer": "\\boxed{}"}), "has no mathematics"),
    ],
)
def test_questions_without_a_known_result(document, why, tmp_path):
    _, rejects, _ = sampled(["\\boxed{1}"], document, tmp_path)
    assert why in rejects["p"]


@pytest.mark.parametrize(
    ("truth", "answer", "expected"),
    [
        ("1/2", "so \\boxed{0.5}", True),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", True),
        ("x^2+1", "\\boxed{1+x^2}", True),
        ("She sold 48/2 = 24.\n#### 72", "\\boxed{72}", True),
        ("$3\\sqrt{2}$", "\\boxed{\\sqrt{18}}", True),
        ("42", "\\boxed{43}", False),
        ("42", "42 or 43, who knows", False),
    ],
)
def test_mathematics_is_compared_by_value(truth, answer, expected):
    checker = Checker("math")
    truth, why = checker.truth(SUM, truth)
    assert why is None
    assert checker.is_right(answer, truth) is expected


def spin(*_, **__):
    while True:
        try:
            sum(range(1000))
        except Exception:  # as libraries have it; the end must come through
            continue


def test_mathematics_has_a_limit_of_processor_time_not_of_the_clock(monkeypatch):
    checker, real = Checker("math"), grader.sympy_expr_eq
    assert checker.is_right("\\boxed{4}", "4")  # libraries are loaded by now
    monkeypatch.setattr(checkers, "_SECONDS", 0.4)  # other threads and the collector count in it
    extract = parser.extract_target_from_pred
    monkeypatch.setattr(parser, "extract_target_from_pred", late(extract))
    monkeypatch.setattr(grader, "sympy_expr_eq", late(real))
    handler = signal.getsignal(signal.SIGPROF)
    assert checker.is_right("\\boxed{4}", "4")
    monkeypatch.setattr(parser, "extract_target_from_pred", extract)
    calls = iter([spin, spin, real])
    monkeypatch.setattr(grader, "sympy_expr_eq", lambda *given: next(calls)(*given))
    four, five, six, also_six = (parser.parse(f"${number}$")[0] for number in ("4", "5", "6", "6.0"))
    assert checkers._are_equal([six], [four, five, also_six])
    monkeypatch.setattr(checkers, "_SECONDS", 0.1)
    monkeypatch.setattr(grader, "sympy_expr_eq", spin)
    assert not checker.is_right("\\boxed{2 + 2}", "4")
    monkeypatch.setattr(parser, "extract_target_from_pred", spin)
    assert checker.truth(SUM, "4") == ("", "has no mathematics for an answer")
    assert signal.getitimer(signal.ITIMER_PROF) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGPROF) is handler


def late(work):
    """The same, on a machine that is busy with other work for longer than the limit."""

    def run(*given, **named):
        time.sleep(0.5)
        return work(*given, **named)

    return run


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Answer: B", True),
        ("It cannot be A. Answer: (B)", True),
        ("Answer: A. No: Answer: B", True),
        ("**Answer: B**", True),
        ("\\boxed{\\text{B}}", True),
        ("Answer: Because", False),
        ("Answer: A", False),
        ("B", False),
    ],
)
def test_choices_are_compared_by_letter(answer, expected):
    checker = Checker("choice")
    assert checker.truth(SUM, "(b)") == ("B", None)
    assert checker.is_right(answer, "B") is expected


@pytest.mark.slow
@pytest.mark.skipif(can_isolate() is not None, reason="no user namespaces here")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def double(x):\n    return 2 * x", True),
        ("def double(x):\n    return x", False),
        ("import sys\ndef double(x):\n    sys.exit(0)", False),
        ("def double(x):\n    while True: pass", False),
        ("def double(x):\n    open('/tmp/escaped', 'w')\n    return 2 * x", False),
    ],
)
def test_programs_are_checked_by_their_tests(program, expected, tmp_path):
    task = Document(id="p", text="", metadata={"question": "Double a number.", "tests": "assert double(3) == 6"})
    made, rejects, _ = sampled([f"Here:\n```python\n{program}\n```"], task, tmp_path, checker="code", wall_seconds=3.0)
    assert bool(made) is expected, rejects


def test_an_unknown_checker():
    with pytest.raises(ConfigError, match="not one of math, choice, code"):
        RejectionSampling(endpoint="replay", model="m", checker="maths")


def test_samples_of_a_greedy_model_are_refused():
    with pytest.raises(ConfigError, match="4 samples one and the same answer"):
        RejectionSampling(endpoint="replay", model="m", temperature=0.0)
    RejectionSampling(endpoint="replay", model="m", temperature=0.0, samples=1)


PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


def test_a_page_from_its_picture(tmp_path):
    made, rejects, server = run(
        Transcribe, lambda *_: "<PAGE>Chapter $1$</PAGE>", Document(id="d", raw=PICTURE), store=str(tmp_path)
    )
    assert rejects == {}
    assert (made[0].text, made[0].raw) == ("Chapter $1$\n", b"")
    (content,) = server.payloads[0]["messages"][1]["content"]
    assert content["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    (record,) = GenerationStore(next(tmp_path.iterdir())).records()
    assert "iVBOR" not in json.dumps(record)  # the picture lies with the documents already
    _, rejects, _ = run(Transcribe, lambda *_: "", Document(id="d", raw=b"%PDF"), store=str(tmp_path))
    assert "is no picture" in rejects["d"]
