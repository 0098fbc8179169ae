"""The command `lm_eval`, which knows the model `sparsejax`."""

from lm_eval.__main__ import cli_evaluate

import sparsejax.harness  # noqa: F401 (registers the model)

if __name__ == "__main__":
    cli_evaluate()
