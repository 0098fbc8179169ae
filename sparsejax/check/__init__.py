"""The certificate of a model: that it does what its schedule declares, on the program that runs.

`check_model` takes random parameters and compares causality, receptive fields, documents and padding, decoding, scanned
layers, implementations and the account with what the config states.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from sparsejax.check.account import check_account
from sparsejax.check.agreement import check_agreement
from sparsejax.check.certificate import Certificate, CheckFailed, Finding
from sparsejax.check.influence import check_causality, check_documents, check_receptive_fields
from sparsejax.check.reduce import choose_length, reduce
from sparsejax.check.subject import Subject
from sparsejax.config import ModelConfig

__all__ = ["CHECKS", "Certificate", "CheckFailed", "Finding", "check_model"]

Check = Callable[[Subject], Iterator[Finding]]
CHECKS: tuple[Check, ...] = (
    check_causality,
    check_receptive_fields,
    check_documents,
    check_agreement,
    check_account,
)


def check_model(
    config: ModelConfig, length: int | None = None, *, seed: int = 0, report: Callable[[Finding], None] | None = None
) -> Certificate:
    """Checks a model with random parameters.

    Args:
      config: The model. A large one is checked in a copy of smaller widths, see `Certificate.reduced`.
      length: Largest number of tokens per sequence; by default a length that crosses every edge of the patterns.
      seed: Seed of parameters and tokens.
      report: Called with each finding as it is made.
    """
    start = time.perf_counter()
    copy, reduced = reduce(config)
    subject = Subject(copy, choose_length(copy, length), seed)
    findings = []
    for check in CHECKS:
        for finding in check(subject):
            findings.append(finding)
            if report is not None:
                report(finding)
    return Certificate(tuple(findings), subject.length, reduced, time.perf_counter() - start)
