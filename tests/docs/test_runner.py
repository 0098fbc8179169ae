"""The rules of `tests/docs/runner.py`."""

import pytest

from tests.docs import runner
from tests.docs.runner import BlockError, matches, parse


@pytest.fixture
def run(tmp_path):
    def run(text, nightly=False):
        page, folder = tmp_path / "page.md", tmp_path / "folder"
        page.write_text(text.replace("'''", "```"))
        folder.mkdir(exist_ok=True)
        runner.run(page, folder, nightly)
        return folder

    return run


def test_blocks_share_a_folder_and_a_namespace(run):
    folder = run(
        "'''python\nx = 1\n'''\ntext\n'''sh\necho $((1 + 1)) > two\n'''\n"
        "'''python\nopen('sum', 'w').write(str(x + int(open('two').read())))\n'''\n"
    )
    assert (folder / "sum").read_text() == "3"


def test_a_class_of_the_page_is_in_main(run):
    run(
        "'''python\nimport pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))))\n'''\n"
        "'''text\n<class '__main__.A'>\n'''\n"
    )


@pytest.mark.parametrize(
    "block", ["'''python\n\n1 / 0\n'''", "'''sh\nfalse\ntrue\n'''", "'''sh\nfalse | cat\n'''", "'''sh\necho $x_y\n'''"]
)
def test_a_block_that_fails_fails_the_page(run, block):
    with pytest.raises(BlockError, match=r"page\.md:2: the block failed"):
        run(f"# Page\n{block}\n")


def test_a_traceback_names_the_line_of_the_page(run):
    with pytest.raises(BlockError, match=r'page\.md", line 4'):
        run("# Page\n'''python\n\n1 / 0\n'''\n")


@pytest.mark.parametrize("block", ["'''python\nprint('b')\n'''", "'''sh\necho b\n'''", "'''sh\necho b >&2\n'''"])
def test_an_output_that_differs_fails_the_page(run, block):
    with pytest.raises(BlockError, match=r"expected\na\n\nbut the output is\nb\n"):
        run(f"{block}\n\n'''text\na\n'''\n")


def test_the_expected_output_follows_its_block_directly(run):
    run("'''sh\necho b\n'''\n\nAn illustration:\n\n'''text\na\n'''\n")


def test_numbers_vary_only_where_the_page_says_so(run):
    block = "'''sh\necho 'loss 3.75, 1,024 tokens'\n'''\n"
    right, wrong = (f"'''text\nloss 12.5e-3, {x} tokens\n'''\n" for x in ("7", "few"))
    run(f"{block}<!-- numbers vary -->\n{right}")
    for other in (right, f"<!-- numbers vary -->\n{wrong}"):
        with pytest.raises(BlockError, match="but the output is"):
            run(block + other)


def test_a_titled_block_is_a_file(run):
    folder = run(
        "'''python title=\"package/module.py\"\nX = 3\n'''\n"
        "'''python\nfrom package import module\nassert module.X == 3\n'''\n"
    )
    assert (folder / "package" / "module.py").read_text() == "X = 3\n"


def test_nightly_blocks_and_those_after_them_wait(run, tmp_path):
    text = "'''sh\ntouch a\n'''\n\n<!-- nightly: slow -->\n'''sh\ntouch b\n'''\n'''sh\ntouch c\n'''\n"
    assert sorted(path.name for path in run(text).iterdir()) == ["a"]
    assert [block.nightly for block in parse(text.replace("'''", "```"))] == [None, "slow", "slow"]


def test_the_nightly_tests_run_the_whole_page(run):
    text = "'''sh\ntouch a\n'''\n\n<!-- nightly: slow -->\n'''sh\ntouch b\n'''\n"
    assert sorted(path.name for path in run(text, nightly=True).iterdir()) == ["a", "b"]


def test_a_page_about_a_clone_has_the_folders_of_the_repository(run):
    run("<!-- clone -->\n'''sh\ntest -f experiments/mqar/README.md\n'''\n")


def test_an_indented_block_is_a_block():
    (block,) = parse("!!! note\n\n    ```sh\n    if true; then\n      true\n    fi\n    ```\n")
    assert (block.language, block.code, block.line) == ("sh", "if true; then\n  true\nfi\n", 3)


def test_a_block_without_an_end_is_an_error():
    with pytest.raises(BlockError, match="line 2: the block has no closing fence"):
        parse("\n```sh\ntrue\n")


@pytest.mark.parametrize(
    ("expected", "output", "equal"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\n", "a  \n\n", True),
        ("a\n", "a\nb\n", False),
        ("a\nb\n", "a\n", False),
        ("loss ... bits", "loss 1.5 bits\n", True),
        ("loss ... bits", "loss 1.5\nbits\n", False),
        ("a\n...\nd\n", "a\nb\nc\nd\n", True),
        ("a\n...\nd\n", "a\nd\n", True),
        ("a\n...\nd\n", "a\nb\n", False),
        ("...\n", "", True),
        ("a.c\n", "abc\n", False),
    ],
)
def test_wildcards(expected, output, equal):
    assert matches(expected, output) is equal
