"""Prints the table of presets: parameters, active parameters, and the size of the cache at 256K tokens.

    python scripts/tabulate_presets.py

The script builds shapes and allocates no parameters; it takes seconds.
"""

from __future__ import annotations

import ast
import re

from train_presets import CONFIGS, list_presets

from sparsejax import config as configs
from sparsejax.account import account_model

LENGTH = 262_144
HEADING = ("config", "model", "sizes from", "parameters", "active", "cache at 256K")


def tabulate(name: str) -> tuple[str, ...]:
    """Returns the row of a preset."""
    path = CONFIGS / f"{name}.py"
    model = configs.check(configs.load(str(path))).model
    layers, ends = account_model(model, LENGTH if model.causal else 1)
    total = sum(layers, ends)
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    source = re.search(r"Sizes:\s(arXiv:[\d.]*\d)?", docstring)[1] or "config.json"
    active = _round(total.active_parameters) if total.active_parameters < total.parameters else "all"
    cache = f"{total.cache_bytes / 2**30:.2f} GiB" if model.causal else "-"
    return f"`{name}.py`", docstring.splitlines()[0].removesuffix("."), source, _round(total.parameters), active, cache


def _round(count: int) -> str:
    return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


def main() -> None:
    """Prints the table in Markdown."""
    print("|", " | ".join(HEADING), "|")
    print("| --- | --- | --- | ---: | ---: | ---: |")
    for name in list_presets():
        print("|", " | ".join(tabulate(name)), "|")


if __name__ == "__main__":
    main()
