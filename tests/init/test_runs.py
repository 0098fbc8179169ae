"""Runs that start from weights: killed, without their source, frozen, and on a mesh."""

import json
import re
import shutil
import signal

import numpy as np
import pytest

from sparsejax.runs import list_steps, read_arrays
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.init import origins
from tests.train import runs

STEPS = 40
LOCAL = "--config.model.layers.full.mixer.pattern=causal & window(3)"


@pytest.fixture
def source(workdir, tmp_path):
    """A copy of a workdir, which a test deletes."""
    return shutil.copytree(workdir, tmp_path / "source")


@pytest.fixture
def arguments(text, source):
    recipe = ["train", f"--config={runs.RECIPE}", f"--config.train.steps={STEPS}", f"--config.data.files={text}"]
    return [*recipe, LOCAL, f"--config.init.source=run:{source}"]


def assert_same_run(workdir, expected):
    assert list_steps(workdir.checkpoints) == list_steps(expected.checkpoints)
    for step in list_steps(expected.checkpoints):
        runs.assert_same_bits(*(read_arrays(folder.checkpoints, step) for folder in (workdir, expected)))
    for name in ("metrics", "config", "init", "result"):
        assert getattr(workdir, name).read_bytes() == getattr(expected, name).read_bytes(), name


def test_a_killed_run_resumes_without_its_source(arguments, source, tmp_path):
    expected, workdir = Workdir(tmp_path / "expected"), Workdir(tmp_path / "run")
    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={expected.path}"))
    assert (code, err) == (0, "")
    count = len(read_json(expected.init)["loaded"])
    assert f"init: run:{source}@10: {count} parameters loaded, 0 derived, 0 fresh\n" in out

    process = runs.start(*arguments, f"--workdir={workdir.path}")
    while not (workdir.checkpoints / "15").is_dir():
        runs.wait_for_row(process, workdir.path, 15)
    process.kill()
    assert runs.finish(process)[0] == -signal.SIGKILL
    assert read_rows(workdir.metrics)[-1]["step"] < STEPS
    shutil.rmtree(source)
    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={workdir.path}"))
    assert (code, err) == (0, "")
    assert f"resuming {workdir.path} at step" in out
    assert "init:" not in out
    assert_same_run(workdir, expected)


def test_a_run_of_a_deleted_folder_resumes(llama, tmp_path):
    """The configuration and the tokenizer of the folder are in the workdir."""
    overrides = [f"--config.{key}={value}" for key, value in (origins.PROBE | {"train.steps": 4}).items()]
    arguments = ["train", f"--config=hf:{llama}", *overrides, "--config.checkpoint.every=2", "--config.eval.every=2"]
    code, _, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path / 'run'}"))
    assert (code, err) == (0, "")
    shutil.rmtree(llama)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    (tmp_path / "run" / "result.json").unlink()
    code, out, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path / 'run'}"))
    assert (code, err) == (0, "")
    assert f"resuming {tmp_path / 'run'} at step 2" in out
    code, _, err = runs.finish(runs.start(*arguments, f"--workdir={tmp_path / 'new'}"))
    assert code == 2
    assert err == f"sparsejax: --config: hf:{llama}: no folder {str(llama)!r}\n"


