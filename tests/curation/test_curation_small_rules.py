"""Sizes, garbled text, licences, addresses and code: each rule on both sides of its border."""

import pytest

from davinci_jax.curation.code_rules import CodeQuality, code_signals
from davinci_jax.curation.documents import Document
from davinci_jax.curation.garbled import DropGarbledText, garbled_characters
from davinci_jax.curation.licences import PERMISSIVE, FindLicence, KeepLicences, is_allowed, stated_licence
from davinci_jax.curation.sizes import KeepSizes
from davinci_jax.curation.urls import DropUrls
from davinci_jax.errors import ConfigError, DataError

PROSE = (
    "It was a bright cold day, and the clocks were striking; nobody looked up (why would they?). — “Yes”, he said.\n"
)


def run(operation, document):
    rejects = []
    kept = list(operation.apply(iter([document]), lambda document, reason: rejects.append(reason)))
    return (kept[0] if kept else None), (rejects[0] if rejects else None)


def reason(operation, text="text", **fields):
    return run(operation, Document(id="d", text=text, **fields))[1]


def test_sizes_are_bytes_of_utf8_at_the_border():
    assert reason(KeepSizes(), "é" * 4096) is None
    assert reason(KeepSizes(), "é" * 4095) == "8190 bytes, below 8192"
    assert reason(KeepSizes(min_bytes=0, max_bytes=10), "a" * 10) is None
    assert reason(KeepSizes(min_bytes=0, max_bytes=10), "a" * 11) == "11 bytes, above 10"
    with pytest.raises(ConfigError, match="max_bytes"):
        KeepSizes(min_bytes=10, max_bytes=5)


