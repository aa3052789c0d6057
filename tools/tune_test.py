"""How good `tokexport tune` and `tokexport rates learn` are, measured: predictions, and choices on photos that they have not seen.

    python -m tokexport.tools.tune_test prediction --runtime openvino --dtype bf16
    python -m tokexport.tools.tune_test choice tuned.onnx --images other-photos/ --limit 120
    python -m tokexport.tools.tune_test rates learned.onnx --published deit_small@2.9 --images other-photos/ --limit 120

`prediction` times six schedules that were not used for the fit, interleaved with the dense model, and compares them with the latency model.
`choice` compares a file that tune wrote with ToMe at one r for all blocks at the same measured time, on other photos: the distance of ToMe is read
between the two r whose times lie around the file's, image by image, so that the difference has a standard error. `rates` compares a file
of DiffRate with learned counts with the same model under published counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from ..engines.measure.curves import curves_of
from ..engines.search.candidate_times import FileTime, TimedFiles, fitted_model, key_of
from ..engines.search.image_errors import ErrorMeter, chosen_photos
from ..export import macs
from ..export.errors import FailureError, UsageError
from ..export.models import as_plain
from ..export.models.load import load_model
from ..export.schedule import Schedule

# For 12 blocks; ToMe and EViT only, so that the cost of a reduction is fitted once each, on a schedule that is none of these.
FIT = {"tome": {"r": 10}, "evit": {"keep_rate": 0.6}}
SCHEDULES = (
    ("tome", {"r": 8}),
    ("tome", {"r": 13}),
    ("tome", {"r": 16}),
    ("tome", {"r": 24, "at": "even"}),
    ("tome", {"r": 24, "at": "even", "align": 8}),
    ("evit", {"keep_rate": 0.7}),
)


def prediction(args) -> dict:
    """Predicted and measured times of six schedules, and the model without a cost of reductions and by MACs alone."""
    loaded = load_model(args.model)
    plain = as_plain(loaded.module)
    dense, where = Schedule("none", *plain.size), {"dtype": args.dtype, "batch": args.batch, "threads": args.threads}
    curves = curves_of(plain, args.runtime, **where, fresh=args.fresh, progress=_say)
    make = lambda method, options: loaded.schedule(method, **options)
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        files = TimedFiles(loaded, Path(folder), runtime=args.runtime, seconds=args.seconds, **where)
        fit = {method: make(method, options) for method, options in FIT.items()}
        model = fitted_model(curves, files, fit, dense=dense, fresh=args.fresh, progress=_say)
        schedules = [make(*row) for row in SCHEDULES]
        times = files.times(schedules, dense)
    speedups = {key: t.speedup.middle for key, t in times.items()}
    rows, cost = [], lambda s: macs.count(plain.dims, s)
    for (method, options), schedule in zip(SCHEDULES, schedules, strict=True):
        measured = 1 / speedups[key_of(schedule)]  # of the dense model's time
        share = model.predict(schedule) / model.predict(dense)
        halves = curves.half_blocks(schedule, model.tail_dims) / curves.half_blocks(dense, model.tail_dims)
        rows.append(
            {
                "schedule": f"{method} {options}",
                "ms": times[key_of(schedule)].ms,
                "speedup": 1 / measured,
                "off": share / measured - 1,
                "off_without_steps": halves / measured - 1,
                "off_by_macs": cost(schedule) / cost(dense) / measured - 1,
            }
        )
    off = np.abs([row["off"] for row in rows])
    summary = {
        "median": float(np.median(off)),
        "worst": float(off.max()),
        "steps_ms": model.steps,
        "scale": model.scale,
    }
    return {"runtime": args.runtime, **where, "processor": curves.key.processor.split(",")[0], **summary, "rows": rows}


def choice(args) -> dict:
    """The file's distance on other photos against that of ToMe with one r at the same measured time."""
    from ..engines.files import inspect_file
    from ..engines.images import find_images, load_images
    from ..export.rebuild import rebuild

    provenance = inspect_file(args.file).provenance
    table = provenance.tuning
    if table is None:
        raise UsageError(f"{args.file} was not written by `tokexport tune`")
    loaded = rebuild(provenance, args.file, checkpoint=args.checkpoint)
    dense, own = Schedule("none", *provenance.schedule.size), provenance.schedule
    photos, _ = chosen_photos(find_images(args.images), None, limit=args.limit, seed=0)
    where = {key: table[key] for key in ("runtime", "dtype", "batch", "threads")}
    ladder = [loaded.schedule("tome", r=r) for r in args.r]
    with tempfile.TemporaryDirectory(prefix="tokexport-") as folder:
        files = TimedFiles(loaded, Path(folder), seconds=args.seconds, **where)
        times = files.times([own, *ladder], dense)
    every = [dense, own, *ladder]
    speed = lambda s: times[key_of(s)].speedup.middle
    around = [i for i in range(len(ladder) - 1) if speed(ladder[i]) <= speed(own) <= speed(ladder[i + 1])]
    if not around:
        spread = ", ".join(f"r={r}: {speed(s):.3f}" for r, s in zip(args.r, ladder, strict=True))
        raise UsageError(
            f"the file is {speed(own):.3f} times as fast, which lies between none of {spread}: give other --r"
        )
    low, high = ladder[around[0]], ladder[around[0] + 1]
    share = (1 / speed(own) - 1 / speed(low)) / (1 / speed(high) - 1 / speed(low))
    meter = ErrorMeter(loaded, load_images(photos, loaded.preprocess), progress=lambda done: _say("dense", done))
    errors = {name: meter.errors(s) for name, s in (("own", own), ("low", low), ("high", high))}
    plain = errors["low"].distances * (1 - share) + errors["high"].distances * share
    gap = (errors["own"].distances - plain) / plain.mean()
    error = float(gap.std(ddof=1) / len(gap) ** 0.5)
    return {
        "file": str(args.file),
        "chosen": next(row["name"] for row in table["rows"] if row["chosen"]),
        "speedup": speed(own),
        "between": [args.r[around[0]], args.r[around[0] + 1], share],
        "photos": len(photos),
        "error": errors["own"].mean,
        "over_tome": float(gap.mean()),
        "standard_error": error,
        "holds": float(gap.mean()) <= 2 * error,
        "times": {n: _plain(times[key_of(s)]) for n, s in zip(["dense", "own", *map(str, args.r)], every, strict=True)},
    }


