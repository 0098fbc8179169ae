"""Any source, objective and probe with one config and overrides alone; packed documents do not interact."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.cli import main
from sparsejax.data import load_dataset
from sparsejax.data.rows import Packed
from sparsejax.errors import InputError
from sparsejax.inference import build_evaluation, evaluate, summarize
from sparsejax.inference.evaluation import EvaluationSums, read_context
from sparsejax.model import Functional
from sparsejax.overrides import flatten
from sparsejax.workdir import Workdir, read_rows
from tests.messages import rejects
from tests.train import recipe, runs

LOCAL, FULL = (f"model.layers.{name}.mixer.pattern" for name in ("local", "full"))
SHORT = {"train.steps": 5, "model.schedule": "local full"}
MQAR = {"data.task": "mqar", "data.probe.length": 32}


def train(workdir, files, **sections):
    """Trains for a few steps; returns the last row and the printed text. Sections are nested overrides."""
    settings = runs.load(files, SHORT | flatten(sections))
    printed = runs.train_here(settings, workdir)
    return read_rows(Workdir(workdir).metrics)[-1], printed


def test_a_probe(tmp_path):
    probe = {"pairs": 2, "vocab": 32, "length": 32}
    row, printed = train(tmp_path / "run", "", data={"task": "mqar", "probe": probe}, eval={"batches": 1})
    assert 0 <= row["eval/exact_match"] <= row["eval/accuracy"] <= 1
    assert {name for name in row if name.startswith("eval/accuracy_at_distance_")}
    assert "eval/bits_per_byte" not in row
    assert "accuracy by distance" in printed


def test_masked_rows(text, tmp_path):
    patterns = {"local": {"mixer": {"pattern": "window(5, 5)"}}, "full": {"mixer": {"pattern": "full"}}}
    model = {"vocab": 257, "causal": False, "layers": patterns}
    row, _ = train(tmp_path / "run", text, data={"objective": "masked"}, model=model)
    assert row["eval/bits_per_token"] > 0
    assert 0 <= row["eval/accuracy"] <= 1


def test_classes_of_documents(tmp_path):
    """A document repeats the letter of its class: a causal model of windows finds it in the mean."""
    lines = [{"text": "abcd"[i % 4] * (5 + i % 30), "kind": i % 4} for i in range(200)]
    files = tmp_path / "text.jsonl"
    files.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row, _ = train(
        tmp_path / "run",
        files,
        data={"objective": "classify", "label": "kind"},
        model={"head": {"pool": "mean"}},
        train={"steps": 40},
        eval={"every": 40},
        checkpoint={"every": 40},
    )
    assert row["eval/accuracy"] == row["eval/exact_match"] > 0.9


def test_packed_rows_and_overlapping_windows(text, tmp_path):
    packed, _ = train(tmp_path / "a", text, data={"packing": "packed"})
    strided, _ = train(tmp_path / "b", text, eval={"stride": 8})
    assert packed["eval/bits_per_byte"] > 0
    bins = {name for name in strided if name.startswith("eval/bits_at")}
    assert bins == {"eval/bits_at_0", "eval/bits_at_8", "eval/bits_at_16"}


MASKED, PREFIX = {"data.objective": "masked"}, {"data.objective": "prefix"}


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        pytest.param({"model.causal": False}, "model.causal", id="causal"),
        pytest.param(MASKED, "model.causal", id="masked causal"),
        pytest.param(MASKED | {"model.causal": False}, "model.vocab", id="masked vocab"),
        pytest.param(PREFIX | {"data.prefix": 8, "model.causal": False, FULL: "full"}, FULL, id="prefix full"),
        pytest.param({"data.objective": "classify", "data.label": "kind"}, "model.causal", id="classify causal"),
        pytest.param({"model.head.pool": "mean"}, "model.head.pool", id="pool"),
        pytest.param(PREFIX, "data", id="prefix length"),
        pytest.param({"data.task": "mqar"}, "data.length", id="probe length"),
        pytest.param(MQAR, "model.vocab", id="probe vocab"),
        pytest.param(MQAR | {"data.probe.pair": 2}, "data.probe.pair", id="probe key"),
        pytest.param({"data.probe.pairs": 2}, "data.probe", id="no probe"),
        pytest.param({"eval.stride": 33}, "eval.stride", id="stride"),
        pytest.param({"data.mask.unit": "letter"}, "data.mask.unit", id="unit"),
    ],
)
def test_what_does_not_fit_is_named(overrides, key, text, tmp_path):
    with rejects(InputError, key):
        runs.train_here(runs.load(text, overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def bench():
    """The evaluation of a model of every kind of mixer with learned positions, and its parameters."""
    settings = recipe.get_config()
    settings.model.layers.local.mixer.pattern = "causal & window(5)"
    settings.model.embedding = {"positions": 32}
    config = configs.check(settings)
    model, mesh = Functional(config.model), sharding.make_mesh(config.sharding)
    return build_evaluation(model, mesh, score_accuracy=True), model.init(jax.random.key(0))


def test_packed_documents_have_the_losses_of_single_documents(bench):
    run, parameters = bench
    random = np.random.default_rng(0)
    sizes = [3, 20, 7, 1, 31, 12, 40]
    starts = np.cumsum([0, *(size + 1 for size in sizes)])[:-1]
    documents = np.stack([starts, starts + sizes], 1)
    data = random.integers(1, 256, starts[-1] + sizes[-1], dtype=np.uint8)
    data[starts[1:] - 1] = 0

    def losses(bounds):
        rows = Packed(data, bounds, 0, 32)
        batch = rows.take(np.r_[np.arange(len(rows)), np.full(8 - len(rows), -1)])  # one shape: compiled once
        losses, weights, (correct, *_) = run(parameters, batch)
        return [np.asarray(x, np.float64) for x in (losses, weights, correct)], len(rows)

    together, rows = losses(documents)
    alone = [losses(documents[i : i + 1])[0] for i in range(len(documents))]
    assert rows < len(documents)
    for i, name in enumerate(("losses", "weights", "correct")):
        np.testing.assert_allclose(together[i], sum(sums[i] for sums in alone), rtol=2e-5, err_msg=name)
    assert together[1][0] == 8  # seven documents, one of them cut in two


def test_a_mean_over_a_document_ignores_padding():
    settings = recipe.get_config()
    settings.model.schedule = "full"
    settings.model.head = {"pool": "mean"}
    settings.model.causal = False
    settings.data.update({"objective": "classify", "label": "kind"})
    model = Functional(configs.check(settings).model)
    parameters = model.init(jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 256, (1, 12)).astype(np.int32)
    padded = np.pad(tokens, ((0, 0), (0, 20)), constant_values=7)
    segments = np.pad(np.ones_like(tokens), ((0, 0), (0, 20)))
    run = jax.jit(lambda x, context: model.bind(parameters)(x, context))
    alone = run(tokens, read_context({}))
    with_padding = run(padded, read_context({"segments": jnp.asarray(segments), "positions": jnp.arange(32)[None]}))
    np.testing.assert_allclose(with_padding[:, :1], alone[:, :1], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(alone[:, 3], alone[:, 0])


def test_accuracy_counts_rows_positions_and_distances(bench):
    run, parameters = bench
    random = np.random.default_rng(1)
    inputs = random.integers(0, 256, (8, 32)).astype(np.int32)
    weights = (random.random((8, 32)) < 0.2).astype(np.float32)
    weights[3] = 0
    batch = {"inputs": inputs, "targets": inputs, "weights": weights, "distance": inputs % 33}
    # A target that the model predicts somewhere.
    for target in range(256):
        sums = run(parameters, batch | {"targets": np.full_like(inputs, target)})
        if sums.accuracy.correct.any():
            break
    batch["targets"] = np.full_like(inputs, target)
    _, total, (correct, rows, by_distance) = jax.tree.map(np.asarray, run(parameters, batch))
    assert total.sum() == weights.sum() == by_distance[1].sum()
    assert correct.sum() == by_distance[0].sum() > 0
    assert rows[1] == 7
    for distance in range(33):
        assert by_distance[1, distance] == weights[inputs % 33 == distance].sum()


def test_bits_of_subwords_are_bits_of_their_bytes(text, tmp_path):
    pytest.importorskip("tokenizers")
    settings = recipe.get_config()
    settings.data.update(files=str(text), length=16)
    with settings.unlocked():
        settings.data.update(tokenizer="bpe:280", cache=str(tmp_path / "cache"))
    config = configs.check(settings)
    dataset = load_dataset(config.data)

    def uniform(_, batch):  # every token has a loss of 3 bits
        return EvaluationSums(3 * np.log(2) * batch["weights"].sum(0), batch["weights"].sum(0))

    summary = summarize(evaluate(uniform, {}, dataset.validation_batches(4)), dataset)
    side = dataset.corpus.held_out
    texts = [dataset.tokenizer.decode(side.tokens[a:b]) for a, b in side.documents.tolist()]
    size = sum(len(text.encode()) for text in texts)
    assert summary["eval/bits_per_byte"] == pytest.approx(3 * len(side.tokens) / size)
    assert summary["eval/bits_per_character"] == pytest.approx(3 * len(side.tokens) / sum(map(len, texts)))


def test_show_data(text, capsys):
    arguments = ["data", "show", f"--config={runs.RECIPE}", f"--config.data.files={text}"]
    assert main([*arguments, "--config.data.packing=packed"]) == 0
    out = capsys.readouterr().out
    assert "40 documents read" not in out  # some are held out
    assert "efficiency" in out
    assert out.count("segments 0-31") == 3
    assert "tokenizer: bytes, 256 ids, 1.0000 tokens per byte" in out
