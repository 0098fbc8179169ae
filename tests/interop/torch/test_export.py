"""transformers loads exported models and computes the same logits.

Run with `pytest -m external tests/interop/torch/test_export.py`; see `test_parity.py`.
"""

import json

import numpy as np
import pytest

from sparsejax.interop import huggingface
from sparsejax.interop.huggingface import parity
from sparsejax.interop.huggingface.expression import EXPORTED
from sparsejax.loaded import LoadedModel, Source
from tests.interop.torch.random_models import FAMILIES, draw_case
from tests.interop.torch.test_parity import CASES, torch  # noqa: F401 (a fixture)

pytestmark = pytest.mark.external


@pytest.mark.parametrize("number", range(CASES))
@pytest.mark.parametrize("family", sorted(set(FAMILIES) & set(EXPORTED)))
def test_an_exported_model_has_the_same_logits(torch, family, number, tmp_path, capsys):  # noqa: F811
    case = draw_case(family, 0, number)
    response = torch.request(do="make", family=family, seed=0, number=number, folder=str(tmp_path / "original"))
    assert "error" not in response
    original = huggingface.load(tmp_path / "original")
    length = case.inputs["input_ids"].shape[1]
    if original.source.translation.at_length is not None:
        original.config = original.source.translation.at_length(length)[0]
    # Without its source, the model is expressed from its configuration alone.
    model = LoadedModel(original.config, original.parameters, Source(masks=original.source.masks, length=length))
    huggingface.export(model, tmp_path / "exported", family=family)
    response = torch.request(do="run", family=family, seed=0, number=number, folder=str(tmp_path / "exported"))
    assert response == {"class": json.loads((tmp_path / "exported/config.json").read_text())["architectures"][0]} | {
        "names": []
    }
    inputs = {key: value for key, value in case.inputs.items() if key != "labels"}
    valid = parity.valid_positions(**inputs)
    expected = np.asarray(original.logits(**{("inputs" if k == "input_ids" else k): v for k, v in inputs.items()}))
    error = parity.max_difference(np.load(tmp_path / "exported/logits.npy")[valid], expected[valid])
    with capsys.disabled():
        print(f" {family} {number}: {error:.1e}", end="")
    assert error <= parity.TOLERANCES[family]
