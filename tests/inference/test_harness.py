"""lm-evaluation-harness runs tasks from local files, and its log-likelihoods equal those of the logits."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

import sparsejax
from sparsejax.errors import InputError
from tests.messages import rejects

lm_eval = pytest.importorskip("lm_eval", reason="needs the extra eval")
harness = pytest.importorskip("sparsejax.harness")
instance = pytest.importorskip("lm_eval.api.instance")

LENGTH = 32
WORDS = ["window", "sink", "scan", "tile", "dense", "sparse"]


@pytest.fixture(scope="module")
def model(workdir):
    return sparsejax.load(workdir)


@pytest.fixture(scope="module")
def lm(model):
    return harness.SparsejaxLM(model, max_length=LENGTH, batch_size=3, max_gen_toks=8)


def ask(*arguments, kind="loglikelihood"):
    return [instance.Instance(kind, {}, row, index) for index, row in enumerate(arguments)]


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )


def expect(model, context, continuation, length=LENGTH):
    """Log-likelihood and greediness of ids, from the logits of one row; what follows it does not matter."""
    tokens = [*context, *continuation][-(length + 1) :]
    padded = np.pad(tokens[:-1], (0, 64 - len(tokens) + 1))
    rows = log_softmax(model.logits(padded))[: len(tokens) - 1][-len(continuation) :]
    return sum(row[token] for row, token in zip(rows, continuation, strict=True)), all(
        row.argmax() == token for row, token in zip(rows, continuation, strict=True)
    )


def test_continuations_are_scored_like_the_logits(model, lm):
    pairs = [
        ("", "tile"),
        ("window sink", " scan"),
        ("window sink ", "scan"),  # the space belongs to the continuation
        ("tile dense sparse " * 5, "window"),  # truncated from the left
        ("naïve", " é"),
        ("a", "b"),
        ("window", " " + " ".join(WORDS[:4])),
    ]
    results = lm.loglikelihood(ask(*pairs), disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, results, strict=True):
        head = context.rstrip()
        ids = list(head.encode()) or [0]
        expected = expect(model, ids, list((context + continuation).encode()[len(head.encode()) :]))
        assert value == pytest.approx(expected[0], abs=1e-4), (context, continuation)
        assert is_greedy == expected[1]
    greedy = model.generate("window sink", 3, temperature=0).text
    [(_, is_greedy)] = lm.loglikelihood(ask(("window sink", greedy)), disable_tqdm=True)
    assert is_greedy
    assert results[1][0] == pytest.approx(results[2][0], abs=1e-4)


def test_texts_are_scored_in_windows(model, lm):
    """Over whole windows, the sum is the loss of the text after the token that separates documents."""
    texts = [" ".join(WORDS * 8)[: 3 * LENGTH], "scan", ""]
    totals = lm.loglikelihood_rolling(ask(*[(content,) for content in texts]), disable_tqdm=True)
    tokens = np.array([0, *texts[0].encode()])
    assert totals[0] == pytest.approx(-model.loss(tokens, length=LENGTH) * 3 * LENGTH, rel=1e-5)
    assert totals[1] == pytest.approx(expect(model, [0], list(b"scan"))[0], abs=1e-4)
    assert totals[2] == 0
    ragged = " ".join(WORDS)
    [total] = lm.loglikelihood_rolling(ask((ragged,)), disable_tqdm=True)
    ids, expected = list(ragged.encode()), expect(model, [0], list(ragged.encode())[:LENGTH])[0]
    count = len(ids) - LENGTH
    expected += expect(model, ids[:-count][-(LENGTH + 1 - count) :], ids[-count:])[0]  # the last window is full
    assert total == pytest.approx(expected, abs=1e-4)


def test_continuations_are_generated(model, lm):
    prompts = ["window sink", "", "tile dense sparse " * 5]
    whole = lm.generate_until(ask(*[(p, {"max_gen_toks": 6, "until": []}) for p in prompts]), disable_tqdm=True)
    for prompt, continuation in zip(prompts, whole, strict=True):
        ids = np.array(list(prompt.encode()) or [0])[-(LENGTH - 6) :]
        assert continuation == model.generate(ids, 6, temperature=0).text
    stop = whole[0][2:4]
    [stopped] = lm.generate_until(ask((prompts[0], {"max_gen_toks": 6, "until": [stop]})), disable_tqdm=True)
    assert stopped == whole[0][: whole[0].find(stop)]
    settings = {"do_sample": True, "temperature": 1.0, "top_p": 0.9, "max_gen_toks": 6, "until": "\n\n"}
    sampled = lm.generate_until(ask(("scan", settings), ("scan", settings)), disable_tqdm=True)
    for seed, continuation in enumerate(sampled):
        assert continuation == model.generate("scan", 6, top_p=0.9, seed=seed, stop=["\n\n"]).text
    with rejects(InputError, "num_beams"):
        lm.generate_until(ask(("a", {"num_beams": 4})), disable_tqdm=True)
    with rejects(InputError, "max_gen_toks"):
        lm.generate_until(ask(("a", {"max_gen_toks": LENGTH})), disable_tqdm=True)


def test_a_hugging_face_folder_begins_texts_with_its_token(folder):
    lm = harness.SparsejaxLM(str(folder), batch_size="2")
    words = {f"w{i}": 3 + i for i in range(77)}
    pairs = [("w4 w7", " w2 w3"), ("", "w9"), ("w1", " w1")]
    results = lm.loglikelihood(ask(*pairs), disable_tqdm=True)
    for (context, continuation), (value, _) in zip(pairs, results, strict=True):
        ids = [1, *(words[word] for word in context.split())]
        expected, _ = expect(lm.model, ids, [words[word] for word in continuation.split()], lm.max_length)
        assert value == pytest.approx(expected, abs=1e-4)
    [total] = lm.loglikelihood_rolling(ask(("w4 w7 w2",)), disable_tqdm=True)
    assert total == pytest.approx(expect(lm.model, [1], [7, 10, 5], lm.max_length)[0], abs=1e-4)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("path", {"path": "/absent"}),
        ("step", {"step": 3}),
        ("batch_size", {"batch_size": "auto"}),
        ("max_length", {"max_length": -1}),
    ],
)
def test_invalid_arguments(workdir, argument, options):
    with rejects(InputError, argument):
        harness.SparsejaxLM(**{"path": str(workdir)} | options)


def test_a_continuation_that_does_not_fit(lm):
    with rejects(InputError, "max_length"):
        lm.loglikelihood(ask(("a", "b" * (LENGTH + 1))), disable_tqdm=True)


TASKS = {
    "choice": """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