@pytest.mark.parametrize(
    "noise",
    [
        "\ufffd",
        "\x03\x04",
        "(cid:3)(cid:87)",
        "Ã©Ã¨Ã¼â€™",  # "éèü’" in UTF-8, read as Windows-1252
        "%$#~^&*@|\\ ",
        "\ue001\uf8ff",
    ],
)
def test_planted_noise_is_found_in_the_share_that_it_has(noise):
    rest = PROSE * 20
    half = noise * (len(rest) // len(noise))
    assert garbled_characters(half) >= 0.9 * len(half)
    # More than half goes, less than half stays.
    assert reason(DropGarbledText(), rest + half + half[: len(half) // 3]) is not None
    assert reason(DropGarbledText(), rest + half[: len(half) * 2 // 3]) is None


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        "-" * 70 + "\n" + "=" * 70,
        "ÄÖÜ äöü ß Ångström Ãgua Íslenska ÑANDÚ são Ð Ø",
        "中文字符和日本語のテキスト한국어",
        "if (x[i] != y) { return -1; }  // a->b(*c);",
        "∀x∈ℝ: x² ≥ 0 ⇒ √x²=|x|",
        "a\tb\r\nc\x0c",
    ],
)
def test_text_of_any_script_and_code_are_not_garbled(text):
    assert garbled_characters(text) == 0


def test_misread_utf8_is_what_a_real_misreading_makes():
    for text in ("Café résumé naïve", "“quoted” – dash’s", "Übergröße für Öl"):
        misread = text.encode().decode("cp1252", "ignore")
        marks = sum(character > "\x7f" for character in text)
        assert garbled_characters(misread) >= 2 * marks - 1
    assert garbled_characters("") == 0


@pytest.mark.parametrize(
    ("expression", "allowed"),
    [
        ("MIT", True),
        ("mit", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("GPL-3.0-only OR MIT", True),
        ("MIT AND GPL-3.0-only", False),
        ("(MIT AND Apache-2.0) OR GPL-2.0-only", True),
        ("MIT AND (GPL-2.0-only OR BSD-3-Clause)", True),
        ("GPL-2.0-only OR MIT AND GPL-3.0-only", False),  # AND binds closer
        ("Apache-2.0 WITH LLVM-exception", True),
        ("GPL-2.0-only WITH Classpath-exception-2.0", False),
        ("MIT OR", False),
        ("(MIT", False),
        ("MIT MIT", False),
        ("", False),
        ("(" * 5000, False),
    ],
)
def test_expressions_are_read_as_spdx_means_them(expression, allowed):
    assert is_allowed(expression, PERMISSIVE) is allowed


def test_licences_keep_and_drop():
    assert reason(KeepLicences(), licence="MIT") is None
    assert reason(KeepLicences(), licence="GPL-3.0-only") == "licence GPL-3.0-only"
    assert reason(KeepLicences()) == "no known licence"
    assert reason(KeepLicences(unknown=True)) is None


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("# SPDX-License-Identifier: BSD-3-Clause\nimport x", "BSD-3-Clause"),
        ("/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */", "GPL-2.0 WITH Linux-syscall-note"),
        ("// Licensed under the Apache License,\n// Version 2.0 (the\n// License)", "Apache-2.0"),
        ("# Permission is hereby granted, free of charge, to any\n# person obtaining a copy of", "MIT"),
        ("Redistribution and use in source and binary forms, with or without", "BSD-2-Clause"),
        ("Redistributions in binary form must ... 3. Neither the name of the", "BSD-3-Clause"),
        ("under the terms of the GNU General Public License, either version 3", "GPL-3.0-or-later"),
        ("the GNU Lesser General Public License", "LGPL-2.1-or-later"),
        ("https://creativecommons.org/licenses/by/4.0/", "CC-BY-4.0"),
        ("https://creativecommons.org/licenses/by-sa/3.0/", "CC-BY-SA-3.0"),
        (
            "# SPDX-License-Identifier: apache-2.0 or (mit and LicenseRef-Our-Own)",
            "Apache-2.0 OR (MIT AND LicenseRef-Our-Own)",
        ),
        ("SPDX-License-Identifier: B", None),
        ("SPDX-License-Identifier: the name of a licence", None),
        ("SPDX-License-Identifier: MIT OR Unheard-Of-1.0", None),
        ("SPDX-License-Identifier:\nMIT", None),
        ("SPDX-License-Identifier: MIT" + " OR MIT" * 15 + " AND GPL-3.0-only", None),
        ("SPDX-License-Identifier: " + "(" * 100, None),
        ("SPDX-License-Identifier: NAME\nSPDX-License-Identifier: ISC", "ISC"),
        ("SPDX-License-Identifier: NAME\nApache License, Version 2.0", "Apache-2.0"),
        ("def licence(): pass", None),
        ("x\n" * 5000 + "SPDX-License-Identifier: MIT", None),
    ],
)
def test_a_licence_is_found_where_the_file_states_it(text, licence):
    assert stated_licence(text) == licence
    assert run(FindLicence(), Document(id="d", text=text))[0].licence == licence


def test_a_licence_that_is_known_is_not_looked_for():
    document = Document(id="d", text="SPDX-License-Identifier: MIT", licence="ISC")
    assert run(FindLicence(), document)[0].licence == "ISC"


def test_urls_by_domain_and_word(tmp_path):
    (tmp_path / "domains.txt").write_text("# bad ones\nspam.example\n\nads.test # here\n")
    rule = DropUrls(domains=("Evil.com",), words=("casino",), domains_file=str(tmp_path / "domains.txt"))
    for url in ("https://evil.com/a", "http://www.evil.com:80", "spam.example/x", "https://a.ads.test", "EVIL.COM"):
        assert reason(rule, metadata={"url": url}).startswith("domain "), url
    assert reason(rule, metadata={"url": "https://a.org/best-CASINO_games"}) == "word casino in the url"
    for url in (
        "https://notevil.com",
        "https://a.org/evil.com",
        "https://evil.com.org",
        "https://a.org/casinos",
        7,
        None,
    ):
        assert reason(rule, metadata={"url": url}) is None, url
    assert reason(rule) is None
    assert reason(rule, metadata={"url": "http://[bad"}) == "url cannot be read"
    assert str(tmp_path) not in str(rule.parameters())
    with pytest.raises(DataError, match="does not exist"):
        DropUrls(domains_file=str(tmp_path / "gone.txt"))
    with pytest.raises(ConfigError, match="nothing to look for"):
        DropUrls()


GOOD = '''"""Counts words."""

import collections


def count(text):
    # One pass is enough.
    words = collections.Counter()
    for word in text.split():
        words[word] += 1
    return words
'''


def code(text, language="python"):
    return run(CodeQuality(), Document(id="d", text=text, metadata={"language": language}))


def test_a_file_that_a_person_wrote_stays_with_its_signals():
    document, why = code(GOOD)
    assert why is None
    signals = document.metadata["code"]
    assert signals["lines"] == 8
    assert signals["comment_lines"] == pytest.approx(1 / 8, abs=1e-3)
    assert signals["longest_line"] == max(map(len, GOOD.splitlines()))


@pytest.mark.parametrize(
    ("text", "language", "told"),
    [
        ("x = 1\n", "python", "lines 1, below"),
        (f"# This file was generated by protoc. DO NOT EDIT\n{GOOD}", "python", "generated"),
        (f"{GOOD}\nx = '{'ab ' * 400}'\n", "python", "longest_line"),
        ("\n".join(f"const table{n} = {n * 7919 + 100003}, {n + 104729};" for n in range(99)), "c", "digits"),
        ("\n".join("{}();" * 20 for _ in range(9)), "javascript", "letters"),
        (f"{GOOD}\ndata = (\n{chr(10).join(repr('QUJD' * 24) for _ in range(20))})\n", "python", "encoded"),
        ("\n".join(f"# remark {n} on it" for n in range(20)) + "\nx = 1\n", "python", "comment_lines"),
        ("    result.append(value)\n" * 30 + "y = compute(other)\n" * 3, "ruby", "repeated_lines"),
        ("\n".join(f"def step{n}(): return {n}  # TODO: later" for n in range(9)), "python", "todo_lines"),
        ("def broken(:\n  pass\nx = 1\ny = 2\n", "python", "does not parse"),
        ("import a\nimport b\nfrom c import d\nassert a\n", "python", "nothing but imports"),
    ],
)
def test_what_nobody_wrote_goes_for_its_signal(text, language, told):
    assert told in code(text, language)[1]


def test_comments_of_a_language_without_a_known_mark_and_of_data_do_not_count():
    assert code_signals("# a\n# b\n# c\n", "json")["comment_lines"] == 0
    assert code("# key\n# other\n# third one\nname: value\n", "yaml")[1] is None
    assert code("def broken(:\n  pass\nx = 1\ny = 2\n", "text")[1] is None  # only Python is parsed


def test_an_empty_file_has_signals_too():
    assert code_signals("")["lines"] == 0
    assert code("")[1] == "lines 0, below 3"
