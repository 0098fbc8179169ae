"""Models that `sparsejax.load` opens: workdirs at any step, Hugging Face folders, their logits, losses and texts."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from sparsejax.data.tokenizers import Bytes
from sparsejax.errors import InputError
from sparsejax.runs import list_steps, read_arrays
from sparsejax.workdir import Workdir, read_json, read_rows
from tests.inference.conftest import GOLDEN, write_tokenizer
from tests.messages import rejects

TEXT = "window sink scan tile dense sparse window"


@pytest.fixture(scope="module")
def model(workdir):
    return sparsejax.load(workdir)


def test_a_checkpoint_is_chosen_by_its_step(workdir, model, tmp_path):
    steps = list_steps(Workdir(workdir).checkpoints)
    assert model.step == steps[-1] == sparsejax.load(workdir, step="last").step == 6
    earlier = sparsejax.load(workdir, step=steps[0])
    assert earlier.step == steps[0] < 6
    saved = read_arrays(Workdir(workdir).checkpoints, steps[0])["parameters.embedding.tokens"]
    np.testing.assert_array_equal(earlier.parameters["embedding"]["tokens"], saved)
    copy = shutil.copytree(workdir, tmp_path / "copy")
    rows = read_rows(Workdir(copy).metrics)
    for row in rows:  # the last step is now the worst
        row["eval/loss"] = row["step"] if "eval/loss" in row else None
    Workdir(copy).metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert sparsejax.load(copy, step="best").step == steps[0]
    Workdir(copy).metrics.unlink()
    with rejects(InputError, "step"):
        sparsejax.load(copy, step="best")
    with rejects(InputError, "step"):
        sparsejax.load(workdir, step=3)
    with rejects(InputError, "tokenizer"):
        sparsejax.load(workdir, tokenizer="bytes")


def test_the_parts_of_a_model(model):
    assert model.schedule == model.config.schedule == "2x(ssm local) full"
    assert isinstance(model.tokenizer, Bytes)
    assert model.parameters["embedding"]["tokens"].shape == (256, 16)
    tokens = model.encode(TEXT)
    logits = model.logits(TEXT)
    assert logits.shape == (len(TEXT), 256)
    np.testing.assert_array_equal(logits, model.logits(tokens))
    np.testing.assert_array_equal(logits, model.logits(tokens[None])[0])
    gradient = jax.grad(lambda p: model.logits(tokens, parameters=p).sum())(model.parameters)
    assert jnp.abs(gradient["embedding"]["tokens"]).sum() > 0


def test_the_loss_of_a_text(model):
    tokens = model.encode(TEXT)
    losses = -np.asarray(jax.nn.log_softmax(model.logits(tokens[:-1])))[np.arange(len(tokens) - 1), tokens[1:]]
    assert model.loss(TEXT, length=100) == pytest.approx(losses.mean(), abs=1e-5)
    assert model.loss(tokens, length=100) == model.loss(TEXT, length=100)
    with rejects(InputError, "inputs"):
        model.loss("a")
    with rejects(InputError, "inputs"):
        model.loss()
    with rejects(InputError, "stride"):
        model.loss(TEXT, length=8, stride=9)


def test_continuations_are_scored(model):
    """Whatever the batch; a text is split where the ids of the prompt end."""
    pairs = [("window", " sink"), ("tile dense", " "), ("a", "b"), ("scan", TEXT)]
    expected = []
    for prompt, continuation in pairs:
        tokens, count = model.encode(prompt + continuation), len(continuation)
        losses = np.asarray(jax.nn.log_softmax(model.logits(np.pad(tokens, (0, 64 - len(tokens))))), np.float64)
        expected.append(losses[np.arange(len(tokens) - 1), tokens[1:]][-count:])
    seen = []
    scores = model.score(pairs, batch=3, progress=lambda *counts: seen.append(counts))
    assert seen == [(0, 2), (1, 2)]
    for score, values in zip(scores, expected, strict=True):
        np.testing.assert_allclose(score.tokens, values, atol=1e-5)
        assert score.log_likelihood == pytest.approx(values.sum(), abs=1e-4)
    ids = [tuple(model.encode(text) for text in pair) for pair in pairs]
    assert [score.log_likelihood for score in model.score(ids, batch=3)] == [score.log_likelihood for score in scores]
    greedy = model.generate("window", 4, temperature=0).tokens
    assert [score.is_greedy for score in model.score([(ids[0][0], greedy), (ids[0][0], greedy[::-1] + 1)])] == [
        True,
        False,
    ]
    assert model.score([]) == []
    for argument, pair in (
        ("prompt", ("", "a")),
        ("continuation", ("a", "")),
        ("pairs", ("a", [3])),
        ("ids", ([999], [3])),
    ):
        with rejects(InputError, argument):
            model.score([pair])
    with rejects(InputError, "batch"):
        model.score(pairs, batch=0)


@pytest.mark.parametrize(("length", "stride"), [(8, 0), (8, 8), (8, 3), (16, 1), (64, 5)])
def test_sliding_windows_score_each_token_once(model, length, stride):
    tokens = model.encode(TEXT)
    losses, step = [], stride or length
    for target in range(1, len(tokens)):
        # The window is the first whose last `step` targets include this one.
        number = max(0, -(-(target - length) // step))
        context = tokens[number * step : target]
        assert len(context) <= length
        logits = np.asarray(jax.nn.log_softmax(model.logits(np.pad(context, (0, length - len(context))))))
        losses.append(-logits[len(context) - 1, tokens[target]])
    assert model.loss(TEXT, length=length, stride=stride) == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_evaluation_of_a_run_is_that_of_its_training(workdir, model):
    result, assessment = read_json(Workdir(workdir).result), model.evaluate()
    expected = {name: value for name, value in result.items() if name.startswith("eval/")}
    assert {name: assessment.metrics[name] for name in expected} == expected
    assert set(assessment.metrics) - set(expected) == {"eval/perplexity"}
    assert assessment.metrics["eval/perplexity"] == pytest.approx(np.exp(expected["eval/loss"]))


def test_all_of_a_text_is_evaluated(model, text, tmp_path):
    path, content = tmp_path / "other.txt", TEXT * 3 + " naïve"
    path.write_text(content)
    seen = []
    assessment = model.evaluate(
        {"files": str(path), "length": 16}, stride=4, batch=3, progress=lambda *counts: seen.append(counts)
    )
    size = len(content.encode())
    assert assessment.evaluation.tokens == size - 1
    assert assessment.evaluation.loss == pytest.approx(model.loss(content, length=16, stride=4), abs=1e-6)
    assert assessment.metrics["eval/bits_per_byte"] == pytest.approx(assessment.evaluation.loss / np.log(2))
    batches = -(-(1 + -(-(size - 17) // 4)) // 3)
    assert seen == [(batch, batches) for batch in range(batches)]
    validation = model.evaluate({"validation": str(path), "length": 16}, stride=4)
    assert validation.metrics == pytest.approx(assessment.metrics)
    assert model.loss(files=str(path), length=16, stride=4) == pytest.approx(assessment.evaluation.loss)
    whole = model.evaluate({"files": str(text)}).evaluation.tokens
    assert whole == sum(len(file.read_bytes()) for file in text.iterdir()) + 39 - 1  # a separator between documents
    assert model.evaluate({"files": str(path), "length": 1000}).evaluation.tokens == size - 1  # shorter than a window


def test_a_probe_is_evaluated(model):
    data = {"task": "mqar", "probe.vocab": 64, "probe.length": 32, "probe.pairs": 2}
    assessment = model.evaluate(data, limit=2)
    assert 0 <= assessment.metrics["eval/accuracy"] <= 1
    assert assessment.dataset.config.length == 32
    assert assessment.evaluation.accuracy.distance_bins()


@pytest.mark.parametrize(
    ("argument", "data", "options"),
    [
        ("data.files", {"files": "/absent"}, {}),
        ("data.wrong", {"wrong": 1}, {}),
        ("data.length", {"length": 0}, {}),
        ("data.objective", {"objective": "masked"}, {}),
        ("data.validation", {"files": "a", "validation": "b"}, {}),
        ("data.tokenizer", {"tokenizer": "/absent", "files": "TEXT"}, {}),
        ("model.vocab", {"task": "mqar"}, {}),
        ("stride", {}, {"stride": 33}),
        ("batch", {}, {"batch": 0}),
    ],
)
def test_invalid_evaluations(model, text, argument, data, options):
    data = {key: str(text) if value == "TEXT" else value for key, value in data.items()}
    with rejects(InputError, "causal" if argument == "data.objective" else argument):
        model.evaluate(data, **options)


def test_texts_are_continued(model):
    completion = model.generate(TEXT, 20, temperature=0)
    assert completion.reason == "length"
    assert len(completion.tokens) == 20
    assert completion.text == bytes(completion.tokens.tolist()).decode(errors="replace") == str(completion)
    np.testing.assert_array_equal(model.generate(model.encode(TEXT), 20, temperature=0).tokens, completion.tokens)
    prompts = [TEXT, TEXT[::-1]]  # of one bucket
    first, second = model.generate(prompts, 20, seed=3)
    assert model.generate(prompts[1], 20, seed=4).text == second.text
    assert [row.text for row in model.generate(prompts[:1], 20, seed=3)] == [first.text]
    streamed = {0: "", 1: ""}
    again = model.generate(prompts, 20, seed=3, on_text=lambda row, text: streamed.update({row: streamed[row] + text}))
    assert [row.text for row in again] == [first.text, second.text] == [streamed[0], streamed[1]]


def test_a_continuation_ends_at_a_stop_string_or_an_end_token(model):
    whole = model.generate(TEXT, 20, temperature=0)
    stop = whole.text[4:7]
    stopped = model.generate(TEXT, 20, temperature=0, stop=["absent", stop])
    assert stopped.reason == "stop"
    assert stopped.text == whole.text[: whole.text.find(stop)]
    end = int(whole.tokens[3])
    count = whole.tokens.tolist().index(end) + 1
    ended = model.generate([TEXT, TEXT[::-1]], 20, temperature=0, ends=[end])[0]
    assert ended.reason == "end"
    np.testing.assert_array_equal(ended.tokens, whole.tokens[:count])
    assert ended.text == bytes(whole.tokens[: count - 1].tolist()).decode(errors="replace")


@pytest.mark.parametrize(
    ("argument", "prompts", "options"),
    [
        ("prompt", "", {}),
        ("prompt", [], {}),
        ("prompt", [TEXT, ""], {}),
        ("prompt", [300], {}),
        ("tokens", TEXT, {"tokens": 0}),
        ("top_p", TEXT, {"top_p": 2.0}),
        ("stop", TEXT, {"stop": ""}),
        ("stop", TEXT, {"stop": [""]}),
        ("seed", TEXT, {"seed": -1}),
    ],
)
def test_invalid_generations(model, argument, prompts, options):
    with rejects(InputError, argument):
        model.generate(prompts, **{"tokens": 4} | options)


# Hugging Face folders.


def test_a_hugging_face_folder_answers(folder):
    model = sparsejax.load(folder)
    np.testing.assert_array_equal(model.encode("w4 w7 w9"), [1, 7, 10, 12])
    assert model.step is None
    assert model.source.ends(model.tokenizer) == (2,)
    completion = model.generate("w4 w7", 5, temperature=0, ends=())
    logits = model.logits([1, 7, 10, *completion.tokens[:-1]])
    np.testing.assert_array_equal(completion.tokens, logits[2:].argmax(-1))
    (folder / "text.txt").write_text("w1 w2 w3 w9 " * 40)
    assessment = model.evaluate({"files": str(folder / "text.txt"), "length": 32}, stride=8)
    assert assessment.evaluation.tokens == 4 * 40 - 1
    assert assessment.metrics["eval/bits_per_byte"] > 0
    with rejects(InputError, "data.files"):
        model.evaluate()
    with rejects(InputError, "step"):
        sparsejax.load(folder, step="best")


def test_tokenizers_of_other_models(folder, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    other = shutil.copytree(folder, tmp_path / "other")
    write_tokenizer(tokenizers, other / "tokenizer.json", 120)
    for use in (lambda model: model.generate("w1", 2), lambda model: model.evaluate({"files": str(other)})):
        with rejects(InputError, "tokenizer"):
            use(sparsejax.load(other))
    (other / "tokenizer.json").unlink()
    with rejects(InputError, "tokenizer"):
        sparsejax.load(other).generate("w1", 2)
    assert len(sparsejax.load(other).generate([3, 4], 2).tokens) == 2
    assert sparsejax.load(other, tokenizer=str(folder / "tokenizer.json")).encode("w1").tolist() == [1, 4]
    for name in ("/absent", "bpe:300"):
        with rejects(InputError, "tokenizer"):
            sparsejax.load(other, tokenizer=name).encode("w1")


@pytest.mark.parametrize("name", ["modernbert", "bigbird_block_sparse", "reformer"])
def test_models_that_cannot_generate(name):
    model = sparsejax.load(GOLDEN / name)
    with rejects(InputError, "generate"):
        model.generate([3, 4], 2)
    if not model.config.causal:
        with rejects(InputError, "loss"):
            model.loss(np.array([3, 4, 5]))


@pytest.mark.parametrize("fixture", ["workdir", "folder"])
def test_bfloat16_halves_the_bytes_of_linear_maps(request, fixture):
    path, tokens = request.getfixturevalue(fixture), np.arange(40) % 20 + 3
    exact, low = (sparsejax.load(path, dtype=dtype) for dtype in ("float32", "bfloat16"))
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(model.parameters)) for model in (exact, low)]
    assert 0.5 < sizes[1] / sizes[0] < 0.53
    norms = [leaf.dtype for path, leaf in jax.tree.leaves_with_path(low.parameters) if "scale" in str(path)]
    assert set(norms) == {np.dtype("float32")}
    logits = [np.asarray(model.logits(tokens)) for model in (exact, low)]
    assert 0 < np.abs(logits[1] - logits[0]).max() < 0.05 * np.abs(logits[0]).max()
    assert len(low.generate(tokens, 4).tokens) == 4


def test_an_unknown_dtype_is_named(workdir, folder):
    for path in (workdir, folder):
        with rejects(InputError, "dtype"):
            sparsejax.load(path, dtype="float16")
