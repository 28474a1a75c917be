"""What `accelerate` did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Report:
    """What `accelerate` did to a model.

    Attributes:
        converted: names of the modules that run our kernels now, "" for the model itself.
        skipped: for each block that was left as it was, by its name, the reason.
        hosts: for each converted module, by its name, library and class.
    """

    converted: tuple[str, ...]
    skipped: Mapping[str, str]
    hosts: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} modules accelerated"]
        lines += [f"  {count} {host}" for host, count in Counter(self.hosts.values()).items()]
        if self.skipped:
            lines.append(f"{len(self.skipped)} left as they were")
            lines += [f"  {name or 'the model itself'}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)