def test_frozen_parameters_keep_their_bits(workdir, text, tmp_path):
    """Only the changed layer is trained; the state of the optimizer shrinks by what is frozen."""
    overrides = {"init.source": f"run:{workdir}", "train.steps": 5, "optimizer.name": "adamw"}
    frozen = overrides | {"optimizer.freeze": "embedding.*, period.*, norm.*, after.0.m*_residual.*, after.0.mlp.*"}
    printed = runs.train_here(runs.load(text, frozen), tmp_path / "frozen")
    runs.train_here(runs.load(text, overrides), tmp_path / "all")
    before, after, others = (
        read_arrays(Workdir(folder).checkpoints, step)
        for folder, step in ((workdir, 10), (tmp_path / "frozen", 5), (tmp_path / "all", 5))
    )
    parameters = [path for path in before if path.startswith("parameters.")]
    trained = [path for path in parameters if path.startswith("parameters.after.0.mixer.")]
    assert len(trained) == 4
    for path in parameters:
        assert (after[path].tobytes() == before[path].tobytes()) == (path not in trained), path
        assert others[path].tobytes() != before[path].tobytes(), path
    size, saved = (
        sum(leaf.nbytes for path, leaf in arrays.items() if "optimizer" in path) for arrays in (others, after)
    )
    removed = 2 * sum(before[path].nbytes for path in parameters if path not in trained)  # both moments
    assert 0 <= size - saved - removed <= 64
    count = sum(before[path].size for path in trained)
    shown = re.search(r"optimizer: adamw, ([\d,]+) of [\d,]+ parameters are trained, ([\d,]+) bytes of state", printed)
    assert int(shown[1].replace(",", "")) == count
    assert abs(int(shown[2].replace(",", "")) - saved) <= 64
    assert saved < size / 3


ON_A_MESH = """
import json, jax, numpy as np
from sparsejax import config as configs, sharding
from sparsejax.config import ShardingConfig
from sparsejax.init.plan import plan
from sparsejax.model import Functional
overrides = json.loads('{overrides}')
config = configs.check(configs.load("{source}", overrides))
planned = plan(config.init, Functional(config.model))
mesh = sharding.make_mesh(ShardingConfig(data=2, fsdp=2, tensor=2))
single, sharded = planned.load(sharding.single_device_mesh(), 0), planned.load(mesh, 0)
expected = sharding.parameter_shardings(mesh, planned.model.shapes, planned.model.axes)
def equal(a, b, placement):
    return bool((np.asarray(a) == np.asarray(b)).all()) and b.sharding.is_equivalent_to(placement, b.ndim)
same = jax.tree.map(equal, single, sharded, expected)
split = [leaf.nbytes for leaf in jax.tree.leaves(sharded) if leaf.sharding.shard_shape(leaf.shape) != leaf.shape]
print(json.dumps([jax.tree.all(same), sum(split) / sum(leaf.nbytes for leaf in jax.tree.leaves(sharded))]))
"""


@pytest.mark.parametrize("kind", ["hf", "run"])
def test_eight_devices(kind, workdir):
    """Part of a scanned period is drawn at random."""
    source = f"hf:{origins.GOLDEN / 'llama'}" if kind == "hf" else f"run:{workdir}"
    overrides = {"init.fresh": "layers.1.mixer.*"} | ({"model.vocab": 72} if kind == "hf" else {})
    program = ON_A_MESH.format(source=source, overrides=json.dumps(overrides))
    code, out, err = runs.finish(runs.start(program=("-c", program), devices=8))
    assert code == 0, err
    same, split = json.loads(out.splitlines()[-1])
    assert same
    assert split > 0.8


def test_the_record_of_a_converted_model(text, workdir, tmp_path):
    overrides = {
        "init.source": f"run:{workdir}",
        "init.fresh": "layers.4.mixer.gate.weight",
        "model.layers.full.mixer.kind": "lightning",
        "train.steps": 1,
    }
    printed = runs.train_here(runs.load(text, overrides), tmp_path / "run")
    record = read_json(Workdir(tmp_path / "run").init)
    assert record["fresh"] == ["layers.4.mixer.gate.weight"]
    assert record["derived"]["layers.4.mixer.key.weight"] == {
        "rules": ["attention_to_lightning"],
        "from": ["layers.4.mixer.key.weight"],
    }
    assert len(record["derived"]) == 5
    assert "5 derived, 1 fresh\n" in printed
    assert "  by attention_to_lightning: layers.4.mixer.key.weight and 4 others\n" in printed
    assert "  fresh: layers.4.mixer.gate.weight\n" in printed
    assert np.isfinite(read_rows(Workdir(tmp_path / "run").metrics)[0]["train/loss"])
