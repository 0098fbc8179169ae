"""From workdirs and recorded tables to one tidy table, a row for each run, and back to files.

`results` has a row for each run, `curves` a row for each value of a metric at a step, `configs.json` the resolved
configurations. Together they are all that a report needs: a folder of them stands for the workdirs.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from sparsejax import config as configs
from sparsejax.config import ConfigError
from sparsejax.sweep.axes import SEED
from sparsejax.sweep.match import Count, count_training_flops, remember_accounts
from sparsejax.sweep.runs import shorten, write_overrides, write_value
from sparsejax.train import RESULT, Phase, plan_phases
from sparsejax.train.writers import replace_file, write_json

if TYPE_CHECKING:
    import pandas as pd

SWEEP = "sweep.json"  # in a sweep's folder: its config and its runs by name, each with label, seed and overrides
TABLE, CURVES, CONFIGS = "results", "curves", "configs.json"
ENDINGS = (".parquet", ".csv")

FINISHED, UNFINISHED, NOT_STARTED = "finished", "unfinished", "not started"
TEXTS = ("label", "status", "device", "python", "jax", "git", "config", "overrides", "digest", "corpus", "name", "run")
INTEGERS = ("seed", "step", "parameters", "cache_bytes")
# The columns of a row; between them stand a column for each key that differs, and one for each metric.
FIRST = ("label", "seed", "status", "step")
COSTS = ("parameters", "training_flops_per_token", "training_flops", "cache_bytes", "seconds", "tokens_per_second")
ORIGIN = ("device", "python", "jax", "git", "config", "overrides", "digest", "corpus", "name", "run")
CURVE = ("run", "step", "metric", "value")
TRAINING = ("train/loss", "train/loss_mean")

MOST_NAMED = 3  # keys that name a run that no sweep has named; where more differ its workdir's name is clearer


class ReportError(ValueError):
    """Something of which no report can be made; the message is one line and names the file or the argument."""


@dataclasses.dataclass(frozen=True)
class Results:
    """Runs, and what is known of them.

    Attributes:
      runs: A row for each run, see the module's constants for the columns.
      curves: Columns `run`, `step`, `metric` and `value`: the training loss and all metrics of evaluations.
      settings: The resolved configuration of each run that has started, by `run`: value by dotted key.
      notes: What a reader must know of how the table came about, in sentences.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    settings: dict[str, dict[str, Any]]
    notes: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        """Keys of the configuration at which the runs differ."""
        return [name for name in self.runs if is_key(name)]


def is_key(column: str) -> bool:
    """Whether a column of the table is a key of the configuration, and no metric."""
    return "." in column and "/" not in column


def read(places: Iterable[str | Path]) -> Results:
    """All runs of the places: sweeps, workdirs, folders of workdirs, recorded tables. The same run counts once.

    Raises:
      ReportError: no such place, nothing in it, or a damaged file; says which.
    """
    _require_pandas()
    return _merge([part for place in places for part in _read_place(Path(place))])


