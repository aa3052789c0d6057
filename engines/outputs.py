"""What a classifier's outputs say: probabilities by the file's activation, and the words for them. numpy alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..export.errors import UsageError

TOP = 5


@dataclass(frozen=True)
class ClassScore:
    """One class of one image. logit: as the model gives it. probability: by the activation; None without one."""

    index: int
    label: str
    logit: float
    probability: float | None


def activation_of(activation: str | None, n_classes: int) -> str:
    """The activation of a classifier: as stated, else a sigmoid for one class and a softmax for several.

    Args:
        activation: "softmax", "sigmoid", "none", or None where a file does not say.
        n_classes: outputs of the classifier.
    """
    if activation not in (None, "softmax", "sigmoid", "none"):
        raise UsageError(f"activation {activation!r}: wanted softmax, sigmoid or none")
    return activation or ("sigmoid" if n_classes == 1 else "softmax")


def probabilities(logits: np.ndarray, activation: str | None = None) -> np.ndarray | None:
    """Probabilities of classes, in float64.

    Args:
        logits: [B, classes].
        activation: see `activation_of`.
    Returns:
        [B, classes]: of each row's classes together 1 (softmax), or each on its own (sigmoid); None for "none".
    """
    logits, kind = np.asarray(logits, dtype=np.float64), activation_of(activation, logits.shape[1])
    if kind == "none":
        return None
    if kind == "sigmoid":
        return np.where(logits >= 0, 1 / (1 + np.exp(-np.abs(logits))), 1 - 1 / (1 + np.exp(-np.abs(logits))))
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


def class_scores(
    logits: np.ndarray, activation: str | None = None, *, labels: tuple[str, ...] = (), top: int = TOP
) -> list[list[ClassScore]]:
    """The highest classes of each image, the highest first.

    Args:
        logits: [B, classes].
        activation: see `activation_of`.
        labels: of the classes; others than as many as classes are not used.
        top: classes of each image at most.
    """
    logits = np.asarray(logits)
    chances = probabilities(logits, activation)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top]
    name = (lambda i: labels[i]) if len(labels) == logits.shape[1] else (lambda i: f"class {i}")
    return [
        [
            ClassScore(int(i), name(i), float(row[i]), None if chances is None else float(chances[k, i]))
            for i in order[k]
        ]
        for k, row in enumerate(logits)
    ]


def heading(activation: str | None, n_classes: int) -> str:
    """What the numbers of a classifier are, in words.

    Args:
        activation: see `activation_of`.
        n_classes: outputs of the classifier.
    """
    kind = activation_of(activation, n_classes)
    if kind == "none":
        return "outputs as the model gives them, no probabilities"
    if kind == "softmax":
        return "probabilities (softmax)"
    return (
        "one class: its logit and the sigmoid of it"
        if n_classes == 1
        else "several labels: each one's own probability (sigmoid)"
    )


def score_words(score: ClassScore, activation: str | None, n_classes: int) -> str:
    """One class in a line: "73.1%  cat", or the logit where there is no probability, or both for a sigmoid.

    Args:
        score: of the class.
        activation: see `activation_of`.
        n_classes: outputs of the classifier.
    """
    if score.probability is None:
        return f"{score.logit:9.4g}  {score.label}"
    if activation_of(activation, n_classes) == "sigmoid":
        return f"{score.probability:6.1%}  {score.label} (logit {score.logit:.4g})"
    return f"{score.probability:6.1%}  {score.label}"
