"""Any source, objective and probe with one config, by overrides alone; packed documents do not see one another."""

import json

import jax
import numpy as np
import pytest

from sparsejax import config as configs
from sparsejax import sharding
from sparsejax.cli import USAGE_ERROR, main
from sparsejax.data import load_dataset
from sparsejax.data.rows import Packed
from sparsejax.model import Functional
from sparsejax.train import build_evaluation, evaluate, read_rows, summarize
from sparsejax.train.step import read_context
from tests.train import recipe, runs

LOCAL = "--config.model.layers.local.mixer.pattern"


@pytest.fixture
def text(tmp_path):
    return runs.write_text(tmp_path / "text")


def train(workdir, *overrides):
    """The rows of a short run."""
    given = ["train", f"--config={runs.RECIPE}", f"--workdir={workdir}", "--config.train.steps=5"]
    code = main([*given, "--config.model.schedule=local full", *overrides])
    assert code == 0
    return read_rows(workdir / "metrics.jsonl")


def test_a_probe_by_override_alone(tmp_path, capsys):
    row = train(
        tmp_path / "run",
        "--config.data.probe.pairs=2",
        "--config.data.probe.vocab=32",
        "--config.data.probe.length=32",
        "--config.data.task=mqar",
        "--config.eval.batches=1",
    )[-1]
    assert 0 <= row["eval/exact_match"] <= row["eval/accuracy"] <= 1
    assert {name for name in row if name.startswith("eval/accuracy_at_distance_")}
    assert "eval/bits_per_byte" not in row
    assert "accuracy by distance" in capsys.readouterr().out


def test_masked_rows(text, tmp_path):
    ahead = [f"{LOCAL}=window(5, 5)", "--config.model.layers.full.mixer.pattern=full", "--config.model.causal=false"]
    row = train(
        tmp_path / "run",
        f"--config.data.files={text}",
        "--config.data.objective=masked",
        "--config.model.vocab=257",
        *ahead,
    )[-1]
    assert row["eval/bits_per_token"] > 0
    assert 0 <= row["eval/accuracy"] <= 1


def test_classes_of_documents(tmp_path):
    """The class is told by the letter that a document is made of: a causal model of windows finds it by its mean."""
    lines = [{"text": "abcd"[i % 4] * (5 + i % 30), "kind": i % 4} for i in range(200)]
    files = tmp_path / "text.jsonl"
    files.write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = train(
        tmp_path / "run",
        f"--config.data.files={files}",
        "--config.data.objective=classify",
        "--config.data.label=kind",
        "--config.model.head.pool=mean",
        "--config.train.steps=40",
        "--config.eval.every=40",
        "--config.checkpoint.every=40",
    )[-1]
    assert row["eval/accuracy"] == row["eval/exact_match"] > 0.9


def test_packed_records_and_overlapping_windows(text, tmp_path):
    packed = train(tmp_path / "a", f"--config.data.files={text}", "--config.data.packing=packed")[-1]
    strided = train(tmp_path / "b", f"--config.data.files={text}", "--config.eval.stride=8")[-1]
    assert packed["eval/bits_per_byte"] > 0
    assert {name for name in strided if name.startswith("eval/bits_at")} == {
        "eval/bits_at_0",
        "eval/bits_at_8",
        "eval/bits_at_16",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.causal=false"], "model.causal: is false, but data.objective = 'causal' predicts the next token"),
        (["data.objective=masked"], "model.causal: is true, but data.objective = 'masked' predicts from both sides"),
        (
            ["data.objective=masked", "model.causal=false"],
            "model.vocab: is 256, data.tokenizer = 'bytes' with data.objective = 'masked' needs 257",
        ),
        (
            ["data.objective=prefix", "data.prefix=8", "model.causal=false", "model.layers.full.mixer.pattern=full"],
            "model.layers.full.mixer.pattern: 'full' sees what data.objective = 'prefix' predicts; it may see as much"
            " as 'causal | prefix(8)'",
        ),
        (
            ["data.objective=classify", "data.label=kind"],
            "model.causal: is true, but data.objective = 'classify' asks the first token, which then sees nothing; or"
            " set model.head.pool = 'mean'",
        ),
        (
            ["model.head.pool=mean"],
            "model.head.pool: is 'mean', data.objective = 'causal' predicts single tokens",
        ),
        (["data.objective=prefix"], "data: prefix = 0 must leave some of length = 32 to predict"),
        (["data.task=mqar"], "data.length: is 32, the probe mqar has 64 tokens"),
        (["data.task=mqar", "data.probe.length=32"], "model.vocab: is 256, the probe mqar needs 8192"),
        (["data.task=mqar", "data.probe.pair=2"], "data.probe.pair: unknown key, did you mean 'pairs'?"),
        (["data.probe.pairs=2"], "data.probe: is a value, not a section"),
        (["eval.stride=33"], "eval.stride: 33 tokens are more than data.length = 32"),
        (["data.mask.unit=letter"], "data.mask: unit must be one of token, word, span, got 'letter'"),
    ],
)
def test_what_does_not_fit_is_named(overrides, message, text, tmp_path, capsys):
    given = ["train", f"--config={runs.RECIPE}", f"--config.data.files={text}", f"--workdir={tmp_path / 'run'}"]
    assert main([*given, *(f"--config.{override}" for override in overrides)]) == USAGE_ERROR
    assert capsys.readouterr().err == f"sparsejax: {message}\n"
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def bench():
    """A model of every kind of mixer with learned positions, its parameters, and its evaluation."""
    settings = recipe.get_config()
    settings.model.layers.local.mixer.pattern = "causal & window(5)"
    settings.model.embedding = {"positions": 32}
    config = configs.check(settings)
    model, mesh = Functional(config.model), sharding.make_mesh(config.sharding)
    return build_evaluation(model, mesh, answers=True), model.init(jax.random.key(0))