def write(results: Results, folder: Path) -> None:
    """Writes `results` and `curves`, each as .parquet and .csv, and `configs.json`; each file is replaced whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in ((TABLE, results.runs), (CURVES, results.curves)):
        parquet = io.BytesIO()
        frame.to_parquet(parquet, index=False)
        replace_file(folder / f"{name}.parquet", parquet.getvalue())
        replace_file(folder / f"{name}.csv", frame.to_csv(index=False).encode())
    write_json(folder / CONFIGS, _compress(results.settings))


def describe(values: Mapping[str, Any]) -> str:
    """Keys and values in words, each key as short as it can be told from the others."""
    return write_overrides(values, shorten(values))


def _require_pandas() -> None:
    try:
        import pandas  # noqa: F401
        import pyarrow  # noqa: F401
    except ImportError:
        raise ReportError("report: needs pandas and more: pip install 'sparsejax[report]'") from None


# Places.


def _read_place(place: Path) -> list[Results]:
    if place.suffix in ENDINGS and place.is_file():
        return [_read_recorded(place)]
    if not place.is_dir():
        raise ReportError(f"{place}: no such folder, and no recorded .csv or .parquet file")
    if (place / SWEEP).exists():
        return [_read_sweep(place)]
    if (place / "config.json").exists():
        return [_gather([_read_run(place)])]
    for ending in ENDINGS:
        if (place / f"{TABLE}{ending}").exists():
            return [_read_recorded(place / f"{TABLE}{ending}")]
    inside = [one for one in sorted(place.iterdir()) if any((one / name).exists() for name in (SWEEP, "config.json"))]
    if not inside:
        raise ReportError(f"{place}: holds no {SWEEP}, no workdir and no recorded {TABLE}.csv")
    return [part for one in inside for part in _read_place(one)]


def _read_sweep(folder: Path) -> Results:
    place, sweep = folder / SWEEP, _read_json(folder / SWEEP)
    try:
        runs = [_read_planned(folder, sweep["config"], name, planned) for name, planned in sweep["runs"].items()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{place}: is damaged: {type(error).__name__}: {error}") from error
    others = [one for one in (folder / "runs").glob("*/config.json") if one.parent.name not in sweep["runs"]]
    note = f"{len(others)} workdirs in {folder / 'runs'} belong to no run of {SWEEP} and are left out"
    return _gather(runs, [note] if others else [])


def _read_planned(folder: Path, config: str, name: str, planned: Mapping[str, Any]) -> tuple:
    """A run of a sweep, which may not have started."""
    named = {"label": planned["label"], "config": config, "overrides": json.dumps(dict(planned["overrides"]))}
    workdir = folder / "runs" / name
    if not (workdir / "config.json").exists():
        return {"name": name, "status": NOT_STARTED, "step": 0, "seed": planned["seed"], "run": "", **named}, [], None
    row, points, settings = _read_run(workdir)
    return row | named, points, settings


def _gather(runs: Sequence[tuple[dict, list[tuple], dict | None]], notes: Sequence[str] = ()) -> Results:
    import pandas as pd

    rows = pd.DataFrame([row for row, _, _ in runs])
    curves = pd.DataFrame([point for _, points, _ in runs for point in points], columns=list(CURVE))
    settings = {row["run"]: values for row, _, values in runs if values is not None}
    return Results(_type_table(rows), _type_curves(curves), settings, tuple(notes))


# One run.


def _read_run(workdir: Path) -> tuple[dict[str, Any], list[tuple], dict[str, Any]]:
    """A run's row, the points of its curves, and its settings."""
    recorded = _read_json(workdir / "config.json")
    try:
        digest = configs.digest(ConfigDict(recorded))
        complete = configs.complete(recorded)
        phases = plan_phases(ConfigDict(complete))
    except (ConfigError, AttributeError, TypeError) as error:
        raise ReportError(f"{workdir / 'config.json'}: {error}") from error
    metrics = _read_log(workdir / "metrics.jsonl")
    result = _read_json(workdir / RESULT) if (workdir / RESULT).exists() else None
    corpus = _read_json(workdir / "data.json").get("digest", "") if (workdir / "data.json").exists() else ""
    step = metrics[-1]["step"] if result is None and metrics else (result or {}).get("step", 0)
    row = {
        "seed": phases[0].config.train.seed,
        "status": UNFINISHED if result is None else FINISHED,
        "step": step,
        **{name: value for name, value in (result or {}).items() if "/" in name},
        **{name: row[name] for row in metrics[-1:] for name in TRAINING if name in row},
        **_count_cost(phases, step),
        **_read_time(workdir / "timing.jsonl"),
        **_read_versions(workdir / "versions.json"),
        "digest": digest,
        "corpus": corpus,
        "name": workdir.resolve().name,
        "run": hashlib.sha256(json.dumps([digest, corpus]).encode()).hexdigest()[:12],
    }
    points = [
        (row["run"], one["step"], name, value)
        for one in metrics
        for name, value in one.items()
        if name in TRAINING or name.startswith("eval/")
    ]
    return row, points, _flatten(complete)


@functools.cache
def _counter() -> Count:
    """One memory for all: the account of a model is worked out once for all seeds."""
    return remember_accounts()


def _count_cost(phases: Sequence[Phase], step: int) -> dict[str, Any]:
    """What the model costs as the last phase has it, and the training up to a step, phase by phase."""
    last = _counter()(phases[-1].config)
    return {
        "parameters": last.parameters,
        "training_flops_per_token": last.training_flops,
        "training_flops": count_training_flops(phases, _counter(), step),
        "cache_bytes": last.cache_bytes if phases[-1].config.model.causal else None,  # an encoder decodes nothing
    }


