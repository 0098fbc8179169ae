"""Writes the generated pages and pictures of the documentation.

python docs/generate.py            # writes them
python docs/generate.py --check    # lists files that differ, and fails if there are any
python docs/generate.py --parity   # measures experiments/parity/table.md first, which takes minutes
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from generators import api, cli, config, figures, gallery, parity, tables  # noqa: E402

REFERENCE = Path("docs/reference")
PAGES = {
    "config.md": config.generate,
    "cli.md": cli.generate,
    "exit_codes.md": cli.generate_exit_codes,
    "patterns.md": tables.generate_patterns,
    "presets.md": tables.generate_presets,
    "workdir.md": tables.generate_workdir,
    "status.md": tables.generate_status,
    "complexity.md": tables.generate_complexity,
    "executed.md": tables.generate_executed,
}


def generate() -> dict[Path, str | bytes]:
    """The content of each generated file, by its path in the repository."""
    pages: dict[Path, str | bytes] = {REFERENCE / name: page() for name, page in PAGES.items()}
    pages |= {REFERENCE / "api" / f"{name}.md": api.generate(name) for name in api.PAGES}
    return pages | gallery.generate() | figures.generate()


def find_differing(files: dict[Path, str | bytes]) -> dict[Path, bytes]:
    """The files whose content in the repository differs."""
    contents = {path: content.encode() if isinstance(content, str) else content for path, content in files.items()}
    return {
        path: content
        for path, content in contents.items()
        if not (ROOT / path).exists() or (ROOT / path).read_bytes() != content
    }


def write(files: dict[Path, str | bytes]) -> None:
    """Writes the files that differ, and prints their paths."""
    for path, content in find_differing(files).items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_bytes(content)
        print(f"wrote {path}")


def main() -> int:
    """Writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    mode.add_argument("--parity", action="store_true", help="measure experiments/parity/table.md first")
    options = parser.parse_args()
    if options.check:
        differing = find_differing(generate())
        print(*(f"{path}: differs" for path in differing), sep="\n", end="\n" * bool(differing))
        return bool(differing)
    if options.parity:
        write({parity.TABLE: parity.measure()})
    write(generate())
    return 0


if __name__ == "__main__":
    sys.exit(main())
