"""What a check found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.table import Table


class CheckFailed(AssertionError):
    """A model or a mixer does not do what its config declares. The message is the first finding that failed."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One property of a model.

    Attributes:
      name: The property, such as "causality" or "receptive field of local".
      passed: Whether it holds; None if it does not apply.
      detail: What was compared and the result, in one line.
    """

    name: str
    passed: bool | None
    detail: str


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The findings about a model.

    Attributes:
      findings: In the order in which they were made.
      length: Tokens per sequence.
      reduced: How the checked copy differs from the model; empty for the model itself.
      seconds: Duration of the check.
    """

    findings: tuple[Finding, ...]
    length: int
    reduced: str
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every property that applies holds."""
        return not any(self.failures)

    @property
    def failures(self) -> Iterator[Finding]:
        """The findings that failed."""
        return (finding for finding in self.findings if finding.passed is False)

    def require(self) -> None:
        """Raises CheckFailed about the first finding that failed."""
        for finding in self.failures:
            raise CheckFailed(f"{finding.name}: {finding.detail}")

    def to_dict(self) -> dict[str, Any]:
        """The certificate with the types of JSON."""
        return {"passed": self.passed} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Certificate:
        """The certificate of `to_dict`, whose values fit `SCHEMA`."""
        findings = tuple(Finding(**finding) for finding in values["findings"])
        return cls(findings, values["length"], values["reduced"], values["seconds"])

    def print(self, console: Console) -> None:
        """Prints a row per finding."""
        table = Table(box=None, pad_edge=False)
        for heading in ("check", "verdict", "detail"):
            table.add_column(heading, overflow="fold")
        for finding in self.findings:
            table.add_row(finding.name, VERDICTS[finding.passed], finding.detail)
        console.print(table)
        if self.reduced:
            console.print(f"checked in a copy: {self.reduced}")
        console.print(f"{'passed' if self.passed else 'FAILED'} at {self.length} tokens in {self.seconds:.1f} s")


# Schema of `Certificate.to_dict`, see `records`.
SCHEMA = {
    "passed": bool,
    "findings": [{"name": str, "passed": (bool, None), "detail": str}],
    "length": int,
    "reduced": str,
    "seconds": float,
}
VERDICTS = {True: "passed", False: "FAILED", None: "-"}
