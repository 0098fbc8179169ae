"""Loggers continue their runs; histograms and traces leave the training as it is."""

import itertools
import re
import sys
import types

import jax
import numpy as np
import pytest

from sparsejax.config import ConfigError, check
from sparsejax.data import load_dataset
from sparsejax.errors import InputError
from sparsejax.inference.evaluation import shard_batch
from sparsejax.runs import list_steps, plan_phases, read_arrays
from sparsejax.runs.state import state_shapes
from sparsejax.sharding import single_device_mesh
from sparsejax.signals import Interrupted
from sparsejax.train import loggers
from sparsejax.train.histograms import EDGES, Histogram, fetch, measure
from sparsejax.train.runtime import PhaseRuntime
from sparsejax.train.writers import Writers
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.messages import rejects
from tests.train import runs
from tests.train.test_writers import read_events

SHORT = {"train.steps": 8, "eval.every": 4, "checkpoint.every": 4}


class Service:
    """A fake of the packages `wandb` and `mlflow` that records what is logged, by run."""

    def __init__(self):
        self.runs, self.opened, self.finished = {}, [], []

    def init(self, *, resume, **settings):
        assert resume == "allow"
        name = settings.pop("id") or f"run{len(self.runs)}"
        self.runs.setdefault(name, [])
        self.opened.append((name, settings))

        def log(values, step):
            assert step >= self.latest  # W&B drops what comes later
            self.latest = step
            self.runs[name].append((step, values))

        self.latest = 0
        return types.SimpleNamespace(id=name, log=log, finish=lambda: self.finished.append(name))

    def build_histogram(self, np_histogram):
        counts, edges = np_histogram
        assert len(edges) == len(counts) + 1
        assert (np.diff(edges) > 0).all()
        return sum(counts)


class Client:
    """A fake of `mlflow.MlflowClient`."""

    def __init__(self, service, tracking_uri):
        self._service, self.uri = service, tracking_uri

    def get_experiment_by_name(self, name):
        return None

    def create_experiment(self, name):
        return name

    def create_run(self, experiment, run_name):
        run = self._service.init(id=None, resume="allow", experiment=experiment, name=run_name, uri=self.uri)
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=run.id))

    def update_run(self, run, status):
        assert run in self._service.runs
        assert status == "RUNNING"

    def log_batch(self, run, metrics=(), params=()):
        assert len(params) <= 100
        self._service.runs[run] += [(metric.step, {metric.key: metric.value}) for metric in metrics]

    def set_terminated(self, run):
        self._service.finished.append(run)


