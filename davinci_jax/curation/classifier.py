"""L3: a linear classifier over hashed n-grams, trained with JAX in seconds, applied with NumPy alone."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from davinci_jax.curation.labels import LabelledText, divide
from davinci_jax.curation.metrics import measure
from davinci_jax.curation.ngrams import NGrams, Rows
from davinci_jax.errors import DataError
from davinci_jax.experiment import checks
from davinci_jax.files import version, write_atomically

WEIGHTS_FILE, CARD_FILE = "model.safetensors", "card.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How a classifier is trained.

    Attributes:
      epochs: times that every text is seen.
      batch: texts a step.
      learning_rate: peak of Adam's, which falls to 0 along a cosine.
      decay: weight decay of AdamW.
      seed: of the order of the texts.
    """

    epochs: int = 12
    batch: int = 64
    learning_rate: float = 0.1
    decay: float = 1e-4
    seed: int = 0

    def __post_init__(self):
        checks.positive("training", epochs=self.epochs, batch=self.batch, learning_rate=self.learning_rate)
        checks.within("training", 0, 1, decay=self.decay)


@dataclasses.dataclass(frozen=True)
class TextClassifier:
    """A trained classifier.

    Attributes:
      classes: names, in the order of its outputs; numbers ascending, else alphabetical.
      ngrams: its features.
      weights: float32 [2**bits, C].
      bias: float32 [C].
      temperature: divides the logits; set on texts that did not train it (Guo et al. 2017, arXiv 1706.04599).
      sha256: of the weights as stored.
    """

    classes: tuple[str, ...]
    ngrams: NGrams
    weights: np.ndarray
    bias: np.ndarray
    temperature: float = 1.0
    sha256: str = ""

    def logits(self, rows: Rows) -> np.ndarray:
        """Returns float64 [N, C] before the temperature."""
        out = np.empty((len(rows), len(self.classes)))
        for n, (start, end) in enumerate(zip(rows.starts[:-1], rows.starts[1:], strict=True)):
            # Sums of products in float64, in the order of the places: the same on every machine to the last digits.
            gathered = self.weights[rows.places[start:end]].astype(np.float64)
            out[n] = (rows.weights[start:end, None] * gathered).sum(axis=0) + self.bias
        return out

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Returns the calibrated probabilities of the classes for each text, float64 [N, C]."""
        return softmax(self.logits(self.ngrams.rows(texts)) / self.temperature)


def train(
    labels: Sequence[LabelledText],
    folder: str | os.PathLike,
    *,
    name: str,
    ngrams: NGrams = NGrams(),
    training: Training = Training(),
    note: str = "",
) -> dict[str, Any]:
    """Trains a classifier, sets its temperature, measures it on held-out texts and writes it into a folder.

    The same labels and settings give the same files on the same kind of machine, byte for byte.

    Args:
      labels: texts with their classes.
      folder: gets model.safetensors and card.json; made if it is not there.
      name: what it tells, such as "educational value".
      ngrams: its features.
      training: how it is trained.
      note: for the card: who gave the labels, and by which rule.

    Returns:
      The card as written.

    Raises:
      DataError: too few labels, or the folder holds something else.
    """
    folder = pathlib.Path(folder)
    if folder.is_dir() and {file.name for file in folder.iterdir()} - {WEIGHTS_FILE, CARD_FILE}:
        raise DataError("folder", str(folder), "holds other files", "name a folder of its own for the classifier")
    parts = divide(labels)
    classes = tuple(sorted({label.label for label in labels}, key=_class_order))
    rows = {part: ngrams.rows([label.text for label in texts]) for part, texts in parts.items()}
    targets = {part: np.array([classes.index(label.label) for label in texts]) for part, texts in parts.items()}
    weights, bias = _fit(rows["train"], targets["train"], len(classes), ngrams, training)
    plain = TextClassifier(classes, ngrams, weights, bias)
    temperature = fit_temperature(plain.logits(rows["calibration"]), targets["calibration"])
    logits = plain.logits(rows["heldout"])
    stored = safetensors.numpy.save({"weights": weights, "bias": bias})
    card = {
        "name": name,
        "note": note,
        "classes": list(classes),
        "temperature": temperature,
        "ngrams": dataclasses.asdict(ngrams),
        "training": dataclasses.asdict(training),
        "labels": {
            "sha256": _digest_labels(labels),
            **{part: _counts(texts, classes) for part, texts in parts.items()},
        },
        "heldout": measure(softmax(logits / temperature), targets["heldout"], classes),
        "heldout_uncalibrated": measure(softmax(logits), targets["heldout"], classes),
        "sha256": hashlib.sha256(stored).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    temporary.write_bytes(stored)
    temporary.replace(folder / WEIGHTS_FILE)
    write_atomically(folder / CARD_FILE, json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    return card


def load(folder: str) -> TextClassifier:
    """Returns a classifier that `train` wrote; raises `DataError` on anything else, or on damage."""
    return _load(folder, version(pathlib.Path(folder) / CARD_FILE))


@functools.lru_cache(maxsize=8)
def _load(folder: str, _: tuple[str, int, int]) -> TextClassifier:
    path = pathlib.Path(folder)
    try:
        card = json.loads((path / CARD_FILE).read_text(encoding="utf-8"))
        stored = (path / WEIGHTS_FILE).read_bytes()
        if hashlib.sha256(stored).hexdigest() != card["sha256"]:
            raise ValueError("the weights are not those of the card")
        tensors = safetensors.numpy.load(stored)
        return TextClassifier(
            tuple(card["classes"]), NGrams(**card["ngrams"]), tensors["weights"], tensors["bias"],
            float(card["temperature"]), card["sha256"],
        )  # fmt: skip
    except OSError as error:
        problem = f"is no classifier ({pathlib.Path(error.filename).name}: {error.strerror})"
        raise DataError("model", folder, problem, "train one, or give its folder") from error
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise DataError("model", folder, f"is no classifier ({error})", "train one, or give its folder") from error


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns probabilities along the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """Returns the temperature in [0.05, 20] with the least log-loss, to four digits, by golden section in its log."""

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        shifted = scaled - scaled.max(axis=1, keepdims=True)
        return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(targets)), targets]))

    low, high, golden = np.log(0.05), np.log(20), (5**0.5 - 1) / 2
    for _ in range(40):  # the interval shrinks below 1e-7
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return round(float(np.exp((low + high) / 2)), 4)


def _fit(
    rows: Rows, targets: np.ndarray, num_classes: int, ngrams: NGrams, training: Training
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (weights float32 [2**bits, C], bias float32 [C]) of the least mean cross-entropy, found by AdamW.

    Runs on the CPU wherever it is called: sums there have one order, and curation has no business on accelerators.
    """
    import jax
    import jax.numpy as jnp
    import optax

    batches = -(-len(rows) // training.batch)
    schedule = optax.cosine_decay_schedule(training.learning_rate, training.epochs * batches)
    optimizer = optax.adamw(schedule, weight_decay=training.decay)

    def loss(parameters: dict, features: tuple[jax.Array, ...], target: jax.Array, counted: jax.Array):
        places, weights, owners = features
        products = weights[:, None] * parameters["weights"][places]
        logits = jax.ops.segment_sum(products, owners, training.batch) + parameters["bias"]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return (each * counted).sum() / counted.sum()

    @jax.jit
    def step(parameters: dict, state: optax.OptState, *batch: Any):
        updates, state = optimizer.update(jax.grad(loss)(parameters, *batch), state, parameters)
        return optax.apply_updates(parameters, updates), state

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        parameters = {"weights": jnp.zeros((1 << ngrams.bits, num_classes)), "bias": jnp.zeros(num_classes)}
        state = optimizer.init(parameters)
        for epoch in range(training.epochs):
            order = np.random.default_rng((training.seed, epoch)).permutation(len(rows))
            for first in range(0, len(order), training.batch):
                chosen = order[first : first + training.batch]
                # The last batch is filled up with texts that count nothing, so that one program serves all.
                filled = np.concatenate([chosen, np.zeros(training.batch - len(chosen), chosen.dtype)])
                counted = (np.arange(training.batch) < len(chosen)).astype(np.float32)
                parameters, state = step(parameters, state, rows.gather(filled), targets[filled], counted)
        return np.asarray(parameters["weights"]), np.asarray(parameters["bias"])


def _class_order(name: str) -> tuple[bool, float, str]:
    """Numbers before words, numbers by value."""
    try:
        return False, float(name), name
    except ValueError:
        return True, 0.0, name


def _counts(texts: Sequence[LabelledText], classes: Sequence[str]) -> Mapping[str, int]:
    return {name: sum(label.label == name for label in texts) for name in classes}


def _digest_labels(labels: Sequence[LabelledText]) -> str:
    digest = hashlib.sha256()
    for label in labels:
        digest.update(json.dumps([label.text, label.label, label.group]).encode())
    return digest.hexdigest()
