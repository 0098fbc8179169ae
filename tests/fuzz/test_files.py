"""Damaged files of every kind that is read: each works, or is one line that names a file or a key."""

import base64
import contextlib
import functools
import io
import json
import os
import random
import shutil
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import sparsejax.cli.report
import sparsejax.loading
from sparsejax.cli import LOSS_DIVERGED, USAGE_ERROR, main
from sparsejax.errors import InputError
from tests.fuzz.damage import damage
from tests.fuzz.worker import read_cases, run_cases, run_nightly

pytest.importorskip("pyarrow", reason="needs the extra text")
pytest.importorskip("safetensors", reason="needs the extra interop")
pytest.importorskip("optuna", reason="needs the extra search")

FUZZER = "tests.fuzz.test_files:check"
FOLDER = "SPARSEJAX_FUZZ_FILES"  # variable with the folder of the templates, which the processes share
RECIPE = Path(__file__).parents[1] / "train" / "recipe.py"
GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = ("gemma2", "mamba2", "longformer", "deepseek_v32_dsa", "bigbird_block_sparse", "zamba2")
STEPS = 4
SETTINGS = {
    "train.steps": STEPS,
    "model.schedule": "local",
    "data.length": 16,
    "checkpoint.every": 2,
    "eval.every": 2,
    "eval.sample": 0,
}
TEXTS = {"raw.txt": b"sparse dense window sink scan tile\n" * 60, "notes.md": "größer \u2013 naïve\n".encode() * 80}
TRIALS = 6
# Kinds, and how often each is drawn.
WEIGHTS = {"hf-config": 4, "hf-tensors": 3, "data": 5, "cache": 2, "run": 4, "resume": 1, "load": 3, "sweep": 4}
WEIGHTS |= {"recorded": 5, "search": 4, "program": 1, "doctor": 1}


def test_stored_cases():
    templates()
    failures = run_cases(FUZZER, read_cases("files"))
    assert not failures, failures


@pytest.mark.nightly
def test_damaged_files():
    run_nightly("files", FUZZER, generate, 1_000)


# Templates: a folder per kind.


@functools.cache
def templates() -> Path:
    """The folder of the undamaged files, which is written once."""
    if FOLDER not in os.environ:
        folder = Path(tempfile.mkdtemp(prefix="sparsejax-fuzz-"))
        for kind in WEIGHTS:
            (folder / kind).mkdir()
        _write_hugging_face(folder)
        _write_data(folder / "data")
        _write_runs(folder)
        _write_search(folder / "search")
        for name in ("config", "sweep"):
            shutil.copy(RECIPE, folder / "program" / f"{name}.py")
        (folder / "program" / "sweep.py").write_text(
            "def sweep():\n    return [{'train.seed': 0}, {'train.seed': 1}]\n"
        )
        (folder / "doctor" / "verified.json").write_text(json.dumps({"cpu, jax 0.10.2": ["gather"]}))
        os.environ[FOLDER] = str(folder)
    return Path(os.environ[FOLDER])