@pytest.fixture
def services(monkeypatch):
    """Fakes of both packages."""
    wandb, mlflow = Service(), Service()
    for name in ("wandb", "mlflow"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["wandb"].init, sys.modules["wandb"].Histogram = wandb.init, wandb.build_histogram
    entities = types.SimpleNamespace(
        Metric=lambda key, value, timestamp, step: types.SimpleNamespace(key=key, value=value, step=step),
        Param=lambda key, value: (key, value),
    )
    sys.modules["mlflow"].entities = entities
    sys.modules["mlflow"].MlflowClient = lambda tracking_uri: Client(mlflow, tracking_uri)
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return wandb, mlflow


def logged(service, name, metric):
    return [(step, values[metric]) for step, values in service.runs[name] if metric in values]


@pytest.mark.quick
def test_a_resumed_run_continues_the_runs_of_the_services(services, tmp_path):
    wandb, mlflow = services
    workdir, names = Workdir(tmp_path), ("wandb", "mlflow")
    settings = {"train": {"steps": 4}}
    with Writers(workdir, 0, log_to=names, settings=settings) as writers:
        for step in (1, 2, 3):
            writers.write(step, {"train/loss": float(step), "train/bad": float("nan")})
    assert read_json(workdir.loggers) == {"wandb": "run0", "mlflow": "run0"}
    with Writers(workdir, 1, log_to=names, settings=settings) as writers:  # killed after step 3, saved at step 1
        for step in (2, 3, 4):
            writers.write(step, {"train/loss": float(step)})
    assert not workdir.events.exists()
    for service in services:
        steps = [step for step, _ in logged(service, "run0", "train/loss")]
        assert steps == [1, 2, 3, 3, 4]  # the last row is written again, because a kill may have come before it
        assert list(service.runs) == service.finished[:1] == ["run0"]
        assert len(service.finished) == 2
    assert logged(wandb, "run0", "train/bad") == []
    (_, first), (name, second) = wandb.opened
    assert name == "run0"
    assert first["config"] == second["config"] == settings
    assert (first["project"], first["dir"], first["name"]) == ("sparsejax", str(tmp_path), tmp_path.name)
    assert mlflow.opened[0][1]["uri"] == f"sqlite:///{tmp_path}/mlflow.db"


@pytest.mark.quick
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_package_is_named(name, monkeypatch, tmp_path):
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda package: None)
    with rejects(InputError, "train.log_to"):
        runs.train_here(runs.load(tmp_path, {"train.log_to": f"tensorboard, {name}"}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
def test_a_service_that_cannot_be_reached_is_named(services, monkeypatch, tmp_path):
    def fail(**settings):
        raise RuntimeError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with rejects(InputError, "train.log_to"):
        Writers(Workdir(tmp_path), 0, log_to=("wandb",))


@pytest.mark.quick
@pytest.mark.parametrize(
    ("key", "value"),
    [("log_to", "tensorbord"), ("profile", "10"), ("profile", "3:2"), ("profile", "0:2"), ("histograms", -1)],
)
def test_settings_are_checked(key, value):
    with rejects(ConfigError, f"train.{key}"):
        check(runs.load("", {f"train.{key}": value}))


@pytest.mark.quick
def test_a_histogram_counts_every_value():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=1000), rng.normal(size=100) * 1e-20, [0.0, 1e30, -1e30, 3.0, -3.0]])
    x = x.astype(np.float32)
    [histogram] = fetch(
        {"x": jax.jit(measure)(np.concatenate([x, [np.nan, np.inf, -np.inf]]).astype(np.float32))}
    ).values()
    edges = np.concatenate([[-np.inf], EDGES, [np.inf]]).astype(np.float32)
    assert histogram.counts == [int(((x >= low) & (x < high)).sum()) for low, high in itertools.pairwise(edges)]
    assert histogram.count == len(x)
    assert (histogram.min, histogram.max) == (x.min(), x.max())
    assert histogram.nonfinite == 3
    assert histogram.sum == pytest.approx(float(x.sum()), abs=1e24)


@pytest.mark.quick
def test_values_that_json_lacks_are_null(tmp_path):
    [infinite] = fetch({"x": jax.jit(measure)(np.array([np.nan, np.inf, -np.inf], np.float32))}).values()
    with Writers(Workdir(tmp_path), 0) as writers:
        writers.write_histograms(1, {"x": infinite})
    [row] = read_rows(Workdir(tmp_path).histograms, {"step": int})
    assert row["histograms"]["x"] == {
        "counts": [0] * (len(EDGES) + 1),
        "min": None,
        "max": None,
        "sum": 0,
        "squares": 0,
        "nonfinite": 3,
    }
    assert "Infinity" not in Workdir(tmp_path).histograms.read_text()


GROUPS = {"mixer", "mlp", "mixer_residual", "mlp_residual"}


@pytest.fixture(scope="module")
def plain(text, tmp_path_factory):
    """A run without histograms and traces."""
    workdir = Workdir(tmp_path_factory.mktemp("plain") / "run")
    runs.train_here(runs.load(text, SHORT), workdir.path)
    return workdir


def test_histograms_and_traces_change_no_bit(plain, text, tmp_path, monkeypatch):
    settings = runs.load(text, SHORT | {"train.histograms": 3, "train.profile": "2:3"})
    workdir = Workdir(tmp_path)
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 4)
        with pytest.raises(Interrupted):
            runs.train_here(settings, tmp_path)
    runs.train_here(settings, tmp_path)
    step = list_steps(plain.checkpoints)[-1]
    runs.assert_same_bits(read_arrays(workdir.checkpoints, step), read_arrays(plain.checkpoints, step))
    assert workdir.metrics.read_bytes() == plain.metrics.read_bytes()

    rows = read_rows(workdir.histograms, {"step": int})
    assert [row["step"] for row in rows] == [3, 6]
    names = ["ssm", "local", "ssm", "local", "full"]
    expected = {f"gradients/layer_{i}/{name}/{group}" for i, name in enumerate(names) for group in GROUPS}
    expected |= {
        f"activations/layer_{i}/{name}/{part}"
        for i, name in enumerate(names)
        for part in ("mixer_input", "mixer_output", "stream")
    }
    assert rows[0]["histograms"].keys() == expected | {"gradients/embedding", "gradients/norm"}
    gradients = [Histogram(**row) for name, row in rows[0]["histograms"].items() if name.startswith("gradients/")]
    assert sum(histogram.count for histogram in gradients) == read_json(workdir.result)["parameters"]
    norm = np.sqrt(sum(histogram.squares for histogram in gradients))
    assert norm == pytest.approx(read_rows(workdir.metrics)[2]["train/grad_norm"], rel=1e-5)
    assert Histogram(**rows[0]["histograms"]["activations/layer_3/local/stream"]).count == 4 * 32 * 16
    assert rows[0]["edges"] == EDGES.tolist()

    steps = [step for step, values in read_events(workdir.events) if "gradients/layer_3/local/mixer" in values]
    assert steps == [3, 6]
    traces = list(workdir.profile.glob("plugins/profile/*/*.xplane.pb"))
    assert len(traces) == 1
    assert traces[0].stat().st_size > 1000


