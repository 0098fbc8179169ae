"""Writes the generated pages and pictures of the documentation.

python docs/generate.py           # writes them
python docs/generate.py --check   # lists files that differ, and fails if there are any
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from generators import api, cli, config, tables  # noqa: E402

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
    pages = {REFERENCE / name: page() for name, page in PAGES.items()}
    return pages | {REFERENCE / "api" / f"{name}.md": api.generate(name) for name in api.PAGES}


def main() -> int:
    """Writes or checks the files."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file differs")
    check = parser.parse_args().check
    differing = []
    for path, content in generate().items():
        file, data = ROOT / path, content.encode() if isinstance(content, str) else content
        if not file.exists() or file.read_bytes() != data:
            differing.append(path)
            if not check:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
    for path in differing:
        print(f"{path}: {'differs' if check else 'written'}")
    return int(check and bool(differing))


if __name__ == "__main__":
    sys.exit(main())
