"""Runs as one tidy table, read from workdirs and recorded tables, and written to files.

`results` has a row per run, `curves` a row per value of a metric at a step, and `configs.json` the resolved
configurations. A folder with these files replaces the workdirs for every report.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax import extensions
from sparsejax.account import AccountCache
from sparsejax.buckets import read_workdir
from sparsejax.config import ConfigError, ModelConfig
from sparsejax.errors import InputError
from sparsejax.metrics import EVAL, EVAL_LOSS, STEPS_PER_SECOND, TOKENS_PER_SECOND, TRAIN_LOSS, TRAIN_LOSS_MEAN
from sparsejax.overrides import SEED, describe_overrides, flatten, write_value
from sparsejax.records import parse_json
from sparsejax.runs import Phase, plan_phases
from sparsejax.workdir import ROW, SweepFolder, Workdir, read_json, read_rows, replace_file, write_json

if TYPE_CHECKING:
    import pandas as pd

TABLE, CURVES, CONFIGS = "results", "curves", "configs.json"
SUFFIXES = (".parquet", ".csv")

STATUSES = FINISHED, DIVERGED, UNFINISHED, NOT_STARTED = "finished", "diverged", "unfinished", "not started"
# Values of the column `check`, which is empty for runs that have not started or are older than the check.
PASSED, FAILED, NOT_CHECKED, LEAKS = "passed", "failed", "not checked", "reads the future"
CHECK, ALLOW_LEAKS = "check", "model.allow_leaks"
INTEGERS = ("seed", "step", "parameters", "cache_bytes")
# The columns of a row, between which stand a column per key that differs and a column per metric.
FIRST = ("label", "seed", "status", "step")
COSTS = ("parameters", "training_flops_per_token", "training_flops", "cache_bytes", "seconds", "tokens_per_second")
ORIGIN = (CHECK, "device", "python", "jax", "git", "config", "overrides", "digest", "corpus", "name", "run")
TEXTS = ("label", "status", *ORIGIN)
CURVE = ("run", "step", "metric", "value")
TRAINING = (TRAIN_LOSS, TRAIN_LOSS_MEAN)
CERTIFICATES = [{"passed": bool}]  # schema of certificate.json
TIMING = {"step": int, STEPS_PER_SECOND: float, TOKENS_PER_SECOND: float}  # schema of a row of timing.jsonl

MAX_LABEL_KEYS = 3  # of the label of a run outside of sweeps; if more keys differ, the name of its workdir is clearer


class ReportError(InputError):
    """Invalid input of a report."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Runs with their metrics and configurations.

    Attributes:
      runs: A row per run; the constants of the module list the columns.
      curves: Training loss and metrics of evaluations, with the columns `run`, `step`, `metric` and `value`.
      settings: The resolved configuration of each started run, values by dotted key, by `run`.
      notes: Sentences about the origin of the table.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    settings: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """Keys of the configuration at which the runs differ."""
        return [name for name in column_names(self.runs) if is_key(name)]


def column_names(frame: pd.DataFrame) -> list[str]:
    """The columns of a table, which are all texts."""
    return [str(name) for name in frame.columns]


def is_key(column: str) -> bool:
    """Whether a column of the table is a key of the configuration."""
    return "." in column and "/" not in column


def read(inputs: Iterable[str | Path]) -> Results:
    """Reads all runs of sweeps, workdirs, folders of workdirs and recorded tables. A run counts once.

    Raises:
      ReportError: An input does not exist or holds no runs, or a file is damaged.
    """
    _require_pandas()
    return _merge([part for path in inputs for part in _read_input(read_workdir(path, "inputs"))])