def _write_hugging_face(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    for family in FAMILIES:
        target = folder / "hf-config" / family
        target.mkdir()
        shutil.copy(GOLDEN / family / "config.json", target)
    source, whole, parts = GOLDEN / "mistral_sliding", folder / "hf-tensors" / "whole", folder / "hf-tensors" / "parts"
    tensors = load_file(source / "model.safetensors")
    for target in (whole, parts):
        target.mkdir()
        shutil.copy(source / "config.json", target)
    save_file(tensors, whole / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for name, members in shards.items():
        save_file({member: tensors[member] for member in members}, parts / name)
    index = {"metadata": {}, "weight_map": {member: name for name, members in shards.items() for member in members}}
    (parts / "model.safetensors.index.json").write_text(json.dumps(index))


def _write_data(folder: Path) -> None:
    import bz2
    import gzip
    import lzma

    import pyarrow as pa
    import sentencepiece
    import zstandard
    from pyarrow import parquet
    from tokenizers import Tokenizer, models

    texts = [f"sparse window {i} sink scan tile dense {'abc ' * 20}" for i in range(30)]
    records = [{"text": text, "label": i % 3} for i, text in enumerate(texts)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    files = TEXTS | {"records.jsonl": lines, "records.json": json.dumps(records).encode()}
    files |= {"records.jsonl.bz2": bz2.compress(lines), "records.jsonl.xz": lzma.compress(lines)}
    files |= {"records.jsonl.gz": gzip.compress(lines), "raw.txt.zst": zstandard.compress(TEXTS["raw.txt"] * 3)}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    table = pa.table({"text": texts, "label": [i % 3 for i in range(30)]})
    parquet.write_table(table, folder / "records.parquet")
    for name, writer in (("records.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with writer(str(folder / name), table.schema) as output:
            output.write_table(table)
    vocabulary = {chr(i): i for i in range(32, 127)} | {"<unk>": 0, "<|endoftext|>": 1}
    Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=40, model_type="char", minloglevel=2
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _write_runs(folder: Path) -> None:
    from tests.report.workdirs import write_sweep

    values = {("full", "full", 0): 1.0, ("full", "full", 1): 1.1, ("ssm", "ssm", 0): 2.0, ("ssm", "ssm", 1): "planned"}
    write_sweep(folder / "sweep" / "sweep", values)
    text = folder / "text"
    text.mkdir()
    (text / "a.txt").write_bytes(TEXTS["raw.txt"])
    assert _call(["train", *_options(folder, folder / "cache"), f"--workdir={folder / 'run' / 'w'}"]) == 0
    for name in ("resume", "load"):
        shutil.copytree(folder / "run", folder / name, dirs_exist_ok=True)
    shutil.rmtree(folder / "run" / "w" / "checkpoints")
    arguments = ["report", str(folder / "sweep" / "sweep"), str(folder / "run" / "w")]
    assert _call([*arguments, f"--out={folder / 'recorded' / 'out'}"]) == 0
    for path in (folder / "recorded" / "out").iterdir():
        if path.suffix not in (".csv", ".parquet", ".json"):
            path.unlink()


def _write_search(folder: Path) -> None:
    from tests.sweep.test_search import make, run

    run(make(trials=TRIALS), folder)


def _options(folder: Path, cache: Path) -> list[str]:
    settings = SETTINGS | {"data.files": folder / "text", "data.cache": cache}
    return [f"--config={RECIPE}", *(f"--config.{key}={value}" for key, value in settings.items())]


# Cases.


def generate(rng: random.Random) -> dict:
    """A damaged file of a kind."""
    kind = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    paths = sorted(path for path in (templates() / kind).rglob("*") if path.is_file())
    path = rng.choice(paths)
    content = damage(rng, path.name, path.read_bytes())
    return {"kind": kind, "path": str(path.relative_to(templates() / kind)), "content": _pack(content)}


def _pack(content: bytes | None) -> str | None:
    return None if content is None else base64.b85encode(zlib.compress(content, 9)).decode()


# The check.


def check(case: dict) -> None:
    """Raises an exception if a damaged file ends in anything but one line, or changes restored numbers."""
    source = templates()
    with tempfile.TemporaryDirectory(prefix="sparsejax-fuzz-case-") as name:
        folder = Path(name) / case["kind"]
        shutil.copytree(source / case["kind"], folder)
        path = folder / case["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if case["content"] is None:
            path.mkdir()
        else:
            path.write_bytes(zlib.decompress(base64.b85decode(case["content"])))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            READERS[case["kind"]](folder, path)


def _call(command: list[str]) -> int:
    """Runs a command; checks that a failure is one line."""
    output, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        code = main(command)
    lines = errors.getvalue().splitlines()
    assert code in (0, USAGE_ERROR, LOSS_DIVERGED), code
    assert len(lines) == (code != 0), errors.getvalue()
    assert all(line.startswith("sparsejax: ") and len(line) < 2000 for line in lines), lines
    output.getvalue().encode()  # half of a surrogate pair cannot be printed
    errors.getvalue().encode()
    return code


def _read_hf_config(folder: Path, path: Path) -> None:
    _call(["show", f"--hf={path.parent}"])


def _read_tensors(folder: Path, path: Path) -> None:
    from sparsejax.interop import huggingface

    with contextlib.suppress(InputError):
        huggingface.load(path.parent)


def _read_data(folder: Path, path: Path) -> None:
    options = [f"--config={RECIPE}", "--config.data.length=16"]
    if path.name.startswith("tokenizer"):
        options += [f"--config.data.tokenizer={path}", "--config.model.vocab=300"]
        path = folder / "raw.txt"
    field = ["--config.data.field=text"] * path.name.startswith("records")
    _call(["data", "show", *options, *field, f"--config.data.files={path}"])


def _read_cache(folder: Path, path: Path) -> None:
    _call(["data", "show", *_options(templates(), folder)])


def _read_run(folder: Path, path: Path) -> None:
    _call(["report", str(folder / "w")])


def _resume(folder: Path, path: Path) -> None:
    _call(["train", *_options(templates(), templates() / "cache"), f"--workdir={folder / 'w'}"])


def _load(folder: Path, path: Path) -> None:
    try:
        model = sparsejax.load(folder / "w")
    except InputError:
        return
    expected = _parameters()
    if model.config == expected.config and model.step == expected.step:
        import jax

        for value, intact in zip(*map(jax.tree.leaves, (model.parameters, expected.parameters)), strict=True):
            np.testing.assert_array_equal(value, intact)


@functools.cache
def _parameters():
    return sparsejax.load(templates() / "load" / "w")


def _read_sweep(folder: Path, path: Path) -> None:
    _report(folder / "sweep", folder / "out")


def _read_recorded(folder: Path, path: Path) -> None:
    source = folder / "out"
    _report(path if path.name.startswith("results") else source, folder / "page")


def _report(source: Path, out: Path) -> None:
    if _call(["report", str(source), f"--out={out}"]) == 0:
        for picture in out.rglob("*.svg"):
            ElementTree.parse(picture)
        for page in out.rglob("*.html"):
            page.read_text()
        assert _call(["report", str(out)]) == 0  # what was written can be read


def _read_search(folder: Path, path: Path) -> None:
    from sparsejax.sweep.search import run_search
    from tests.sweep.test_search import Simulated, make

    with contextlib.suppress(InputError, OSError):
        run_search(make(trials=TRIALS), folder, Simulated(), Console(file=io.StringIO(), width=300))


def _run_program(folder: Path, path: Path) -> None:
    if path.name == "config.py":
        _call(["show", f"--config={path}"])
    else:
        options = [f"--config={folder / 'config.py'}", f"--sweep={path}", f"--workdir={folder / 's'}"]
        _call(["sweep", *options, f"--config.data.files={templates() / 'text'}", "--print"])


def _read_doctor(folder: Path, path: Path) -> None:
    from sparsejax.ops import verification

    with contextlib.suppress(OSError):
        verification._read_records.__wrapped__(path)


READERS = {
    "hf-config": _read_hf_config,
    "hf-tensors": _read_tensors,
    "data": _read_data,
    "cache": _read_cache,
    "run": _read_run,
    "resume": _resume,
    "load": _load,
    "sweep": _read_sweep,
    "recorded": _read_recorded,
    "search": _read_search,
    "program": _run_program,
    "doctor": _read_doctor,
}