def rates(args) -> dict:
    """The distances from the dense model, on other photos, under a file's counts and under published ones, and what both cost."""
    from ..engines.files import inspect_file
    from ..engines.images import find_images, load_images
    from ..export.rebuild import rebuild

    provenance = inspect_file(args.file).provenance
    loaded = rebuild(provenance, args.file, checkpoint=args.checkpoint)
    photos, _ = chosen_photos(find_images(args.images), None, limit=args.limit, seed=0)
    schedules = {"learned": provenance.schedule, "published": loaded.schedule("diffrate", rates=args.published)}
    meter = ErrorMeter(loaded, load_images(photos, loaded.preprocess), progress=lambda done: _say("dense", done))
    errors = {name: meter.errors(schedule).distances for name, schedule in schedules.items()}
    dims = as_plain(loaded.module).dims
    cost = {name: macs.count(dims, schedule) for name, schedule in schedules.items()}
    return {
        "file": str(args.file),
        "published": args.published,
        "photos": len(photos),
        "macs_ratio": {name: macs.count(dims, macs.dense(schedules[name])) / n for name, n in cost.items()},
        "error": {name: float(e.mean()) for name, e in errors.items()},
        "learned_over_published": float(errors["learned"].mean() / errors["published"].mean()),
        "standard_error": float(
            (errors["learned"] - errors["published"]).std(ddof=1) / len(photos) ** 0.5 / errors["published"].mean()
        ),
    }


def _plain(time: FileTime) -> dict:
    return {"ms": time.ms, "speedup": time.speedup.middle}


def _say(text: str, share: float) -> None:
    print(f"{share:5.0%} {text}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run one of the three and print JSON; exit code 1 where the choice does not hold, 2 for wrong use, 3 for a runtime that failed."""
    parser = argparse.ArgumentParser(
        prog="python -m tokexport.tools.tune_test", description="How good tune and rates learn are, measured."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prediction", help="six schedules that were not used for the fit")
    first.add_argument(
        "--model", default="deit_small_patch16_224", help="of 12 blocks, random weights; default %(default)s"
    )
    first.add_argument("--runtime", default="ort")
    first.add_argument("--dtype", default="fp32")
    first.add_argument("--batch", type=int, default=1)
    first.add_argument("--threads", type=int, default=1)
    first.add_argument("--fresh", action="store_true", help="measure again what is in the cache")
    second = commands.add_parser("choice", help="a file of tune against ToMe with one r, on other photos")
    second.add_argument("file", type=Path)
    second.add_argument("--images", nargs="+", required=True)
    second.add_argument("--limit", type=int, default=120)
    second.add_argument("--checkpoint")
    second.add_argument("--r", type=lambda text: [int(r) for r in text.split(",")], default=[10, 12, 14, 16, 18])
    third = commands.add_parser("rates", help="a file with learned counts against published ones, on other photos")
    third.add_argument("file", type=Path)
    third.add_argument("--published", default="deit_small@2.9", help="default %(default)s")
    third.add_argument("--images", nargs="+", required=True)
    third.add_argument("--limit", type=int, default=120)
    third.add_argument("--checkpoint")
    for command in (first, second):
        command.add_argument("--seconds", type=float, default=40.0, help="most time for timing; default %(default)s")
    args = parser.parse_args(arguments)
    try:
        result = {"prediction": prediction, "choice": choice, "rates": rates}[args.command](args)
    except (UsageError, FailureError) as e:
        print(f"Error: {e}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 3
    print(json.dumps(result, indent=1))
    return 0 if result.get("holds", True) else 1


if __name__ == "__main__":
    sys.exit(main())