def write(results: Results, folder: Path) -> None:
    """Writes `results` and `curves`, each as .parquet and .csv, and `configs.json`; replaces each file in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in ((TABLE, results.runs), (CURVES, results.curves)):
        parquet = io.BytesIO()
        frame.to_parquet(parquet, index=False)
        replace_file(folder / f"{name}.parquet", parquet.getvalue())
        replace_file(folder / f"{name}.csv", frame.to_csv(index=False).encode())
    write_json(folder / CONFIGS, _compress(results.settings))


def _require_pandas() -> None:
    try:
        import pandas  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError:
        raise ReportError("report", "needs pandas and pyarrow; pip install 'sparsejax[report]'") from None


# Inputs.


def _read_input(path: Path) -> list[Results]:
    if path.suffix in SUFFIXES and path.is_file():
        return [_read_recorded(path)]
    if not path.is_dir():
        raise ReportError(path, "no such folder, .csv file or .parquet file")
    if SweepFolder(path).exists():
        return [_read_sweep(SweepFolder(path))]
    if Workdir(path).exists():
        return [_gather([_read_run(Workdir(path))])]
    for suffix in SUFFIXES:
        if (path / f"{TABLE}{suffix}").exists():
            return [_read_recorded(path / f"{TABLE}{suffix}")]
    nested = [item for item in sorted(path.iterdir()) if SweepFolder(item).exists() or Workdir(item).exists()]
    if not nested:
        raise ReportError(path, f"holds neither a sweep, nor a workdir, nor a recorded {TABLE}.csv")
    return [part for item in nested for part in _read_input(item)]


def _read_sweep(folder: SweepFolder) -> Results:
    record = folder.read()
    runs = [_read_planned(folder, record["config"], name, planned) for name, planned in record["runs"].items()]
    others = [item for item in folder.runs.glob("*") if Workdir(item).exists() and item.name not in record["runs"]]
    note = f"{len(others)} workdirs in {folder.runs} belong to no run of the sweep and are left out"
    return _gather(runs, [note] if others else [])


def _read_planned(folder: SweepFolder, config: str, name: str, planned: Mapping[str, Any]) -> _Read:
    """A run of a sweep, which may not have started."""
    named = {"label": planned["label"], "config": config, "overrides": json.dumps(planned["overrides"])}
    workdir = folder.workdir(name)
    if not workdir.exists():
        return {"name": name, "status": NOT_STARTED, "step": 0, "seed": planned["seed"], "run": "", **named}, [], None
    row, points, settings = _read_run(workdir)
    return row | named, points, settings


def _gather(runs: Sequence[_Read], notes: Sequence[str] = ()) -> Results:
    import pandas as pd

    rows = pd.DataFrame([row for row, _, _ in runs])
    curves = pd.DataFrame([point for _, points, _ in runs for point in points], columns=list(CURVE))
    settings = {row["run"]: values for row, _, values in runs if values is not None}
    return Results(_type_table(rows), _type_curves(curves), settings, tuple(notes))


# A run: its row, the points of its curves, and its settings if it has started.
_Read = tuple[dict[str, Any], list[tuple[str, int, str, float]], dict[str, Any] | None]


def _read_run(workdir: Workdir) -> _Read:
    recorded = read_json(workdir.config)
    extensions.restore(workdir)
    try:
        digest = configs.digest(ConfigDict(recorded))
        complete = configs.complete(recorded)
        phases = plan_phases(ConfigDict(complete))
    except (ConfigError, AttributeError, TypeError) as error:
        raise ReportError(workdir.config, str(error)) from error
    metrics = read_rows(workdir.metrics)
    result = read_json(workdir.result, ROW) if workdir.result.exists() else None
    data = read_json(workdir.data, {"digest": (str, None)}) if workdir.data.exists() else {}
    corpus = data.get("digest") or ""
    step = result["step"] if result else metrics[-1]["step"] if metrics else 0
    run = hashlib.sha256(json.dumps([digest, corpus]).encode()).hexdigest()[:12]
    row = {
        "seed": phases[0].config.train.seed,
        "status": _read_status(result, metrics),
        "step": step,
        **{name: value for name, value in (result or {}).items() if "/" in name},
        **{name: row[name] for row in metrics[-1:] for name in TRAINING if name in row},
        **_count_cost(phases, step, _read_teacher(workdir.teacher)),
        **_read_time(workdir.timing),
        CHECK: _read_check(workdir.certificate),
        **_read_versions(workdir.versions),
        "digest": digest,
        "corpus": corpus,
        "name": workdir.path.resolve().name,
        "run": run,
    }
    points = [
        (run, logged["step"], name, value)
        for logged in metrics
        for name, value in logged.items()
        if name in TRAINING or name.startswith(EVAL)
    ]
    return row, points, flatten(complete)


def _read_status(result: Mapping[str, Any] | None, metrics: Sequence[Mapping[str, Any]]) -> str:
    """Whether a run has ended, or its loss has diverged: null in its evaluation or, without a result, in training."""
    last = result or (metrics[-1] if metrics else {})
    if any(name in last and last[name] is None for name in (EVAL_LOSS, TRAIN_LOSS)):
        return DIVERGED
    return UNFINISHED if result is None else FINISHED


def _read_check(path: Path) -> str:
    """The verdict about the models of a run."""
    if not path.exists():
        return NOT_CHECKED
    return PASSED if all(certificate["passed"] for certificate in read_json(path, CERTIFICATES)) else FAILED


@functools.cache
def _accounts() -> AccountCache:
    """One cache for all runs, so that a model is counted once for all seeds."""
    return AccountCache()


def _read_teacher(path: Path) -> ModelConfig | None:
    """The model of the teacher of a run."""
    if not path.exists():
        return None
    section = read_json(path, {"model": dict})["model"]
    return configs.build(ModelConfig, configs.complete(section, ModelConfig))


def _count_cost(phases: Sequence[Phase], step: int, teacher: ModelConfig | None) -> dict[str, Any]:
    """The cost of the model in the last phase, and of training up to a step with the teacher."""
    accounts = _accounts()
    model = accounts(phases[-1].config)
    return {
        "parameters": model.parameters,
        "training_flops_per_token": model.training_flops,
        "training_flops": sum(accounts.training_flops(phase.config, phase.elapsed(step), teacher) for phase in phases),
        "cache_bytes": model.cache_bytes if phases[-1].config.model.causal else None,  # an encoder does not decode
    }


def _read_time(path: Path) -> dict[str, float]:
    """Seconds of training at the logged speeds, without compilation, evaluation and pauses."""
    seconds, tokens, before = 0.0, 0.0, 0
    for row in read_rows(path, TIMING):
        if not row[STEPS_PER_SECOND] > 0:
            raise ReportError(path, f"damaged: {STEPS_PER_SECOND} is {row[STEPS_PER_SECOND]} at step {row['step']}")
        elapsed = (row["step"] - before) / row[STEPS_PER_SECOND]
        seconds, tokens, before = seconds + elapsed, tokens + elapsed * row[TOKENS_PER_SECOND], row["step"]
    return {"seconds": seconds, TOKENS_PER_SECOND: tokens / seconds} if seconds else {}


def _read_versions(path: Path) -> dict[str, str]:
    """Software and devices of a run; all of them, if it was resumed elsewhere."""
    names = {"device": "devices", "python": "python", "jax": "jax", "git": "git"}
    entries = read_json(path, [dict.fromkeys(names.values(), str)]) if path.exists() else []
    return {name: "; ".join(dict.fromkeys(entry[key] for entry in entries)) for name, key in names.items()}


# Recorded tables.


def _read_recorded(path: Path) -> Results:
    """The files of `write`. Keys and labels are derived again, because they depend on the other runs."""
    runs = _read_frame(path, (*FIRST, *COSTS, *ORIGIN), _type_table)
    _check_runs(runs, path)
    file = path.with_name(CONFIGS)
    try:
        recorded = read_json(file, {"common": dict, "runs": {...: dict}})
    except FileNotFoundError as error:
        raise ReportError(file, str(error.strerror)) from error
    settings = {run: recorded["common"] | specific for run, specific in recorded["runs"].items()}
    lost = [run for run in runs["run"] if run and run not in settings]
    if lost:
        raise ReportError(file, f"lacks the run {lost[0]!r} of {path}")
    runs = runs.drop(columns=[name for name in column_names(runs) if is_key(name)])
    for suffix in (path.suffix, *SUFFIXES):
        curves = path.with_name(f"{CURVES}{suffix}")
        if curves.exists():
            return Results(runs, _read_frame(curves, CURVE, _type_curves), settings)
    return Results(runs, _no_curves(), settings, (f"{path} is recorded without its curves",))


def _check_runs(runs: pd.DataFrame, path: Path) -> None:
    """Raises InputError about the first row whose status, seed or overrides are damaged."""
    import pandas as pd

    for number, row in enumerate(runs.itertuples(index=False), 1):
        source = f"{path}: row {number}"
        if row.status not in STATUSES or (row.status == NOT_STARTED) == bool(row.run):
            raise ReportError(source, f"damaged: the status of the run {row.run!r} is {row.status!r}")
        if row.seed is pd.NA:
            raise ReportError(source, "damaged: the seed is missing")
        if row.overrides:
            parse_json(str(row.overrides), f"{source}: overrides", dict)


def _read_frame(path: Path, columns: Sequence[str], convert: Callable[[pd.DataFrame], pd.DataFrame]) -> pd.DataFrame:
    """A table as it was written: floats to the last bit, and texts as texts, even if they look like numbers."""
    import pandas as pd
    import pyarrow as pa

    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
            for name in column_names(frame):
                if name in (*INTEGERS, "value") or name in COSTS or "/" in name:
                    read_number = int if name in INTEGERS else float
                    frame[name] = [read_number(text) if text else None for text in frame[name]]
        missing = [name for name in columns if name not in frame and name != CHECK]
        if missing:
            raise ReportError(path, f"not a table of a report: the column {missing[0]!r} is missing")
        return convert(frame)
    except ReportError:
        raise
    except (ValueError, TypeError, ArithmeticError, LookupError, OSError, pa.ArrowException) as error:
        raise ReportError(path, f"damaged: {' '.join(str(error).split())[:200]}") from error


def _compress(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Values that all runs have in common, and those that are specific to each."""
    first = next(iter(settings.values()), {})
    common = {k: v for k, v in first.items() if all(k in values and values[k] == v for values in settings.values())}
    specific = {run: {k: v for k, v in values.items() if k not in common} for run, values in settings.items()}
    return {"common": common, "runs": specific}


