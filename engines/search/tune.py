"""Choose a schedule: the least harm on a deployer's images within a budget, on the runtime that will serve.

1. Curves of half a block (from the cache, or measured), the dense file's time, and what one reduction of each method costs.
2. Every variant is solved for the budget by the predicted time.
3. Errors on the images, by the reference in batches.
4. The best three are exported and timed beside the dense file; one that misses the budget is solved for again.
5. The best of those that are within the budget is written, with the table in its provenance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...export import macs
from ...export.errors import UsageError
from ...export.files import aside_folder, check_output, read_model, write_model
from ...export.models import as_plain
from ...export.provenance import of_model, store
from ...export.schedule import Schedule
from ..measure.curves import curves_of
from ..measure.environment import processor
from .budget import Budget
from .candidate_times import FileTime, TimedFiles, fitted_model, key_of
from .image_errors import ErrorMeter, ImageErrors, chosen_photos, paired_difference
from .photos import SearchPhotos
from .tune_report import TuneReport, TuneRow, WorstImage
from .variants import TunedModel, Variant, strength_for, variants

if TYPE_CHECKING:
    from ...export.models.load import LoadedModel
    from ..measure.latency_model import LatencyModel

BEST = 3  # candidates that are exported and timed
AGAIN = 2  # times that they are solved for again
WORST = 6  # images in the report
FURTHER = (0.35, 0.7, 1.3)  # of the chosen strength, for the picture and for ladders
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class TuneSettings:
    """Where the file will run, and how long is spent.

    Attributes:
        runtime: what will run it.
        dtype: of the trunk, a graph precision.
        batch: images a run.
        threads: of the processor, 0 for the runtime's own choice.
        methods: names of the reducer table, None for all that fit the model.
        rates: files of DiffRate counts to be among the candidates.
        limit: images at most, drawn by the seed.
        seed: the same one gives the same choice, as long as the curves stay in the cache.
        seconds: most time for timing the best files.
        fresh: measure curves again that are in the cache.
    """

    runtime: str = "ort"
    dtype: str = "fp32"
    batch: int = 1
    threads: int = 1
    methods: tuple[str, ...] | None = None
    rates: tuple[str, ...] = ()
    limit: int = 64
    seed: int = 0
    seconds: float = 20.0
    fresh: bool = False


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A variant at one strength. reaches: its schedule is within the budget."""

    variant: Variant
    strength: float
    schedule: Schedule
    reaches: bool
    errors: ImageErrors | None = None

    @property
    def distance(self) -> float:
        return float(self.errors.distances.mean())


def tune(
    loaded: LoadedModel,
    photos: SearchPhotos,
    path: str | Path,
    budget: Budget,
    *,
    settings: TuneSettings = TuneSettings(),
    force: bool = False,
    progress: Progress = lambda text, share: None,
) -> TuneReport:
    """Write the file that does least harm within a budget.

    Args:
        loaded: from `load_model`, with trained weights.
        photos: like those the model will see; with labels, accuracies are told too.
        path: of the file; nothing is written when no candidate reaches the budget (`TuneReport.passed`).
        budget: a speedup, a latency or MACs.
        settings: where the file will run.
        force: replace the file.
        progress: called with what is done and the share done.
    Raises:
        UsageError: wrong settings, a method or rates file that does not fit, photos that cannot be read, labels without classes.
        EngineError, StorageError: the runtime or the disk failed.
    """
    path = check_output(path, force)
    run = _Run(loaded, budget, settings, progress)
    run.prepare(photos)
    with aside_folder(path.parent, f"output {path}") as folder:
        run.measure(folder)
        report = run.choose()
        if report.chosen is not None:
            progress("writing the file", 0.99)
            report = replace(report, path=path)
            _write(run.files.path_of(run.chosen_schedule), path, report)
    return report


def _write(source: Path, path: Path, report: TuneReport) -> None:
    """The chosen file, with the table in its provenance."""
    proto, weights = read_model(source)
    table = report.to_json()
    del table["worst"]  # names of photos are nobody's business but the deployer's
    table["path"] = path.name
    store(proto, replace(of_model(proto, str(source)), tuning=table))
    write_model(proto, weights, path)