def _read_time(path: Path) -> dict[str, float]:
    """Seconds of training at the speeds that were logged: compiling, evaluation and pauses are no part of it."""
    seconds, tokens, before = 0.0, 0.0, 0
    for row in _read_log(path):
        took = (row["step"] - before) / row["steps_per_second"]
        seconds, tokens, before = seconds + took, tokens + took * row["tokens_per_second"], row["step"]
    return {"seconds": seconds, "tokens_per_second": tokens / seconds} if seconds else {}


def _read_versions(path: Path) -> dict[str, str]:
    """Where a run ran; all that it ran on, if it was resumed elsewhere."""
    entries = _read_json(path) if path.exists() else []
    names = {"device": "devices", "python": "python", "jax": "jax", "git": "git"}
    return {name: "; ".join(dict.fromkeys(entry[key] for entry in entries)) for name, key in names.items()}


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a jsonl file; the last line may be cut short, by a crash or by a run that is writing it just now."""
    rows = []
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):
                break
            row = None
        if not isinstance(row, dict) or "step" not in row:
            raise ReportError(f"{path}: line {number} of {len(lines)} is damaged")
        rows.append(row)
    return rows


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ReportError(f"{path}: is damaged: {error}") from error


def _flatten(section: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A configuration as value by dotted key."""
    flat = {}
    for key, value in section.items():
        where = f"{path}.{key}" if path else key
        flat |= _flatten(value, where) if isinstance(value, dict) and value else {where: value}
    return flat


# Recorded tables.


def _read_recorded(path: Path) -> Results:
    """What `write` wrote. Keys and labels are worked out anew: they depend on which runs stand side by side."""
    runs = _read_frame(path, (*FIRST, *COSTS, *ORIGIN))
    recorded = _read_json(path.with_name(CONFIGS))
    try:
        settings = {run: recorded["common"] | own for run, own in recorded["runs"].items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"{path.with_name(CONFIGS)}: is damaged: {type(error).__name__}: {error}") from error
    lost = [run for run in runs["run"] if run and run not in settings]
    if lost:
        raise ReportError(f"{path.with_name(CONFIGS)}: has no run {lost[0]!r}, of which {path} has a row")
    runs = runs.drop(columns=[name for name in runs if is_key(name)])
    for ending in (path.suffix, *ENDINGS):
        place = path.with_name(f"{CURVES}{ending}")
        if place.exists():
            return Results(_type_table(runs), _type_curves(_read_frame(place, CURVE)), settings)
    return Results(_type_table(runs), _no_curves(), settings, (f"{path} was recorded without its curves",))


