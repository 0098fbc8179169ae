"""`sparsejax generate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from sparsejax.cli.arguments import add_model, decode_text, load_model, read_file
from sparsejax.errors import InputError
from sparsejax.records import parse_json

EXAMPLE = "sparsejax generate runs/quickstart --prompt='def main(' --tokens=64 --temperature=0.8"
OVERRIDES = ()
EXIT_CODES: dict[type[Exception], int] = {}
RECORDS = ".jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verb."""
    add_model(parser)
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue; can be repeated")
    prompts.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="file of the prompt, or FILE.jsonl with a prompt per line, as a string or in the field prompt; without"
        " either option, the prompt is read from stdin",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=128,
        metavar="N",
        help="largest number of tokens to generate per prompt; defaults to 128",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="divide the logits by X, by default 1; 0 takes the most likely token",
    )
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw from the most likely tokens of probability P"
    )
    parser.add_argument(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="draw from tokens of at least P times the largest probability",
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="divide the positive logits of tokens that are in the text already by X, and multiply negative ones",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; can be repeated"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the first prompt, of which each next prompt adds 1; defaults to 0",
    )
    parser.add_argument(
        "--batch", type=int, default=8, metavar="N", help="number of prompts that are continued together; defaults to 8"
    )
    parser.add_argument(
        "--json", action="store_true", help="print a JSON object per prompt: prompt, text, tokens and reason"
    )
    parser.add_argument("--verbose", action="store_true", help="print the shapes that are compiled to stderr")


def run(options: argparse.Namespace, console: Console) -> None:
    """Continues prompts."""
    if options.batch < 1:
        raise InputError("batch", f"{options.batch} is below 1")
    prompts = _read_prompts(options)
    for prompt in prompts:
        if not prompt:
            raise InputError("prompt", "is empty; start with at least one character")
    model = load_model(options)
    settings = {
        name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    }
    streams = len(prompts) == 1 and not options.json
    for start in range(0, len(prompts), options.batch):
        group = prompts[start : start + options.batch]
        completions = model.generate(
            group,
            options.tokens,
            **settings,
            stop=options.stop,
            seed=options.seed + start,
            on_text=(lambda row, text: print(text, end="", flush=True)) if streams else None,
            on_plan=lambda plan: print(plan, file=sys.stderr) if options.verbose else None,
        )
        if streams:
            print()
            continue
        for prompt, completion in zip(group, completions, strict=True):
            _print_completion(prompt, completion, options.json)


def _print_completion(prompt: str, completion: Any, as_json: bool) -> None:
    if as_json:
        record = {"prompt": prompt, "text": completion.text}
        print(json.dumps(record | {"tokens": completion.tokens.tolist(), "reason": completion.reason}), flush=True)
    else:
        print(f"{prompt}|{completion.text}", flush=True)


def _read_prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt is not None:
        return options.prompt
    if options.prompt_file is None:
        return [decode_text(sys.stdin.buffer.read(), "prompt", "stdin")]
    path, content = options.prompt_file, read_file(options.prompt_file, "prompt_file")
    if not path.endswith(RECORDS):
        return [decode_text(content, "prompt_file", path)]
    prompts = list(_read_records(content, path))
    if not prompts:
        raise InputError("prompt_file", f"{path} has no prompts")
    return prompts


def _read_records(content: bytes, path: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            record = parse_json(line, f"{path}: line {number}")
            prompt = record.get("prompt") if isinstance(record, dict) else record
            if not isinstance(prompt, str):
                raise InputError("prompt_file", f"{path}: line {number}: expected a string, or a field prompt")
            yield prompt
