"""What proving a bundle returns: plain values. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from .decisions import Difference

VERDICTS = ("equal", "flipped", "failed")


@dataclass(frozen=True)
class OutputProof:
    """One output over the images that are decided as they were.

    Attributes:
        name: of the output.
        error: largest difference to the reference, over the image's scale; infinite where a value is not finite.
        limit: of it.
        own_error: largest difference to what the file gave when it was bundled. own_limit: of it.
        n_judged: images that were compared.
    """

    name: str
    error: float
    limit: float
    own_error: float
    own_limit: float
    n_judged: int

    @property
    def passed(self) -> bool:
        return self.error <= self.limit and self.own_error <= self.own_limit


@dataclass(frozen=True)
class ImageProof:
    """One image.

    Attributes:
        index: from 0.
        verdict: "equal" decisions and outputs within their limits; "flipped", a near-tie after which nothing is judged;
            "failed".
        pixels: largest difference of the preprocessed photo, in 255ths; None without the photo.
        difference: the first decision that differs, or None.
    """

    index: int
    verdict: str
    pixels: float | None
    difference: Difference | None


@dataclass(frozen=True)
class BundleReport:
    """The outcome of `verify_bundle`.

    Attributes:
        path: of the bundle. runtime: what ran the file, in words. precision: of the file.
        images: every image. outputs: every output.
        decisions: whether the file gives its decisions; else it is judged by its outputs alone.
        faults: what is amiss otherwise, in words. notes: what was not compared, in words.
    """

    path: str
    runtime: str
    precision: str
    images: tuple[ImageProof, ...]
    outputs: tuple[OutputProof, ...]
    decisions: bool
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """No image failed, nothing is amiss, and an image at least could be judged to its end."""
        verdicts = [i.verdict for i in self.images]
        return not self.faults and "failed" not in verdicts and "equal" in verdicts

    def to_json(self) -> dict:
        """Plain JSON values; None for a figure that is not finite."""
        record = asdict(self)
        for row, output in zip(record["outputs"], self.outputs):
            row["passed"] = output.passed
        for row, image in zip(record["images"], self.images):
            row["difference"] = image.difference and image.difference._asdict()
        return _finite({**record, "passed": self.passed})

    def summary(self) -> str:
        """The verdict in one line."""
        count = {v: sum(i.verdict == v for i in self.images) for v in VERDICTS}
        n = len(self.images)
        parts = ["passed" if self.passed else "FAILED", f"{n} image{'s' * (n != 1)}"]
        errors = [o.error for o in self.outputs if o.n_judged and o.limit > 0]
        if errors:
            parts.append(f"max relative difference {max(errors):.1e}")
        parts += [
            f"{count[v]} {words}" for v, words in (("flipped", "flipped near-ties"), ("failed", "failed")) if count[v]
        ]
        if not self.faults and n and count["flipped"] == n:
            parts.append(
                "no image could be judged: every one has a near-tie that this runtime decides otherwise; bundle the "
                "file again with more images, or with this runtime"
            )
        if not self.decisions:
            parts.append("the file gives no decisions, so it is judged by its outputs")
        return ", ".join([*parts, *self.faults])


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
