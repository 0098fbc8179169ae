"""The verbs `generate` and `eval`."""

import io
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import sparsejax
from sparsejax.cli import main, progress
from sparsejax.signals import INTERRUPTED
from sparsejax.workdir import PART, Workdir, read_json
from tests.inference.conftest import GOLDEN
from tests.messages import check_message
from tests.train import runs

PROMPT = "window sink scan tile dense sparse window"
GREEDY = ("--temperature=0", "--tokens=20")


def succeed(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr()


@pytest.fixture(scope="module")
def expected(workdir):
    model = sparsejax.load(workdir)
    return model.generate(PROMPT, 20, temperature=0).text


def test_a_prompt_is_continued(workdir, expected, capsys, monkeypatch, tmp_path):
    printed = succeed(capsys, "generate", workdir, f"--prompt={PROMPT}", *GREEDY, "--verbose")
    assert printed.out == f"{expected}\n"
    assert printed.err == "1 rows, chunks of 1 x 48 tokens, caches for 64 tokens\n"
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert succeed(capsys, "generate", workdir, f"--prompt-file={tmp_path / 'prompt.txt'}", *GREEDY).out == printed.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PROMPT.encode())))
    assert succeed(capsys, "generate", workdir, *GREEDY).out == printed.out
    stop = expected[3:5]
    stopped = succeed(capsys, "generate", workdir, f"--prompt={PROMPT}", *GREEDY, f"--stop={stop}").out
    assert stopped == expected[: expected.find(stop)] + "\n"


def test_prompts_are_continued_in_batches(workdir, expected, capsys, tmp_path):
    prompts = [PROMPT, PROMPT[::-1], PROMPT[:-1] + "s"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts[:2]) + json.dumps(prompts[2]))
    arguments = ("generate", workdir, f"--prompt-file={path}", "--tokens=20", "--seed=3", "--json")
    rows = [json.loads(line) for line in succeed(capsys, *arguments, "--batch=2").out.splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["reason"] == "length" and len(row["tokens"]) == 20 for row in rows)
    third = succeed(capsys, "generate", workdir, f"--prompt={prompts[2]}", "--tokens=20", "--seed=5").out
    assert third == rows[2]["text"] + "\n"
    lines = succeed(capsys, "generate", workdir, f"--prompt={PROMPT}", "--prompt=tile", *GREEDY).out
    assert lines.startswith(f"{PROMPT}|{expected}\ntile|")


def test_a_run_is_evaluated(workdir, capsys, tmp_path):
    result = read_json(Workdir(workdir).result)
    printed = json.loads(succeed(capsys, "eval", workdir, "--json", f"--out={tmp_path / 'out.json'}").out)
    assert printed == read_json(tmp_path / "out.json")
    assert printed["step"] == 6
    metrics = printed["metrics"]
    assert {name: metrics[name] for name in result if name.startswith("eval/")}.items() <= result.items()
    out = succeed(capsys, "eval", workdir, f"--data.files={__file__}", "--data.length=64", "--stride=32").out
    size = Path(__file__).stat().st_size
    assert f"bits/byte over {size - 1:,} bytes" in out
    assert re.search(r"step 6: loss \d\.\d+ nats/token, perplexity \d+\.\d+", out)
    earlier = json.loads(succeed(capsys, "eval", workdir, "--step=4", "--json").out)
    assert earlier["step"] == 4
    assert earlier["metrics"] != metrics


def test_a_hugging_face_folder(folder, capsys, tmp_path):
    (tmp_path / "text.txt").write_text("w1 w2 w3 w9 " * 20)
    assert len(succeed(capsys, "generate", folder, "--prompt=w4 w7", "--tokens=4").out) > 1
    out = succeed(capsys, "eval", folder, f"--data.files={tmp_path / 'text.txt'}", "--data.length=32", "--json").out
    result = json.loads(out)
    assert result["step"] is None
    assert result["tokens"] == 79
    assert result["metrics"]["eval/bits_per_byte"] > 0


def test_an_evaluation_that_is_killed_leaves_nothing(workdir, tmp_path):
    text, out = tmp_path / "text", tmp_path / "out.json"
    text.write_bytes(os.urandom(1 << 14) * 400)
    arguments = ("eval", str(workdir), f"--data.files={text}", "--data.read_as=bytes", f"--out={out}", "--batch=1")
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, INTERRUPTED)):
        out.write_text("previous")
        process = runs.start(*arguments, program=("-c", PROGRAM))
        assert process.stdout.readline() == "batch 3\n"
        process.send_signal(number)
        returned, _, err = runs.finish(process)
        assert returned == code
        assert out.read_text() == "previous"
        assert not list(tmp_path.glob(f"*{PART}"))
        if code == INTERRUPTED:
            assert err.count("\n") == 1
            check_message(err.strip())