def _no_curves() -> pd.DataFrame:
    import pandas as pd

    return _type_curves(pd.DataFrame(columns=list(CURVE)))


def _type_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns in order and with their types; missing text is empty."""
    metrics = [name for name in column_names(runs) if "/" in name]
    keys = [name for name in column_names(runs) if is_key(name)]
    runs = runs.reindex(columns=[*FIRST, *keys, *metrics, *COSTS, *ORIGIN])
    texts = {name: runs[name].astype(object).where(runs[name].notna(), "").astype(str) for name in TEXTS}
    numbers = dict.fromkeys((*metrics, *COSTS), "float64")
    runs = runs.assign(**texts).astype(numbers | dict.fromkeys(INTEGERS, "Int64"))
    return runs.assign(**{name: _drop_infinite(runs[name]) for name in metrics})


def _type_curves(curves: pd.DataFrame) -> pd.DataFrame:
    curves = curves[list(CURVE)].astype({"run": str, "step": "Int64", "metric": str, "value": float})
    return curves.assign(value=_drop_infinite(curves["value"])).dropna(subset="step")


def _drop_infinite(values: pd.Series) -> pd.Series:
    """A metric that is not finite has no value."""
    return values.where(values.abs() != float("inf"))


# All inputs together.


def _merge(parts: Sequence[Results]) -> Results:
    """The runs of all parts, each once."""
    import pandas as pd

    runs, curves = (
        pd.concat([frame.assign(part=number) for number, frame in enumerate(frames)], ignore_index=True)
        for frames in ([part.runs for part in parts], [part.curves for part in parts])
    )
    ranked = _rank(runs)
    kept = _deduplicate(ranked).sort_index()
    curves = curves.merge(kept.loc[kept["run"] != "", ["run", "part"]], on=["run", "part"])
    known = {run: values for part in parts for run, values in part.settings.items()}
    settings = {run: known[run] for run in kept["run"] if run}
    notes = [*(note for part in parts for note in part.notes), *_note_duplicates(ranked)]
    runs = _name(kept[runs.columns].drop(columns="part").reset_index(drop=True), settings)
    return Results(runs, _type_curves(curves), settings, tuple(notes))


def _rank(runs: pd.DataFrame) -> pd.DataFrame:
    """Sorts the runs that have reached the most steps, and those with the label of a sweep, to the front."""
    rank = runs["status"].map({status: rank for rank, status in enumerate(STATUSES)})
    ranked = runs.assign(rank=rank, unnamed=runs["overrides"] == "")
    return ranked.sort_values(["rank", "unnamed", "step"], ascending=[True, True, False], kind="stable")


def _deduplicate(runs: pd.DataFrame) -> pd.DataFrame:
    """The first of equal runs; a run that has not started is identified by its name in the sweep."""
    import pandas as pd

    started = runs[runs["run"] != ""].drop_duplicates("run")
    planned = runs[runs["run"] == ""].drop_duplicates(["config", "name"])
    elsewhere = set(zip(started["config"], started["name"], strict=True))
    missing = [pair not in elsewhere for pair in zip(planned["config"], planned["name"], strict=True)]
    return pd.concat([started, planned.loc[missing]])


def _note_duplicates(runs: pd.DataFrame) -> list[str]:
    """Notes about runs that occur in several inputs."""
    notes, duplicates = [], 0
    for run, copies in runs[runs["run"] != ""].groupby("run", sort=False):
        duplicates += len(copies) - 1
        labels = list(dict.fromkeys(label for label in copies["label"] if label))
        if len(labels) > 1:
            notes.append(f"run {run} has the labels {', '.join(map(repr, labels))}; the first one counts")
        ended = copies[copies["status"] == FINISHED]
        metrics = ended[[name for name in column_names(ended) if name.startswith(EVAL)]].dropna(
            axis="columns", how="all"
        )
        if len(metrics.drop_duplicates()) > 1:
            notes.append(f"run {run} has unequal results; the first ones count")
    if duplicates:
        notes.insert(0, f"{duplicates} duplicates of runs are left out")
    return notes


def _name(runs: pd.DataFrame, settings: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Adds a column per key that differs, and labels to the runs outside of sweeps."""
    overrides = [json.loads(text) if text else {} for text in runs["overrides"]]
    known = [settings[run] if run else planned for run, planned in zip(runs["run"], overrides, strict=True)]
    unnamed = (runs["overrides"] == "").tolist()
    keys = _differing([values for values, alone in zip(known, unnamed, strict=True) if alone])
    varied = [key for planned in overrides for key in planned if key != SEED and _varies(key, known)]
    columns = {key: _type_key([values.get(key) for values in known]) for key in dict.fromkeys([*varied, *keys])}
    check = [LEAKS if allows_leaks(values) else verdict for values, verdict in zip(known, runs[CHECK], strict=True)]
    return _type_table(runs.assign(label=_label(runs, known, unnamed, keys), check=check, **columns))


