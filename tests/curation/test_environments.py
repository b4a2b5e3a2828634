"""Documents that claim something which is then executed."""

import pytest

from davinci_jax.curation import sandbox
from davinci_jax.curation.documents import Document
from davinci_jax.curation.environments import RunClaims

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sandbox.can_isolate() is not None, reason="no user namespaces here"),
]
MODULE = '''"""Squares.

>>> square(3)
9
"""
import math
print("noise"); assert math.sqrt(4) == 2


def square(x):
    """
    >>> square(2)
    5
    >>> [square(n) for n in range(30)]
    [0, 1, ..., 841]
    """
    return x * x


def test_zero():
    assert square(0) == 0


def test_wrong():
    assert square(1) == 2, "one"


def test_with_fixture(tmp_path):
    raise SystemExit
'''


def run(text, id="m.py", **settings):
    rejects = {}
    operation = RunClaims(**{"wall_seconds": 10, **settings})
    given = Document(id=id, text=text, questions=((0, 3),))
    made = list(operation.apply(iter([given]), lambda document, why: rejects.setdefault(document.id, why)))
    return made, rejects


def test_claims_of_a_module_are_counted_and_told():
    ((made,), _) = run(MODULE)
    claims = made.metadata["claims"]
    assert (claims["outcome"], claims["examples"], claims["tests"]) == ("fail", [2, 3], [1, 2])
    assert claims["assertions"] == [1, 1]
    assert [failure.get("line", failure.get("name")) for failure in claims["failures"]] == [12, "test_wrong"]
    assert made.text.startswith(MODULE)
    told = made.text[len(MODULE) :]
    assert "2 of 3 examples give the output shown, 1 of 2 tests pass, 1 of 1 assertions on import hold." in told
    assert "# Line 12: square(2) gives 4\n# test_wrong gives AssertionError: one\n" in told
    compile(made.text, "m.py", "exec")
    assert made.questions == ((0, 3),)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        ("assert 1 + 1 == 2\n", "hold"),
        ("assert 1 + 1 == 3\n", "error"),
        ("import nowhere_to_be_found\nassert True\n", "error"),
        ("import os\nos._exit(0)\nassert True\n", "error"),
        ("x = 1\n", "none"),
        ("def f(:\n    assert 1\n", "none"),
        ('"""\n>>> import random; random.random()\n0.5\n>>> object()\n<object object at 0x7f>\n"""\n', "fail"),
        ('"""\n>>> object()\n<object object at 0x...>\n"""\n', "hold"),
        ("def test_escape():\n    open('/tmp/escaped', 'w')\n", "fail"),
    ],
)
def test_outcomes(text, outcome):
    ((made,), _) = run(text)
    assert made.metadata["claims"]["outcome"] == outcome
    (again,), _ = run(text)
    assert again == made


def test_a_document_that_does_not_end():
    ((made,), _) = run("while True: pass\nassert True\n", wall_seconds=2)
    assert made.metadata["claims"] == {"outcome": "error", "error": "does not end in 2 s"}


def test_a_text_with_examples():
    text = "To add:\n\n>>> 1 + 1\n2\n>>> x = 3\n>>> x * 2\n7\n\nThat is all."
    ((made,), _) = run(text, id="page")
    assert made.metadata["claims"]["examples"] == [2, 3]
    assert made.text.endswith("2 of 3 examples give the output shown.\nLine 6: x * 2 gives 6\n")
    assert run("Nothing to run.", id="page")[0][0].text == "Nothing to run."


def test_what_stays():
    assert run("assert True\n", keep="holding")[0]
    assert run(MODULE, keep="holding") == ([], {"m.py": "claims fail"})
    assert run("x = 1\n", keep="executed")[1] == {"m.py": "makes no claim that can be executed"}
    made, _ = run("assert True\n", annotate=False)
    assert made[0].text == "assert True\n"