def test_packed_documents_lose_as_much_as_each_alone(bench):
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
        return [np.asarray(x, np.float64) for x in run(parameters, batch)], len(rows)

    together, rows = losses(documents)
    alone = [losses(documents[i : i + 1])[0] for i in range(len(documents))]
    assert rows < len(documents)
    for name, one in zip(("losses", "weights", "right"), range(3), strict=True):
        np.testing.assert_allclose(together[one], sum(each[one] for each in alone), rtol=2e-5, err_msg=name)
    assert together[1][0] == 8  # seven documents, one of them in two pieces


def test_a_mean_over_a_document_leaves_padding_out():
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
    beside = run(padded, read_context({"segments": segments, "positions": np.arange(32)[None]}))
    np.testing.assert_allclose(beside[:, :1], alone[:, :1], rtol=2e-5, atol=1e-6)
    np.testing.assert_array_equal(alone[:, 3], alone[:, 0])


def test_evaluation_counts_answers_by_row_position_and_distance(bench):
    run, parameters = bench
    random = np.random.default_rng(1)
    inputs = random.integers(0, 256, (8, 32)).astype(np.int32)
    weights = (random.random((8, 32)) < 0.2).astype(np.float32)
    weights[3] = 0
    batch = {"inputs": inputs, "targets": inputs, "weights": weights, "distance": inputs % 33}
    # Targets that are the model's own choice, but for one in row 0.
    for target in range(256):
        right = np.asarray(run(parameters, batch | {"targets": np.full_like(inputs, target)})[2])
        if right.any():
            break
    batch["targets"] = np.full_like(inputs, target)
    _, total, right, rows, by_distance = (np.asarray(x) for x in run(parameters, batch))
    assert total.sum() == weights.sum() == by_distance[1].sum()
    assert right.sum() == by_distance[0].sum() > 0
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

    def uniform(_, batch):  # every token costs 3 bits
        return 3 * np.log(2) * batch["weights"].sum(0), batch["weights"].sum(0)

    found = summarize(evaluate(uniform, None, dataset.validation_batches(4)), dataset)
    side = dataset.corpus.held_out
    texts = [dataset.tokenizer.decode(side.tokens[a:b]) for a, b in side.documents.tolist()]
    size = sum(len(text.encode()) for text in texts)
    assert found["eval/bits_per_byte"] == pytest.approx(3 * len(side.tokens) / size)
    assert found["eval/bits_per_character"] == pytest.approx(3 * len(side.tokens) / sum(map(len, texts)))


def test_show_data(text, tmp_path, capsys):
    given = ["show", "--data", f"--config={runs.RECIPE}", f"--config.data.files={text}"]
    assert main([*given, "--config.data.packing=packed"]) == 0
    out = capsys.readouterr().out
    assert "40 documents read" not in out  # some are held out
    assert "efficiency" in out
    assert out.count("segments 0-31") == 3
    assert "tokenizer: bytes, 256 ids, 1.0000 tokens per byte" in out
    assert main([*given, "--length=8"]) == USAGE_ERROR
    assert capsys.readouterr().err == "sparsejax: --data: goes with --config alone\n"
