"""A small ViT of this project's own and real labelled images, for what must work without a download.

The images are scikit-learn's handwritten digits (Alpaydin and Kaynak 1998), 8 x 8 pixels drawn at 32 x 32. The model
has seen the first 1347; the last 450, by other writers, are held out. `train_digits` made the weights.
"""

from __future__ import annotations

import gzip
from pathlib import Path

from .samples import inside

MODEL = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 12, "num_heads": 3, "num_classes": 10}
WEIGHTS = Path(__file__).parent / "digits.safetensors"
HEADS = Path(__file__).parent / "digits_heads.safetensors"
N_TRAIN = 1347


def arrays():
    """All images [1797, 8, 8] (0 to 16, float32) and labels [1797]. Raises: UsageError when scikit-learn is not
    installed.
    """
    import numpy as np

    path = inside("sklearn", "datasets/data/digits.csv.gz", "scikit-learn")
    with gzip.open(path, "rt") as f:
        rows = np.loadtxt(f, delimiter=",", dtype=np.float32)
    return rows[:, :64].reshape(-1, 8, 8), rows[:, 64].astype(np.int64)


def picture(image):
    """One digit [8, 8] as a PIL image of 32 x 32 pixels, white on black."""
    import numpy as np
    from PIL import Image

    grey = Image.fromarray(np.uint8(np.minimum(image * 16, 255))).resize((32, 32), Image.Resampling.BICUBIC)
    return grey.convert("RGB")


def write_held_out(folder: Path, limit: int | None = None) -> list[Path]:
    """Write held-out digits as folder/LABEL/NUMBER.png, as many as limit says or all."""
    images, labels = arrays()
    last = len(images) if limit is None else min(N_TRAIN + limit, len(images))
    paths = []
    for i in range(N_TRAIN, last):
        place = folder / str(labels[i])
        place.mkdir(parents=True, exist_ok=True)
        paths.append(place / f"{i}.png")
        picture(images[i]).save(paths[-1])
    return paths


def write_layers(path: Path) -> Path:
    """Write what the methods of trained layers need: the score heads, and metric layers that nobody trained: those of ToMe's keys."""
    from safetensors.torch import load_file, save_file

    from ...export.models import as_plain
    from ...export.models.learned_layers import keys_as_metric
    from ...export.models.load import load_model

    model = load_model(MODEL, KWARGS, checkpoint=WEIGHTS).module
    save_file(load_file(HEADS) | keys_as_metric(as_plain(model)), path)
    return path
