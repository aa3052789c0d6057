"""The command line in a process of its own, and the options of a tiny model."""

import os
import subprocess
import sys

TINY = [
    "--model",
    "vit_tiny_patch16_224",
    "--model-kwargs",
    "img_size=64",
    "--model-kwargs",
    "patch_size=8",
    "--model-kwargs",
    "embed_dim=64",
    "--model-kwargs",
    "depth=6",
    "--model-kwargs",
    "num_heads=4",
    "--model-kwargs",
    "num_classes=10",
]


def cli(*args, env=None, cwd=None):
    """Run the command in a process of its own."""
    full = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **(env or {})}
    return subprocess.run(
        [sys.executable, "-m", "tokexport", *map(str, args)],
        capture_output=True,
        text=True,
        env=full,
        cwd=cwd,
        timeout=300,
    )
