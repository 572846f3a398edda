"""A rule is data: a name, a title, a condition over the steps so far, and words. Where the condition holds there is a finding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from grpo_jax.run.doctor.history import Evidence, RunHistory


@dataclass(frozen=True)
class Sign:
    """What a condition has found.

    Attributes:
        kind: which of the rule's words apply.
        evidence: the numbers.
    """

    kind: str
    evidence: tuple[Evidence, ...]


@dataclass(frozen=True)
class Words:
    """What is said of a sign.

    Attributes:
        cause: what usually is the cause.
        fix: the settings to change; `{optim.learning_rate:g}` is replaced by the setting's value.
    """

    cause: str
    fix: str


@dataclass(frozen=True)
class Rule:
    """A way in which a run goes wrong.

    Attributes:
        name: as in `train.stop_on`.
        title: what findings are listed under.
        condition: the signs in a run so far; none where it is healthy.
        words: by the kind of sign.
    """

    name: str
    title: str
    condition: Callable[[RunHistory], Sequence[Sign]]
    words: Mapping[str, Words]


@dataclass(frozen=True)
class Finding:
    """Something that goes wrong in a run.

    Attributes:
        name: of the rule.
        title: of the rule.
        kind: of the sign.
        evidence: the numbers.
        cause: what usually is the cause.
        fix: the settings to change.

    Example:
        Finding("kl_explosion", "KL explosion", "high", (Evidence("kl_divergence", ((56, 60),), (3.1,)),), "...", "...")
    """

    name: str
    title: str
    kind: str
    evidence: tuple[Evidence, ...]
    cause: str
    fix: str

    @property
    def numbers(self) -> str:
        """The evidence on one line."""
        return "; ".join(map(str, self.evidence))

    def to_json(self) -> dict[str, Any]:
        """As a dict that JSON can hold."""
        text = {"name": self.name, "title": self.title, "kind": self.kind, "evidence": [str(one) for one in self.evidence]}
        return text | {"cause": self.cause, "setting": self.fix, "values": [asdict(one) for one in self.evidence]}


def diagnose(rules: Sequence[Rule], history: RunHistory) -> list[Finding]:
    """Applies rules to a run so far; returns the findings in the order of the rules."""
    sections = vars(history.config)
    return [
        Finding(
            rule.name,
            rule.title,
            sign.kind,
            sign.evidence,
            rule.words[sign.kind].cause.format(**sections),
            rule.words[sign.kind].fix.format(**sections),
        )
        for rule in rules
        for sign in rule.condition(history)
    ]
