"""A finding of `fiddler-opt doctor`."""

from dataclasses import dataclass
from typing import Literal

from rich.console import Console

COLORS = {"stops": "red", "slow": "yellow", "ok": "green"}  # worst first


@dataclass(frozen=True)
class Finding:
    """A finding. `stops`: the model cannot run here. `slow`: it runs slower than it could."""

    kind: Literal["ok", "slow", "stops"]
    what: str
    remedy: str | None = None


def stops(findings: list[Finding]) -> bool:
    """True if the model cannot run here."""
    return any(finding.kind == "stops" for finding in findings)


def print_findings(console: Console, findings: list[Finding]) -> None:
    """Prints one line per finding, the worst first."""
    for kind, color in COLORS.items():
        for finding in findings:
            if finding.kind == kind:
                remedy = f"; {finding.remedy}" if finding.remedy else ""
                line = f"{kind:5}  {finding.what}{remedy}"
                console.print(line, style=color, markup=False, highlight=False, soft_wrap=True)
