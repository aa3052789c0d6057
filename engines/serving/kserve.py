"""A manifest for KServe: the repository as an InferenceService of its Triton runtime."""

from __future__ import annotations

import json
import re

from ...export.errors import UsageError

STORES = ("pvc://", "s3://", "gs://", "https://", "http://", "hdfs://", "oci://", "hf://")


def to_yaml(name: str, *, storage: str, gpu: bool, cores: int, models: list[str]) -> str:
    """The manifest.

    Args:
        name: of the service; what is not allowed in names of Kubernetes becomes a dash.
        storage: where the repository will be: "pvc://CLAIM/PATH", "s3://...".
        gpu: ask for one.
        cores: of the processor that are asked for.
        models: of the repository, for the comment.
    Raises:
        UsageError: storage is no address.
    """
    if not storage.startswith(STORES) or re.search(r"\s", storage):
        raise UsageError(f"storage {storage[:80]!r}: wanted where the repository will be, {', '.join(STORES)}...")
    label = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:52].strip("-") or "tokexport"
    label = label if label[0].isalpha() else f"m-{label}"
    resources = [f'cpu: "{cores}"', "memory: 4Gi"] + ['nvidia.com/gpu: "1"'] * gpu
    lines = "".join(f"          {line}\n" for line in resources)
    return f"""\
# Copy this folder to {storage}, then: kubectl apply -f kserve.yaml
# Models: {", ".join(models)}. Those with a model.py need what requirements.txt lists in the runtime's image, or in a
# folder of the volume that TOKEXPORT_SITE_PACKAGES names.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {label}
spec:
  predictor:
    minReplicas: 1
    model:
      modelFormat:
        name: triton
      runtime: kserve-tritonserver
      protocolVersion: v2
      storageUri: {json.dumps(storage)}
      resources:
        requests:
{lines}        limits:
{lines}"""
