"""Asking a server of the open inference protocol (Triton, KServe) over HTTP, with nothing but Python's own."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from contextlib import suppress

import numpy as np

from ...export.errors import EngineError, UsageError

DTYPES = {"FP32": np.float32, "UINT8": np.uint8, "INT64": np.int64}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
LENGTH = "Inference-Header-Content-Length"


class ServerError(EngineError):
    """A server refused or could not answer a request; its own words follow."""


def ask(
    address: str,
    model: str,
    inputs: dict[str, np.ndarray | list[bytes]],
    *,
    shapes: dict | None = None,
    timeout: float = 60,
) -> dict[str, np.ndarray]:
    """One request, tensors in binary both ways.

    Args:
        address: of the server, "http://127.0.0.1:8000".
        model: name of it.
        inputs: name -> an array, or the bytes of files, one a row.
        shapes: input name -> shape of its bytes; [rows, 1] without.
        timeout: seconds.
    Returns:
        Output name -> array.
    Raises:
        UsageError: an array of a type that is not float32, uint8 or int64.
        ServerError: the server refused the request, or is not there.
    """
    heads, parts = [], []
    for name, value in inputs.items():
        if isinstance(value, list):
            kind, shape = "BYTES", (shapes or {}).get(name, [len(value), 1])
            content = b"".join(len(item).to_bytes(4, "little") + item for item in value)
        elif value.dtype in NAMES:
            kind, shape, content = NAMES[value.dtype], list(value.shape), np.ascontiguousarray(value).tobytes()
        else:
            raise UsageError(
                f"input {name!r} is {value.dtype}: wanted {', '.join(np.dtype(d).name for d in DTYPES.values())}"
            )
        heads.append({"name": name, "shape": shape, "datatype": kind, "parameters": {"binary_data_size": len(content)}})
        parts.append(content)
    header = json.dumps({"inputs": heads, "parameters": {"binary_data_output": True}}).encode()
    url = f"{address}/v2/models/{model}/infer"
    headers = {LENGTH: str(len(header)), "Content-Type": "application/octet-stream"}
    reply, size = _post(urllib.request.Request(url, b"".join([header, *parts]), headers), timeout)
    outputs, start = {}, size
    for output in json.loads(reply[:size])["outputs"]:
        n = output.get("parameters", {}).get("binary_data_size", 0)
        flat = np.frombuffer(
            reply, DTYPES[output["datatype"]], n // np.dtype(DTYPES[output["datatype"]]).itemsize, start
        )
        outputs[output["name"]] = flat.reshape(output["shape"])
        start += n
    return outputs


def _post(request: urllib.request.Request, timeout: float) -> tuple[bytes, int]:
    """(body of the reply, length of the JSON at its beginning). Raises: ServerError."""
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            body = reply.read()
            return body, int(reply.headers.get(LENGTH) or len(body))
    except urllib.error.HTTPError as e:
        text = e.read().decode("utf-8", "replace")
        with suppress(ValueError, KeyError, TypeError):
            text = json.loads(text)["error"]
        raise ServerError(
            f"{request.full_url}: the server refused ({e.code}): {' '.join(text.split())[:400]}"
        ) from None
    except OSError as e:
        raise ServerError(
            f"{request.full_url}: no answer ({getattr(e, 'reason', e)}): is the server running?"
        ) from None


def statistics(address: str, model: str) -> dict[int, int]:
    """Batch size -> how many times a server has run a model with it.

    Args:
        address: of the server.
        model: name of it.
    """
    try:
        with urllib.request.urlopen(f"{address}/v2/models/{model}/stats", timeout=30) as reply:
            (stats,) = json.load(reply)["model_stats"]
    except OSError as e:
        raise ServerError(f"{address}: no statistics of {model} ({e})") from None
    return {int(b["batch_size"]): int(b["compute_infer"]["count"]) for b in stats.get("batch_stats", [])}