def _read_frame(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A table as it was written: floats to the last bit, texts that look like numbers or like nothing as texts."""
    import pandas as pd

    try:
        if path.suffix == ".parquet":
            frame = pd.read_parquet(path)
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
            for name in frame:
                if name in (*INTEGERS, "value") or name in COSTS or "/" in name:
                    read_number = int if name in INTEGERS else float
                    frame[name] = [read_number(text) if text else None for text in frame[name]]
    except (ValueError, OSError) as error:
        raise ReportError(f"{path}: is damaged: {error}") from error
    missing = [name for name in columns if name not in frame]
    if missing:
        raise ReportError(f"{path}: is no table of a report: it has no column {missing[0]!r}")
    return frame


def _compress(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What all runs have in common, and what each has of its own."""
    first = next(iter(settings.values()), {})
    common = {k: v for k, v in first.items() if all(k in one and one[k] == v for one in settings.values())}
    own = {run: {k: v for k, v in one.items() if k not in common} for run, one in settings.items()}
    return {"common": common, "runs": own}


def _no_curves() -> pd.DataFrame:
    import pandas as pd

    return _type_curves(pd.DataFrame(columns=list(CURVE)))


def _type_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The columns in their order and of their types, whatever is known of the runs; missing text is empty."""
    metrics = [name for name in runs if "/" in name]
    keys = [name for name in runs if is_key(name)]
    runs = runs.reindex(columns=[*FIRST, *keys, *metrics, *COSTS, *ORIGIN])
    texts = {name: runs[name].astype(object).where(runs[name].notna(), "").astype(str) for name in TEXTS}
    whole = dict.fromkeys(INTEGERS, "Int64")
    numbers = {name: float for name in (*metrics, *COSTS) if name not in INTEGERS}
    return runs.assign(**texts).astype(whole | numbers)


def _type_curves(curves: pd.DataFrame) -> pd.DataFrame:
    return curves[list(CURVE)].astype({"run": str, "step": "Int64", "metric": str, "value": float})


# All of them together.


def _merge(parts: Sequence[Results]) -> Results:
    """The runs of all parts, each once."""
    import pandas as pd

    runs, curves = (
        pd.concat([frame.assign(part=number) for number, frame in enumerate(frames)], ignore_index=True)
        for frames in ([part.runs for part in parts], [part.curves for part in parts])
    )
    found = _rank(runs)
    kept = _count_once(found).sort_index()
    curves = curves.merge(kept.loc[kept["run"] != "", ["run", "part"]], on=["run", "part"])
    known = {run: values for part in parts for run, values in part.settings.items()}
    settings = {run: known[run] for run in kept["run"] if run}
    notes = [*(note for part in parts for note in part.notes), *_note_doubles(found)]
    runs = _name(kept[runs.columns].drop(columns="part").reset_index(drop=True), settings)
    return Results(runs, _type_curves(curves), settings, tuple(notes))


def _rank(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that have come furthest first, and of those that a sweep has named."""
    rank = runs["status"].map({FINISHED: 0, UNFINISHED: 1, NOT_STARTED: 2})
    ranked = runs.assign(rank=rank, unnamed=runs["overrides"] == "")
    return ranked.sort_values(["rank", "unnamed", "step"], ascending=[True, True, False], kind="stable")


def _count_once(runs: pd.DataFrame) -> pd.DataFrame:
    """The first of equal runs; a run that has not started is known by its place in the sweep alone."""
    import pandas as pd

    started = runs[runs["run"] != ""].drop_duplicates("run")
    planned = runs[runs["run"] == ""].drop_duplicates(["config", "name"])
    elsewhere = set(zip(started["config"], started["name"], strict=True))
    missing = [one not in elsewhere for one in zip(planned["config"], planned["name"], strict=True)]
    return pd.concat([started, planned.loc[missing]])


def _note_doubles(runs: pd.DataFrame) -> list[str]:
    """What is said of runs that were found in several places."""
    notes, doubles = [], 0
    for run, found in runs[runs["run"] != ""].groupby("run", sort=False):
        doubles += len(found) - 1
        labels = list(dict.fromkeys(label for label in found["label"] if label))
        if len(labels) > 1:
            notes.append(f"run {run} was found as {' and as '.join(map(repr, labels))}: it counts once, as the first")
        ended = found[found["status"] == FINISHED]
        metrics = ended[[name for name in ended if name.startswith("eval/")]].dropna(axis="columns", how="all")
        if len(metrics.drop_duplicates()) > 1:
            notes.append(f"run {run} was found with unequal results: the first ones count")
    if doubles:
        notes.insert(0, f"{doubles} runs were found in more than one place: each counts once")
    return notes


def _name(runs: pd.DataFrame, settings: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """Adds a column for each key that differs, and a label to the runs that no sweep has named."""
    overrides = [json.loads(text) if text else {} for text in runs["overrides"]]
    known = [settings[run] if run else own for run, own in zip(runs["run"], overrides, strict=True)]
    unnamed = (runs["overrides"] == "").tolist()
    alone = _differing([values for values, none in zip(known, unnamed, strict=True) if none])
    varied = [key for own in overrides for key in own if key != SEED and _varies(key, known)]
    columns = {key: _type_key([values.get(key) for values in known]) for key in dict.fromkeys([*varied, *alone])}
    return _type_table(runs.assign(label=_label(runs, known, unnamed, alone), **columns))


def _varies(key: str, known: Sequence[Mapping[str, Any]]) -> bool:
    """Whether those runs that know a key have several values of it; of one that has not started little is known."""
    return len({json.dumps(values[key]) for values in known if key in values}) > 1


def _label(runs: pd.DataFrame, known: Sequence[Mapping], unnamed: Sequence[bool], keys: Sequence[str]) -> list[str]:
    """The sweep's labels; else the keys that differ, or the name of the first run with these settings."""
    labels, first = [], {}
    for label, name, values, none in zip(runs["label"], runs["name"], known, unnamed, strict=True):
        own = {key: values.get(key) for key in keys}
        words = describe(own) if 0 < len(own) <= MOST_NAMED else name
        labels.append(first.setdefault(json.dumps(own), words) if none else label)
    return labels


def _differing(known: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys at which settings differ; seeds are no such key, and neither is on how many devices a run runs."""
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
    """Numbers if all are numbers, else texts: a column of a file has one type."""
    if all(type(value) in (int, float) for value in values):
        return [float(value) for value in values] if any(type(value) is float for value in values) else list(values)
    return ["" if value is None else write_value(value) for value in values]
