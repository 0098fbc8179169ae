"""Parsing of command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from sparsejax.errors import InputError, suggest
from sparsejax.overrides import Overrides, parse_overrides, read_value
from sparsejax.paths import local_path
from sparsejax.presets import list_presets

if TYPE_CHECKING:
    from sparsejax.loaded import LoadedModel


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of exiting, and whose help ends with an example."""

    def __init__(self, prog: str, description: str, example: str):
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.register("type", int, parse_integer)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses arguments; an unknown option is an error that suggests a known one."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            known = [name for name in self._option_string_actions if name.startswith("--")]
            hint = f"; {suggest(flag, known, 'options')}" if flag.startswith("-") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            hint = suggest(str(value), map(str, action.choices), "choices")
            raise argparse.ArgumentError(action, f"invalid choice {value!r}; {hint}")

    def error(self, message: str) -> NoReturn:
        raise InputError(None, f"{message} (see {self.prog} --help)")

    def render(self, error: InputError) -> str:
        """Renders an error, in which an argument that is an option of this parser is a flag."""
        flag = f"--{(error.argument or '').replace('_', '-')}"
        return f"{flag}: {error.problem}" if flag in self._option_string_actions else str(error)


def read_file(path: str, argument: str) -> bytes:
    """Returns the content of a file; raises InputError if it cannot be read."""
    try:
        return local_path(path, argument).read_bytes()
    except OSError as error:
        raise InputError(argument, f"{path}: {error.strerror}") from error


def decode_text(content: bytes, argument: str, name: str) -> str:
    """Decodes UTF-8; raises InputError about the text `name` if it is another encoding."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise InputError(argument, f"{name}: byte {error.start} is not UTF-8") from None


def split_values(parse: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Returns a parser of values that commas separate."""

    def parse_all(text: str) -> tuple[Any, ...]:
        return tuple(parse(part) for part in text.split(","))

    return parse_all


def parse_integer(text: str) -> int:
    """Parses an integer, also as `1e4` or `1_000`."""
    value = read_value(text, None)
    if type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not int:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer")
    return value


def add_config(parser: argparse.ArgumentParser, group: argparse._ActionsContainer | None = None) -> None:
    """Adds `--config`, required or in a group of alternatives, and the options that change what it defines."""
    (group or parser).add_argument(
        "--config",
        required=group is None,
        metavar="CONFIG",
        help="FILE.py[:ARG], which defines get_config(); hf:FOLDER or run:WORKDIR[@STEP|best], to start from the"
        " weights of a model; or preset:NAME[:ARG]; the presets are " + ", ".join(list_presets()),
    )
    add_overrides(parser, "config", "set a key of the config, such as --config.model.width=256")
    parser.add_argument(
        "--import",
        action="append",
        default=[],
        type=_resolve_import,
        dest="imports",
        metavar="FILE.py|MODULE",
        help="import a file or a module that registers patterns or mixers; can be repeated",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds MODEL and the options that choose one of its checkpoints and its tokenizer."""
    parser.add_argument("model", metavar="MODEL", help="the workdir of a run, or a Hugging Face folder")
    parser.add_argument(
        "--step", type=_parse_step, metavar="N|last|best", help="checkpoint of a workdir; defaults to the last"
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="for a Hugging Face folder: bytes, or a file, instead of that of the folder"
    )


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `add_checkpoint`, and the dtype of the computation."""
    add_checkpoint(parser)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="dtype of the computation and of linear maps and embeddings",
    )


def _parse_step(text: str) -> int | str:
    if text in ("last", "best"):
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor last or best")
    return int(text)


def load_model(options: argparse.Namespace) -> LoadedModel:
    """Loads the model of `add_model`.

    Raises:
      InputError: There is no such model, step or tokenizer.
    """
    from sparsejax.loading import load  # imports grain and Orbax

    return load(options.model, step=options.step, tokenizer=options.tokenizer, dtype=options.dtype)


def _resolve_import(source: str) -> str:
    """The absolute path of a file, which the runs of a sweep import as well, or the name of a module."""
    return str(local_path(source, "import").resolve()) if source.endswith(".py") else source


def add_overrides(parser: argparse.ArgumentParser, section: str, purpose: str) -> None:
    """Adds the help of the options `--SECTION.KEY=VALUE`, which `split_overrides` parses."""
    parser.add_argument(f"--{section}.KEY", metavar="VALUE", default=argparse.SUPPRESS, help=purpose)


def check_overrides(options: argparse.Namespace) -> None:
    """Raises InputError if a key of a config is set without the config."""
    for key in options.overrides.get("config", ()):
        if options.config is None:
            raise InputError(f"--config.{key}", "needs --config")


def split_overrides(arguments: Iterable[str], sections: Sequence[str]) -> tuple[list[str], dict[str, Overrides]]:
    """Separates options such as `--config.KEY=VALUE` or `--config.KEY VALUE`, of each section, from the others.

    Raises:
      InputError: An option has no key or no value; an option that follows it is not its value.
    """
    others: list[str] = []
    texts: dict[str, list[str]] = {section: [] for section in sections}
    remaining = iter(arguments)
    for argument in remaining:
        section = next((section for section in sections if argument.startswith(f"--{section}.")), None)
        if section is None:
            others.append(argument)
            continue
        flag, equals, value = argument.partition("=")
        if not equals:
            value = next(remaining, "--")
            if value.startswith(("--", "=")):
                raise InputError(flag, f"has no value; write {flag}=VALUE")
        if flag == f"--{section}.":
            raise InputError(flag, f"has no key; write {flag}KEY=VALUE")
        texts[section].append(f"{flag.removeprefix(f'--{section}.')}={value}")
    return others, {section: parse_overrides(section_texts) for section, section_texts in texts.items()}