PROGRAM = """
import sys
from sparsejax.cli import main, progress
advance = progress.WorkProgress.advance
def announce(self, index, count):
    if index == 3:
        print("batch 3", flush=True)
    advance(self, index, count)
progress.WorkProgress.advance = announce
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def sharded(text, tmp_path_factory):
    """The workdir of a run on eight devices, of a model with 40 learned positions."""
    workdir = tmp_path_factory.mktemp("sharded") / "run"
    settings = {"train.steps": 4, "checkpoint.every": 4, "eval.every": 4, "eval.batches": 1, "eval.batch": 8}
    settings |= {"sharding.data": 2, "sharding.fsdp": 2, "sharding.tensor": 2, "model.embedding.positions": 40}
    options = [f"--config.{name}={value}" for name, value in settings.items()]
    arguments = ("train", f"--config={runs.RECIPE}", f"--config.data.files={text}", *options, f"--workdir={workdir}")
    code, out, err = runs.finish(runs.start(*arguments, devices=8))
    assert code == 0, err
    assert "data 2 x fsdp 2 x tensor 2" in out
    return workdir


def test_one_device_opens_the_checkpoint_of_eight(sharded, capsys):
    result = read_json(Workdir(sharded).result)
    metrics = json.loads(succeed(capsys, "eval", sharded, "--json").out)["metrics"]
    assert metrics["eval/loss"] == pytest.approx(result["eval/loss"], abs=1e-5)
    model = sparsejax.load(sharded)
    assert all(len(leaf.sharding.device_set) == 1 for leaf in jax.tree.leaves(model.parameters))
    printed = succeed(capsys, "generate", sharded, "--prompt=window sink", *GREEDY).out
    tokens = list(b"window sink")
    for _ in range(20):
        tokens.append(int(model.logits(np.array(tokens + [0] * (40 - len(tokens))))[len(tokens) - 1].argmax()))
    assert printed == model.tokenizer.decode(np.array(tokens[11:])) + "\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--prompt=" + "window " * 6),
        ("generate", "--prompt=window", "--tokens=36"),
        ("eval", "--data.length=41"),
    ],
    ids=["prompt", "tokens", "length"],
)
def test_learned_positions_limit_the_length(sharded, arguments, capsys):
    verb, *options = arguments
    assert main([verb, str(sharded), *options]) == 2
    _, err = capsys.readouterr()
    assert err.count("\n") == 1
    check_message(err.strip())


def test_progress_without_a_terminal(workdir, capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    printed = succeed(capsys, "eval", workdir, "--batch=2")
    assert re.search(r"batch 2/\d+ \| ETA 0:00:\d\d\n", printed.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "WORKDIR", "--prompt="),
        ("generate", "WORKDIR", "--prompt=a", "--prompt-file=b"),
        ("generate", "WORKDIR", "--prompt-file=/absent"),
        ("generate", "WORKDIR", "--prompt=a", "--step=3"),
        ("generate", "WORKDIR", "--prompt=a", "--step=first"),
        ("generate", "WORKDIR", "--prompt=a", "--tokens=0"),
        ("generate", "WORKDIR", "--prompt=a", "--seed=-1"),
        ("generate", "WORKDIR", "--prompt=a", "--batch=0"),
        ("generate", "WORKDIR", "--prompt=a", "--top-p=2"),
        ("generate", "WORKDIR", "--prompt=a", "--top-p=0"),
        ("generate", "WORKDIR", "--prompt=a", "--top-k=-1"),
        ("generate", "WORKDIR", "--prompt=a", "--min-p=1.5"),
        ("generate", "WORKDIR", "--prompt=a", "--temperature=-1"),
        ("generate", "WORKDIR", "--prompt=a", "--temperature=nan"),
        ("generate", "WORKDIR", "--prompt=a", "--repetition-penalty=0"),
        ("generate", "WORKDIR", "--prompt-file=BINARY"),
        ("generate", "EMPTY", "--prompt=a"),
        ("generate", "WORKDIR", "--prompt=a", "--stop="),
        ("generate", "WORKDIR", "--prompt=a", "--tokenizer=bytes"),
        ("generate", "/absent", "--prompt=a"),
        ("generate", "TEXT", "--prompt=a"),
        ("generate", "GOLDEN/modernbert", "--prompt=a"),
        ("generate", "GOLDEN/modernbert", "--prompt=a", "--tokenizer=bytes"),
        ("generate", "GOLDEN/mistral_sliding", "--prompt=a"),
        ("generate", "GOLDEN/mistral_sliding", "--prompt=a", "--tokenizer=bytes"),
        ("eval", "/absent"),
        ("eval", "WORKDIR", "--data.files=/absent"),
        ("eval", "WORKDIR", "--data.files=BINARY"),
        ("eval", "WORKDIR", "--batch=0"),
        ("eval", "WORKDIR", "--limit=-1"),
        ("eval", "WORKDIR", "--data.task=mqar"),
        ("eval", "EMPTY"),
        ("eval", "WORKDIR", "--data.fils=a"),
        ("eval", "WORKDIR", "--data.files=a", "--data.validation=b"),
        ("eval", "WORKDIR", "--data.length=16", "--stride=17"),
        ("eval", "WORKDIR", "--stride=-1"),
        ("eval", "WORKDIR", "--step=5"),
        ("eval", "WORKDIR", "--out=/absent/out.json"),
        ("eval", "WORKDIR", "--out=/tmp"),
        ("eval", "GOLDEN/mistral_sliding"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line(arguments, workdir, text, tmp_path, capsys):
    empty = shutil.copytree(workdir, tmp_path / "empty", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "binary").write_bytes(b"\x89PNG\r\n\0\xff")
    names = {"WORKDIR": workdir, "TEXT": text, "GOLDEN": GOLDEN, "EMPTY": empty, "BINARY": tmp_path / "binary"}
    for name, path in names.items():
        arguments = [argument.replace(name, str(path)) for argument in arguments]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    check_message(err.strip())
