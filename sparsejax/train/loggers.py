"""Where metrics go besides the files of the workdir: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import HistogramProto, Summary

from sparsejax.errors import InputError
from sparsejax.overrides import flatten
from sparsejax.train.histograms import EDGES, Histogram
from sparsejax.workdir import Workdir, read_json, write_json

LOG_TO = "train.log_to"
EXPERIMENT = "sparsejax"  # project of Weights & Biases and experiment of MLflow, unless their variables name another
PARAMETERS = 100  # parameters that MLflow takes at once


@runtime_checkable
class Logger(Protocol):
    """A destination of metrics."""

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Writes the finite metrics of a step."""
        ...

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        """Writes the histograms of a step, if the destination can hold them."""
        ...

    def close(self) -> None:
        """Writes what is still in memory."""
        ...


class TensorBoard:
    """Event files in the workdir."""

    def __init__(self, workdir: Workdir, settings: Mapping[str, Any], step: int):
        workdir.events.mkdir(exist_ok=True)
        # A SummaryWriter would keep events back for minutes in a thread, and hang the run when that thread fails.
        self._events = EventsWriter(str(workdir.events / "events"))
        if step:  # TensorBoard then ignores the events of earlier files after this step
            self._write_event(step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write_event(step, summary=Summary(value=scalars))

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        values = []
        for name, histogram in histograms.items():
            content = HistogramProto(
                min=histogram.min,
                max=histogram.max,
                num=histogram.count,
                sum=histogram.sum,
                sum_squares=histogram.squares,
                bucket_limit=[*EDGES.tolist(), np.finfo(np.float64).max],
                bucket=histogram.counts,
            )
            values.append(Summary.Value(tag=name, histo=content))
        self._write_event(step, summary=Summary(value=values))

    def close(self) -> None:
        self._events.close()

    def _write_event(self, step: int, **content: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, **content))
        self._events.flush()


class WeightsAndBiases:
    """A run of Weights & Biases, whose files are in the workdir; WANDB_MODE=offline needs no network."""

    def __init__(self, workdir: Workdir, settings: Mapping[str, Any], step: int):
        import wandb

        self._wandb, record = wandb, _read_record(workdir)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", EXPERIMENT),
                name=workdir.path.name,
                id=record.get("wandb"),
                resume="allow",
                dir=str(workdir.path),
                config=dict(settings),
            )
        except Exception as error:  # the package has no common base class
            raise _unavailable("wandb", error) from error
        _write_record(workdir, wandb=self._run.id)

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        self._run.log(dict(metrics), step=step)

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        values = {}
        for name, histogram in histograms.items():
            low, high = min(histogram.min, EDGES[0] * 2), max(histogram.max, EDGES[-1] * 2)
            edges = np.concatenate([[low], EDGES, [high]])
            values[name] = self._wandb.Histogram(np_histogram=(histogram.counts, edges))
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class Mlflow:
    """A run of MLflow, in MLFLOW_TRACKING_URI or by default in a database in the workdir. It has no histograms."""

    def __init__(self, workdir: Workdir, settings: Mapping[str, Any], step: int):
        from mlflow import MlflowClient, entities

        self._entities, record = entities, _read_record(workdir)
        local = f"sqlite:///{workdir.path.absolute() / 'mlflow.db'}"
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
        try:
            self._client = MlflowClient(tracking_uri=os.environ.get("MLFLOW_TRACKING_URI", local))
            self._id = record.get("mlflow") or self._create(experiment, workdir, settings)
            self._client.update_run(self._id, status="RUNNING")
        except Exception as error:  # of the package, its database or the network
            raise _unavailable("mlflow", error) from error
        _write_record(workdir, mlflow=self._id)

    def _create(self, experiment: str, workdir: Workdir, settings: Mapping[str, Any]) -> str:
        existing = self._client.get_experiment_by_name(experiment)
        number = existing.experiment_id if existing else self._client.create_experiment(experiment)
        run = self._client.create_run(number, run_name=workdir.path.name).info.run_id
        parameters = [self._entities.Param(key, str(value)[:6000]) for key, value in flatten(dict(settings)).items()]
        for start in range(0, len(parameters), PARAMETERS):
            self._client.log_batch(run, params=parameters[start : start + PARAMETERS])
        return run

    def write(self, step: int, metrics: Mapping[str, float | int]) -> None:
        now = int(time.time() * 1000)
        values = [self._entities.Metric(name, value, now, step) for name, value in metrics.items()]
        self._client.log_batch(self._id, metrics=values)

    def write_histograms(self, step: int, histograms: Mapping[str, Histogram]) -> None:
        pass

    def close(self) -> None:
        self._client.set_terminated(self._id)


# Logger and its package by the name in `train.log_to`; extras have the same names.
LOGGERS: dict[str, tuple[Callable[[Workdir, Mapping[str, Any], int], Logger], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WeightsAndBiases, "wandb"),
    "mlflow": (Mlflow, "mlflow"),
}


def require_packages(names: tuple[str, ...]) -> None:
    """Raises InputError about the first logger whose package is not installed."""
    for name in names:
        package = LOGGERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise InputError(LOG_TO, f"{name} is not installed; pip install 'sparsejax[{name}]'")


def open_loggers(names: tuple[str, ...], workdir: Workdir, settings: Mapping[str, Any], step: int) -> list[Logger]:
    """Opens the loggers of a run that starts after `step`; a resumed run continues the same runs of the services.

    Raises:
      InputError: A package is not installed, or a service cannot be reached.
    """
    require_packages(names)
    return [LOGGERS[name][0](workdir, settings, step) for name in names]


def _read_record(workdir: Workdir) -> dict[str, str]:
    return read_json(workdir.loggers, {...: str}) if workdir.loggers.exists() else {}


def _write_record(workdir: Workdir, **ids: str) -> None:
    write_json(workdir.loggers, _read_record(workdir) | ids)


def _unavailable(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return InputError(LOG_TO, f"{name} cannot start a run: {reason}")
