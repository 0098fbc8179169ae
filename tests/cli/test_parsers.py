"""The parsers of the verbs: what their help says, and that its examples are valid."""

import argparse
import shlex

import pytest

import sparsejax
from sparsejax.cli import VERBS, build_parser, main
from sparsejax.cli.arguments import split_overrides
from sparsejax.presets import list_presets

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("name", VERBS)
def test_every_option_is_described(name):
    for action in build_parser(name)._actions:
        assert action.help, action.dest
        flags = " ".join(action.option_strings) or action.metavar
        assert not action.help.endswith("."), f"{flags}: a phrase, not a sentence"
        takes_value = action.nargs != 0
        assert not takes_value or action.metavar or action.choices, f"{flags}: the value has no name"


@pytest.mark.parametrize("name", VERBS)
def test_the_example_is_valid(name):
    parser = build_parser(name)
    program, *arguments = shlex.split(parser.epilog.partition("example:\n")[2])
    assert program == "sparsejax"
    assert arguments[: len(name.split())] == name.split()
    others, _ = split_overrides(arguments[len(name.split()) :], ("config", "data", "slurm"))
    parser.parse_args(others)


@pytest.mark.parametrize("group", ["", "data"])
def test_the_index_lists_its_verbs(group, capsys):
    with pytest.raises(SystemExit) as end:
        main([*group.split(), "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for name, purpose in VERBS.items():
        line = f"  {name.removeprefix(group).strip():<12}{purpose}\n"
        assert (line in out) == name.startswith(group)


def test_the_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"sparsejax {sparsejax.__version__}\n"


@pytest.mark.parametrize("name", ["train", "show", "data show", "draw", "sweep", "search"])
def test_verbs_of_a_config_share_its_options(name):
    actions = {flag: action for action in build_parser(name)._actions for flag in action.option_strings}
    assert set(actions) >= {"--config", "--config.KEY", "--import"}
    assert ", ".join(list_presets()) in actions["--config"].help
    assert isinstance(actions["--import"], argparse._AppendAction)


@pytest.mark.parametrize(
    ("arguments", "overrides"),
    [
        (["--config.a.b=1"], {"a.b": "1"}),
        (["--config.a.b", "1"], {"a.b": "1"}),
        (["--config.a", "-1"], {"a": "-1"}),
        (["--config.a", "-x"], {"a": "-x"}),
        (["--config.a=--b"], {"a": "--b"}),
        (["--config.a="], {"a": ""}),
        (["--config.a", ""], {"a": ""}),
        (["--config.a=b=c"], {"a": "b=c"}),
        (["--config.a=1", "--config.a=2"], {"a": "2"}),
    ],
)
def test_overrides_are_separated(arguments, overrides):
    others, sections = split_overrides(["first", *arguments, "--last=1"], ("config", "slurm"))
    assert others == ["first", "--last=1"]
    assert sections == {"config": overrides, "slurm": {}}


@pytest.mark.parametrize("text", ["10000", "1e4", "1_0000", "10000.0", " 10000"])
def test_integers(text):
    parser = build_parser("draw")
    assert parser.parse_args(["causal", f"--length={text}"]).length == 10_000
