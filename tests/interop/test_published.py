"""Loaded models follow the published model where transformers 5.23 departs from it; see the README of parity."""

import json
import shutil
from pathlib import Path

import pytest

from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import parity
from sparsejax.layers import Mamba2Config
from sparsejax.loaded import LoadedModel

GOLDEN = Path(__file__).parents[1] / "golden"
CLAMPED = pytest.mark.parametrize("name", ["nemotron_h", "zamba2"])


def load(name: str, tmp_path: Path, **keys) -> LoadedModel:
    """Loads a golden folder with other keys in its config.json."""
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "folder"))
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return huggingface.load(folder)


@CLAMPED
def test_time_step_min_is_not_a_bound(name, tmp_path):
    record = parity.read_record(GOLDEN / name)
    model = load(name, tmp_path, time_step_min=0.3)
    logits = model.logits(record.inputs["input_ids"], **record.masks)
    error = parity.max_difference(logits[record.valid], record.outputs["logits"][record.valid])
    assert error <= parity.TOLERANCES[name]


@CLAMPED
@pytest.mark.parametrize(
    ("limit", "bounds"),
    [(None, (0.0, None)), ([0.0, float("inf")], (0.0, None)), ([0.0, None], (0.0, None)), ([0.1, 0.5], (0.1, 0.5))],
    ids=["null", "infinite", "unbounded", "finite"],
)
def test_time_step_limit_is_a_bound(name, limit, bounds, tmp_path):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config | {"time_step_limit": limit}))
    mixers = [layer.mixer for layer in huggingface.read_config(path).model.layers.values()]
    read = {(mixer.dt_floor, mixer.dt_ceiling) for mixer in mixers if isinstance(mixer, Mamba2Config)}
    assert read == {bounds}