""",
    "rolling": """
task: rolling
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rolling.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
""",
    "until": """
task: until
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/until.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def tasks(model, tmp_path_factory):
    """A folder of tasks with their documents, and the expected metrics."""
    path = tmp_path_factory.mktemp("tasks")
    questions = [
        (f"window {word}", [f" {other}" for other in WORDS[:3]], index % 3) for index, word in enumerate(WORDS)
    ]
    right = 0
    for question, choices, answer in questions:
        scores = [expect(model, question.encode(), choice.encode(), 64)[0] for choice in choices]
        right += int(np.argmax(scores)) == answer
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in questions]
    documents = {"choice": rows, "rolling": [{"text": " ".join(WORDS)[:32]}, {"text": "scan tile"}]}
    answers = [model.generate(question, 6, temperature=0, stop=["."]).text for question in WORDS]
    documents["until"] = [{"question": q, "answer": a} for q, a in zip(WORDS, [*answers[:-1], "other"], strict=True)]
    for name, task in TASKS.items():
        (path / f"{name}.yaml").write_text(task.replace("FOLDER", str(path)))
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in documents[name]))
    texts = [row["text"].encode() for row in documents["rolling"]]
    nats = -sum(expect(model, [0], list(content), 64)[0] for content in texts)
    perplexity = np.exp(nats / sum(map(len, texts)))
    return path, {"choice": right / 6, "rolling": perplexity, "until": 5 / 6}


def check_results(results, expected):
    metrics = {"choice": "acc,none", "rolling": "byte_perplexity,none", "until": "exact_match,none"}
    for task, metric in metrics.items():
        assert results["results"][task][metric] == pytest.approx(expected[task], rel=1e-4), task


def test_tasks_of_local_files(model, tasks, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.tasks import TaskManager

    path, expected = tasks
    results = lm_eval.simple_evaluate(
        harness.SparsejaxLM(model, max_length=64),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(path), include_defaults=False),
        bootstrap_iters=0,
    )
    check_results(results, expected)


def test_the_command(workdir, tasks, tmp_path):
    path, expected = tasks
    arguments = ["run", "--model", "sparsejax", "--model_args", f"path={workdir},step=6,max_length=64"]
    arguments += ["--include_path", path, "--tasks", *TASKS, "--batch_size", "2", "--output_path", tmp_path / "out"]
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "sparsejax.harness", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [file] = (tmp_path / "out").rglob("results_*.json")
    check_results(json.loads(file.read_text()), expected)