class _Run:
    """One tuning, step by step."""

    def __init__(self, loaded: LoadedModel, budget: Budget, settings: TuneSettings, progress: Progress):
        self.loaded, self.budget, self.settings, self.progress = loaded, budget, settings, progress
        self.plain = as_plain(loaded.module)
        self.dense = Schedule("none", *self.plain.size)
        self.model = _tuned_model(loaded)
        self.variants, left_out = variants(self.model, settings.methods, settings.rates)
        self.notes: list[str] = [*left_out]
        self.chosen_schedule: Schedule = self.dense
        if settings.limit < 1 or not 0 < settings.seconds < 86400:
            raise UsageError(
                f"limit {settings.limit}, seconds {settings.seconds:g}: wanted 1 image or more, 0 to 86400 seconds"
            )

    def prepare(self, photos: SearchPhotos) -> None:
        """The images are read, and all are judged to be images, before anything is measured."""
        s = self.settings
        if photos.labels is not None and self.loaded.module.num_classes < 2:
            raise UsageError("labels: the model has no classes to compare them with: leave labels out")
        paths, labels = chosen_photos(photos.paths, photos.labels, limit=s.limit, seed=s.seed)
        self.progress(f"reading {len(paths)} images", 0.0)
        reader = SearchPhotos(paths, labels).reader(self.loaded.preprocess)
        self.paths, self.labels, self.pixels = paths, labels, reader(range(len(paths)))

    def measure(self, folder: Path) -> None:
        """Curves, the dense file, the cost of a reduction of each method."""
        s, part = self.settings, lambda low, high: lambda text, share: self.progress(text, low + (high - low) * share)
        where = {"dtype": s.dtype, "batch": s.batch, "threads": s.threads}
        curves = curves_of(self.plain, s.runtime, **where, fresh=s.fresh, progress=part(0.01, 0.25))
        self.files = TimedFiles(self.loaded, folder, runtime=s.runtime, seconds=s.seconds, **where)
        self.latency: LatencyModel = fitted_model(
            curves, self.files, self._for_fit(), dense=self.dense, fresh=s.fresh, progress=part(0.25, 0.45)
        )
        lost = {v.method for v in self.variants} - self.latency.steps.keys()
        self.notes += [f"{method} is left out: {s.runtime} could not run a file of it" for method in sorted(lost)]
        self.variants = [v for v in self.variants if v.method not in lost]

    def _for_fit(self) -> dict[str, Schedule]:
        """A schedule of each method for the fit: the first variant at a third less arithmetic."""
        target = macs.count(self.plain.dims, self.dense) * 2 / 3
        fits = lambda schedule: macs.count(self.plain.dims, schedule) <= target
        first = {v.method: v for v in reversed(self.variants)}
        schedules = {m: strength_for(v, self.plain.size, fits)[1] for m, v in first.items()}
        return {m: schedule for m, schedule in schedules.items() if schedule.steps}

    def choose(self) -> TuneReport:
        """Solve, judge, time; the report says what is chosen."""
        dense_ms = self.latency.predict(self.dense)
        if self.budget.fits(dense_ms, macs.count(self.plain.dims, self.dense), dense_ms=dense_ms):
            self.files.path_of(self.dense)
            self.meter = ErrorMeter(self.loaded, self.pixels, self.labels)
            row = replace(
                self._row(_Candidate(_none(), 0, self.dense, True)), chosen=True, measured_ms=dense_ms, error=0.0
            )
            return self._report([row], dense_ms)
        candidates = _distinct([self._solved(v) for v in self.variants])
        reaching = [c for c in candidates if c.reaches]
        if not reaching:
            self.meter = None
            return self._report([self._row(c) for c in candidates], dense_ms)
        judged = self._judged(reaching)
        return self._timed(judged, [c for c in candidates if not c.reaches])

    def _solved(self, variant: Variant, factor: float = 1.0) -> _Candidate:
        """A variant at the least strength that is within the budget, its predicted time multiplied by a factor."""
        dense_ms = self.latency.predict(self.dense)

        def fits(schedule: Schedule) -> bool:
            ms = self.latency.predict(schedule) * (factor if schedule.steps else 1)
            return self.budget.fits(ms, self._macs(schedule), dense_ms=dense_ms)

        strength, schedule = strength_for(variant, self.plain.size, fits)
        return _Candidate(variant, strength, schedule, fits(schedule))

    def _macs(self, schedule: Schedule) -> int:
        from ...export.graph.export import cost_dims
        from ...export.models.learned_layers import learned_layers

        if "metric_layer" in (step.signal for step in schedule.steps):
            return macs.count(cost_dims(self.plain, learned_layers(self.loaded, schedule)), schedule)
        return macs.count(self.plain.dims, schedule)

    def _judged(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """With their errors on the images, the best first."""
        low, high, n = 0.45, 0.8, len(candidates) + 1
        step = (high - low) / n
        dense = lambda share: self.progress("running the dense model", low + step * share)
        self.meter, judged = ErrorMeter(self.loaded, self.pixels, self.labels, dense), []
        for i, c in enumerate(candidates, 1):
            tell = lambda share, i=i, c=c: self.progress(f"{i} of {n - 1}: {c.variant.name}", low + step * (i + share))
            judged.append(replace(c, errors=self.meter.errors(c.schedule, tell)))
        return sorted(judged, key=lambda c: c.distance)

    def _timed(self, pool: list[_Candidate], others: list[_Candidate]) -> TuneReport:
        """The best ones timed, and solved for again where prediction and time differ; then the choice."""
        met: dict[str, _Candidate] = {}
        known: dict[str, FileTime] = {}
        left = pool
        while left and not met:  # the next ones only where none of these can be brought within the budget
            finalists, left = left[:BEST], left[BEST:]
            pool = [*self._finals(finalists, met, known), *(c for c in pool if c not in finalists)]
        chosen = min(met.values(), key=lambda c: c.distance, default=None)
        every = {key_of(c.schedule): c for c in sorted([*pool, *met.values()], key=lambda c: c.distance)}
        dense_ms = known[key_of(self.dense)].ms
        rows = [self._row(c, known.get(k)) for k, c in every.items()]
        missed = [k in known and k not in met for k in every]
        rows = [replace(row, reaches=not miss) for row, miss in zip(rows, missed, strict=True)]
        if chosen is None:
            return self._report([*rows, *map(self._row, others)], dense_ms)
        self.chosen_schedule = chosen.schedule
        rows = _against(chosen, list(every.values()), rows)
        rows += [*map(self._row, others), *(replace(self._row(c), further=True) for c in self._further(chosen))]
        return self._report(rows, dense_ms, worst=self._worst(chosen))

    def _finals(
        self, best: list[_Candidate], met: dict[str, _Candidate], known: dict[str, FileTime]
    ) -> list[_Candidate]:
        """The finalists as they were timed last; those within the budget and all times are noted by `key_of`."""
        final = list(best)
        for again in range(AGAIN + 1):
            self.progress("exporting and timing the best", 0.8 + 0.05 * again)
            times = self.files.times([c.schedule for c in best], self.dense)
            known |= times
            scale = times[key_of(self.dense)].ms / self.latency.predict(self.dense)  # the machine's speed now
            self.latency = replace(self.latency, scale=self.latency.scale * scale)
            best = [c for c in best if key_of(c.schedule) in times]
            met |= {key_of(c.schedule): c for c in best if self._met(c, times)}
            off = [c for c in best if self._off(c, times)]
            if not off or again == AGAIN:
                break
            best = [self._again(c, times) for c in off]
            final = [next((n for n in best if n.variant is c.variant), c) for c in final]
        return final

    def _off(self, candidate: _Candidate, times: dict) -> bool:
        """Whether its time is off the budget, and another strength could mend that."""
        off = self.budget.off(times[key_of(candidate.schedule)].ms, dense_ms=times[key_of(self.dense)].ms)
        return off and self._again(candidate, times, judge=False).schedule != candidate.schedule

    def _again(self, candidate: _Candidate, times: dict, *, judge: bool = True) -> _Candidate:
        """Solved for with what its file took over what was predicted."""
        measured, predicted = times[key_of(candidate.schedule)].ms, self.latency.predict(candidate.schedule)
        solved = self._solved(candidate.variant, measured / predicted)
        if not judge or not solved.reaches:
            return solved if solved.reaches else candidate
        self.notes.append(
            f"{candidate.variant.name}: {measured:.2f} ms measured, {predicted:.2f} predicted; solved for again with that"
        )
        return replace(solved, errors=self.meter.errors(solved.schedule))

    def _met(self, candidate: _Candidate, times: dict) -> bool:
        if self.budget.kind == "macs":
            return self._macs(candidate.schedule) <= self.budget.value
        return self.budget.met(times[key_of(candidate.schedule)].ms, dense_ms=times[key_of(self.dense)].ms)

    def _further(self, chosen: _Candidate) -> list[_Candidate]:
        """The chosen variant at other strengths: the line of the picture, and the rungs of a ladder."""
        out = []
        for i, share in enumerate(FURTHER):
            self.progress("the chosen one, more and less strongly", 0.94 + 0.015 * i)
            strength = min(chosen.strength * share, chosen.variant.most)
            options = {k: v for k, v in chosen.variant.options(strength).items() if v is not None}
            schedule = self.loaded.schedule(chosen.variant.method, **options)
            if schedule.steps and schedule != chosen.schedule:
                out.append(
                    _Candidate(chosen.variant, strength, schedule, reaches=True, errors=self.meter.errors(schedule))
                )
        return out

    def _worst(self, chosen: _Candidate) -> tuple[WorstImage, ...]:
        order = np.argsort(-chosen.errors.errors, kind="stable")[:WORST]
        maps = self.meter.sources(chosen.schedule, order)[:, chosen.schedule.n_prefix :]
        return tuple(
            WorstImage(str(self.paths[i]), float(chosen.errors.errors[i]), tuple(int(t) for t in m))
            for i, m in zip(order, maps)
        )

    def _row(self, c: _Candidate, timed: FileTime | None = None) -> TuneRow:
        """A row of the table."""
        predicted, dense = self.latency.predict(c.schedule), self.latency.predict(self.dense)
        cost, e = self._macs(c.schedule), c.errors
        row = TuneRow(
            name=c.variant.name,
            method=c.variant.method,
            options={k: v for k, v in c.variant.options(c.strength).items() if v is not None},
            strength=float(c.strength),
            tokens=tuple(m for _, m in c.schedule.tokens_per_block()),
            macs=cost,
            macs_ratio=macs.count(self.plain.dims, self.dense) / cost,
            predicted_ms=predicted,
            predicted_speedup=dense / predicted,
            reaches=c.reaches,
        )
        if e is not None:
            row = replace(row, error=e.mean, distance=c.distance, same=e.same, accuracy=e.accuracy)
        if timed is not None:
            spread = timed.speedup
            row = replace(
                row, measured_ms=timed.ms, speedup=spread.middle, speedup_low=spread.low, speedup_high=spread.high
            )
        return row

    def _report(self, rows: list[TuneRow], dense_ms: float, worst: tuple[WorstImage, ...] = ()) -> TuneReport:
        s = self.settings
        accuracy = None if self.labels is None or self.meter is None else self.meter.errors(self.dense).accuracy
        return TuneReport(
            path=None,
            model=self.loaded.name,
            budget=self.budget,
            runtime=s.runtime,
            dtype=s.dtype,
            batch=s.batch,
            threads=s.threads,
            processor=processor().name,
            images=len(self.paths),
            seed=s.seed,
            measure="" if self.meter is None else self.meter.kind,
            dense_ms=dense_ms,
            dense_accuracy=accuracy,
            rows=tuple(rows),
            notes=tuple(self.notes),
            worst=worst,
        )


def _against(chosen: _Candidate, candidates: list[_Candidate], rows: list[TuneRow]) -> list[TuneRow]:
    """Rows of candidates with their distance from the chosen one."""
    out = []
    for c, row in zip(candidates, rows, strict=True):
        gap, error = paired_difference(c.errors, chosen.errors)
        out.append(replace(row, over_best=gap, over_best_error=error, chosen=c is chosen))
    return out


def _none() -> Variant:
    return Variant("dense", "none", lambda x: {}, 0)


def _distinct(candidates: Sequence[_Candidate]) -> list[_Candidate]:
    """Those with a schedule of their own."""
    out: list[_Candidate] = []
    for c in candidates:
        if key_of(c.schedule) not in map(key_of, (o.schedule for o in out)):
            out.append(c)
    return out


def _tuned_model(loaded: LoadedModel) -> TunedModel:
    """What decides which variants a model can have."""
    plain, keys = as_plain(loaded.module), list(loaded.heads)
    metric = any("metric_layer" in key for key in keys)
    learned = (("metric_layer",) if metric else ()) + (
        ("score_head",) if any("metric_layer" not in k for k in keys) else ()
    )
    prefix_alone = bool(plain.pooling.rows) and max(plain.pooling.rows) < plain.n_prefix
    return TunedModel(plain.size, plain.width, plain.has_class_token, prefix_alone, learned)