def allows_leaks(settings: Mapping[str, Any]) -> bool:
    """Whether a model of a run may read the future; `settings` are values by dotted key."""
    return any(value is True for key, value in settings.items() if f".{key}".endswith(f".{ALLOW_LEAKS}"))


def _varies(key: str, known: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the runs that have a key have several values of it; a run that has not started has few keys."""
    return len({json.dumps(values[key]) for values in known if key in values}) > 1


def _label(runs: pd.DataFrame, known: Sequence[Mapping], unnamed: Sequence[bool], keys: Sequence[str]) -> list[str]:
    """The labels of the sweep; else the keys that differ, or the name of the first run with these settings."""
    labels: list[str] = []
    first: dict[str, str] = {}
    for label, name, values, alone in zip(runs["label"], runs["name"], known, unnamed, strict=True):
        specific = {key: values.get(key) for key in keys}
        words = describe_overrides(specific) if 0 < len(specific) <= MAX_LABEL_KEYS else name
        labels.append(first.setdefault(json.dumps(specific), words) if alone else label)
    return labels


def _differing(known: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys in which settings differ, except for the seed and the number of devices."""
    missing = object()
    keys = dict.fromkeys(key for values in known for key in values)
    return [
        key
        for key in keys
        if key != SEED
        and is_key(key)
        and not key.startswith("sharding.")
        and any(values.get(key, missing) != known[0].get(key, missing) for values in known)
    ]


def _type_key(values: Sequence[Any]) -> list[Any]:
    """Numbers if all values are numbers, else texts, because a column of a file has one type."""
    if all(type(value) in (int, float) for value in values):
        return [float(value) for value in values] if any(type(value) is float for value in values) else list(values)
    return ["" if value is None else write_value(value) for value in values]