def test_histograms_of_frozen_parameters_and_microbatches(services, text, tmp_path):
    settings = SHORT | {"train.steps": 2, "train.histograms": 2, "train.accumulate": 2, "optimizer.freeze": "period.*"}
    runs.train_here(runs.load(text, settings | {"train.log_to": "wandb,mlflow"}), tmp_path)
    for service in services:
        assert [step for step, _ in logged(service, "run0", "train/loss")] == [1, 2]
    [(step, size)] = logged(services[0], "run0", "activations/layer_0/ssm/stream")
    assert (step, size) == (2, 2 * 32 * 16)
    [row] = read_rows(Workdir(tmp_path).histograms, {"step": int})
    gradients = {name: Histogram(**values) for name, values in row["histograms"].items() if name.startswith("grad")}
    assert {name.split("/")[1] for name in gradients} == {"layer_4", "embedding", "norm"}
    assert Histogram(**row["histograms"]["activations/layer_0/ssm/stream"]).count == 2 * 32 * 16
    norm = np.sqrt(sum(histogram.squares for histogram in gradients.values()))
    assert norm == pytest.approx(read_rows(Workdir(tmp_path).metrics)[1]["train/grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("scan", "scopes"),
    [
        (True, ["layer_0+2r/ssm/mixer", "layer_1+2r/local/mixer", "layer_1+2r/local/mlp", "layer_4/full/mixer"]),
        (False, ["layer_0/ssm/mixer", "layer_3/local/mixer", "layer_3/local/mlp", "layer_4/full/mixer"]),
    ],
    ids=["scanned", "unrolled"],
)
def test_operations_have_the_names_of_layers(text, scan, scopes):
    """In the metadata of the training step, from which a trace takes them."""
    mesh = single_device_mesh()
    [phase] = plan_phases(runs.load(text, SHORT | {"model.scan": scan}))
    dataset = load_dataset(phase.config.data)
    runtime = PhaseRuntime(phase, 8, dataset, mesh)
    batch = shard_batch(next(dataset.train_batches(4, 0)), mesh)
    with jax.set_mesh(mesh):
        lowered = runtime._step.lower(state_shapes(runtime.model, runtime.optimizer, mesh), batch)
    names = set(re.findall(r'op_name="([^"]*)"', lowered.as_text("hlo", debug_info=True)))
    plain = {name.replace(")", "") for name in names}
    for scope in [*scopes, "embedding", "head"]:
        assert any(scope in name for name in plain), scope
    assert any(name.startswith("jit(step)/transpose(jvp(layer_4/full))/mixer") for name in names)


@pytest.mark.external
@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_package_itself_without_a_network(name, text, tmp_path, monkeypatch):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    workdir = Workdir(tmp_path / "run")
    settings = runs.load(text, SHORT | {"train.log_to": name, "train.histograms": 4})
    with monkeypatch.context() as patch:
        runs.send_signal_at(patch, 3)
        with pytest.raises(Interrupted):
            runs.train_here(settings, workdir.path)
    first = read_json(workdir.loggers)
    runs.train_here(settings, workdir.path)
    assert read_json(workdir.loggers) == first
    if name == "wandb":
        assert len(list(workdir.path.glob(f"wandb/offline-run-*-{first[name]}"))) == 2
        return
    from mlflow import MlflowClient

    history = MlflowClient(f"sqlite:///{workdir.path}/mlflow.db").get_metric_history(first[name], "train/loss")
    rows = {row["step"]: row["train/loss"] for row in read_rows(workdir.metrics)}
    assert {metric.step: metric.value for metric in history} == rows
    assert len(history) == len(rows)
