"""How each kind of output (`export/outputs.py`) is judged. Imports no torch.

Limits are of one image: an error is divided by the image's own largest value, so that neither more images nor louder
ones beside it loosen them. A single logit near zero would then make an alarm of nothing, so logits are divided by no
less than FLOOR of the largest that the classifier's rows could give for the image's feature.

Example: a classifier of one class has row w, |w| = 2, and bias 0.1; an image's feature f has |f| = 10. Its logit can
be 20.1 at most and is 0.004, since w and f are almost at right angles. A difference of 0.001 is divided by 0.01 *
20.1 = 0.2 and not by 0.004: 0.5 % and not 25 %.

Of tokens and patches every row is judged by its own largest value, no less than FLOOR of the image's: some tokens of a ViT
are a hundred times as long as others, beside which a wrong one would be nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...export import outputs, precisions
from ...export.errors import UsageError

FLOOR = 0.01
ROUNDING = 1e-5  # of the scale of an output: below, a value is nothing but rounding


@dataclass(frozen=True)
class ImageErrors:
    """Errors of one output, a value for each image.

    Attributes:
        max_abs, max_rel: [B] as in `OutputParity`; infinite where a value is not finite or the shape is another.
        cosine: [B].
        kl, top1, top5: [B], or None for what has no classes.
    """

    max_abs: np.ndarray
    max_rel: np.ndarray
    cosine: np.ndarray
    kl: np.ndarray | None = None
    top1: np.ndarray | None = None
    top5: np.ndarray | None = None


@dataclass(frozen=True)
class OutputKind:
    """One kind of output.

    Attributes:
        row: what it is.
    """

    row: outputs.OutputRow

    @property
    def exact(self) -> bool:
        """Whether entries must be equal; else the largest difference over the image's scale is judged."""
        return self.row.exact

    @property
    def classes(self) -> bool:
        """Whether values are logits: probabilities and likeliest classes are compared too, and their scale has a floor."""
        return self.row.classes

    def limit(self, precision: str) -> float:
        """The largest error an image may have in a precision."""
        return 0.0 if self.exact else precisions.get(self.row.precision or precision).output_limit

    def errors(self, values: np.ndarray, wanted: np.ndarray, reach: np.ndarray) -> ImageErrors:
        """Errors of every image.

        Args:
            values: [B, ...] of the file.
            wanted: [B, ...] to be compared with.
            reach: [B] largest logit the classifier could give, see `sides.run_with_reach`; 0 where there is none.
        Returns:
            `ImageErrors` of B images.
        """
        if values.shape != wanted.shape:
            return _failed(len(values), self.classes)
        if self.exact:
            share = (values != wanted).reshape(len(values), -1).mean(1)
            return ImageErrors(share, share, 1.0 - share)
        floor = floor_of(reach) if self.classes else np.full(len(values), self.row.unit)
        errors = _relative(values, wanted, floor=floor, classes=self.classes)
        if not self.row.each:
            return errors
        axis = 1 if values.ndim == 4 else -1  # [B, C, rows, columns]
        return replace(
            errors, max_rel=_worst_row(*(np.moveaxis(v, axis, -1) for v in (values, wanted)), errors.max_rel)
        )

    def scales(self, wanted: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """What an image's errors are divided by, where it is one number for all of it [B].

        Args:
            wanted, reach: see `errors`.
        """
        largest = np.abs(wanted.reshape(len(wanted), -1)).max(1)
        return np.maximum(largest, floor_of(reach) if self.classes else self.row.unit)


# By name of the output; what follows an underscore ("tokens_5") is a block and changes nothing.
KINDS = {name: OutputKind(row) for name, row in outputs.TABLE.items()}


def kind_of(name: str) -> OutputKind:
    """The row of an output's name. Raises: UsageError when there is none: nothing is passed unjudged."""
    kind = KINDS.get(name.partition("_")[0])
    if kind is None:
        raise UsageError(f"output {name!r} cannot be verified: wanted one of {', '.join(KINDS)}")
    return kind


def floor_of(reach: np.ndarray) -> np.ndarray:
    """The least that an image's logits are divided by. reach: [B], see `sides.run_with_reach`. Returns: [B]."""
    return np.where(np.isfinite(reach), FLOOR * reach, 0.0)  # an infinite one would pass anything


def _worst_row(values: np.ndarray, wanted: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Largest error of any row [.., C] over the row's own scale, of every image.

    whole: [B] errors over the image's scale, infinite where a value is not finite.
    """
    n = len(values)
    a, b = (v.reshape(n, -1, v.shape[-1]).astype(np.float64) for v in (values, wanted))
    length = np.abs(b).max(2)
    scale = np.maximum(np.maximum(length, FLOOR * length.max(1, keepdims=True)), 1e-30)
    with np.errstate(invalid="ignore"):
        worst = (np.abs(a - b).max(2) / scale).max(1)
    return np.where(np.isfinite(whole), worst, np.inf)


def _relative(values: np.ndarray, wanted: np.ndarray, *, floor: np.ndarray, classes: bool) -> ImageErrors:
    n = len(values)
    a, b = (v.reshape(n, -1).astype(np.float64) for v in (values, wanted))
    finite = np.isfinite(a).all(1) & np.isfinite(b).all(1)
    a, b = (np.where(finite[:, None], v, 0.0) for v in (a, b))
    max_abs = np.abs(a - b).max(1)
    scale = np.maximum(np.maximum(np.abs(b).max(1), floor), 1e-30)
    nothing = (
        np.maximum(np.abs(a).max(1), np.abs(b).max(1)) <= ROUNDING * scale
    )  # on both sides: no direction to compare
    cosine = np.where(nothing, 1.0, cosines(a, b))
    figures = {"max_abs": (max_abs, np.inf), "max_rel": (max_abs / scale, np.inf), "cosine": (cosine, 0.0)}
    if classes:
        figures |= {"kl": (divergence(b, a), np.inf), "top1": (top(a, b, 1), 0.0), "top5": (top(a, b, 5), 0.0)}
    return ImageErrors(**{name: np.where(finite, good, bad) for name, (good, bad) in figures.items()})


def _failed(n: int, classes: bool) -> ImageErrors:
    """Errors of n images whose output has another shape."""
    worst, none = np.full(n, np.inf), np.zeros(n)
    return ImageErrors(worst, worst, none, *((worst, none, none) if classes else ()))


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of every row; 1 of two rows of zeros.

    Args:
        a, b: [B, C].
    Returns:
        [B], -1 to 1.
    """
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = (a == b).all(1)
    return np.where(same, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-30))


def top(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Share of each row's k likeliest classes that are the same.

    Args:
        a, b: [B, classes].
        k: 1 or more; all classes where there are fewer.
    Returns:
        [B], 0 to 1.
    """
    k = min(k, a.shape[1])
    best_a, best_b = (np.argsort(-v, axis=1, kind="stable")[:, :k] for v in (a, b))
    return (best_a[:, :, None] == best_b[:, None, :]).any(2).mean(1)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence KL(p || q) of the softmax of every row.

    Args:
        p, q: logits [B, classes].
    Returns:
        [B] in nats, 0 or more.
    """
    log_p, log_q = (v - v.max(1, keepdims=True) for v in (p, q))
    log_p, log_q = (v - np.log(np.exp(v).sum(1, keepdims=True)) for v in (log_p, log_q))
    return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(1), 0.0)
