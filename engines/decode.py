"""Photos decoded, resized and cropped in processes of their own, ahead of what computes with them.

Pixels travel as uint8, a quarter of what the model reads; they are normalised where the model runs.
"""

from __future__ import annotations

import io
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process

import numpy as np

from ..export.errors import EngineError
from ..export.provenance import Preprocess
from .data import ImageItem
from .images import crop, normalise

AHEAD = 2  # chunks of each process that are decoded or waiting
MOST_WORKERS = 16


@dataclass(frozen=True)
class BrokenImage:
    """An image that gave nothing.

    Attributes:
        index, name: as of the `ImageItem`.
        error: what is wrong with it, in a line.
    """

    index: int
    name: str
    error: str


@dataclass(frozen=True)
class DecodedChunk:
    """Some images as the model sees them.

    Attributes:
        items: those that could be read, without what they were read from.
        pixels: [B, H, W, C] uint8.
        broken: those that could not.
    """

    items: tuple[ImageItem, ...]
    pixels: np.ndarray
    broken: tuple[BrokenImage, ...]


class _NamedBytes(io.BytesIO):
    """Encoded bytes that go by the image's name in messages."""

    def __init__(self, content: bytes, name: str):
        super().__init__(content)
        self._name = name

    def __repr__(self) -> str:
        return self._name


def decode(items: Iterable[ImageItem], preprocess: Preprocess) -> DecodedChunk:
    """Read images; what is wrong with one is told beside the others.

    Args:
        items: what to read.
        preprocess: of the model.
    """
    good, pixels, broken = [], [], []
    for item in items:
        try:
            if item.source is None:
                raise ValueError("the row has no image")
            source = _NamedBytes(item.source, item.name) if isinstance(item.source, bytes) else item.source
            image = np.asarray(crop(source, preprocess))
        except Exception as e:  # Pillow's decoders raise whatever a damaged file makes them meet
            text = " ".join(str(e).split()).removeprefix("images: ")[:300] or type(e).__name__
            broken.append(BrokenImage(item.index, item.name, text))
        else:
            good.append(item._replace(source=None))
            pixels.append(image.reshape(*preprocess.size, len(preprocess.mean)))
    shape = (0, *preprocess.size, len(preprocess.mean))
    return DecodedChunk(tuple(good), np.stack(pixels) if pixels else np.zeros(shape, np.uint8), tuple(broken))


class Decoder:
    """Decodes chunks of images in order, in processes ahead of the caller; use it in a `with` block.

    Args:
        preprocess: of the model.
        workers: processes; 0 decodes in the caller's own.
    """

    def __init__(self, preprocess: Preprocess, workers: int):
        self._preprocess, self._workers = preprocess, workers
        self._pool = None

    def __enter__(self) -> Decoder:
        if self._workers:  # spawned: a fork would copy the threads' locks of a runtime
            self._pool = ProcessPoolExecutor(self._workers, get_context("spawn"), initializer=_start_worker)
        return self

    def __exit__(self, *_) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def chunks(self, items: Iterable[ImageItem], size: int) -> Iterator[DecodedChunk]:
        """Decoded images in order; at most AHEAD chunks for each process are held beside the one given out.

        Args:
            items: what to read; taken as they are needed.
            size: images in a chunk; the last may have fewer.
        Raises:
            EngineError: a decoding process was killed.
        """
        groups = _groups(items, size)
        if self._pool is None:
            yield from (decode(group, self._preprocess) for group in groups)
            return
        waiting: deque = deque()
        try:
            for group in groups:
                waiting.append(self._pool.submit(decode, group, self._preprocess))
                if len(waiting) > AHEAD * self._workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise EngineError(
                "a decoding process was killed (out of memory?): what is finished is kept, run it again, perhaps with "
                "fewer workers"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def default_workers(n_images: int) -> int:
    """Decoding processes when nobody says how many: half the cores, none for so few images that starting them is longer."""
    return 0 if n_images < 256 else max(1, min(MOST_WORKERS, (os.cpu_count() or 1) // 2))


def model_input(pixels: np.ndarray, preprocess: Preprocess, kind: str = "float32") -> np.ndarray:
    """Decoded pixels as a file takes them, equal to `images.normalise` to the bit.

    Args:
        pixels: [B, H, W, C] uint8.
        preprocess: of the model.
        kind: the provenance's `input`.
    Returns:
        [B, C, H, W] float32 or uint8, or [B, H, W, C] uint8.
    """
    if kind == "uint8-nhwc":
        return pixels
    if kind == "uint8-nchw":
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    every = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (1, 256, pixels.shape[-1]))
    table = normalise(every, preprocess)[:, 0]  # [C, 256]: each value of a pixel, normalised once
    out = np.empty((len(pixels), pixels.shape[-1], *pixels.shape[1:3]), np.float32)
    for channel, values in enumerate(table):
        out[:, channel] = values[pixels[..., channel]]
    return out


def _groups(items: Iterable[ImageItem], size: int) -> Iterator[list[ImageItem]]:
    group: list[ImageItem] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _start_worker() -> None:
    """In a decoding process: leave interrupts to the parent, and go when the parent is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # of damaged metadata and large photos: what matters is an error
    parent = parent_process()

    def follow() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    if parent is not None:
        threading.Thread(target=follow, daemon=True).start()
