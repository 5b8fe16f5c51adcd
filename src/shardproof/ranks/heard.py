"""What has come back from a call so far, and how long to listen on."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from shardproof.ranks.answer import Answer
from shardproof.ranks.blame import Death

AFTER_A_CAUSE_S = 0.3
"""How long other ranks may take to report the same, so that the lowest rank is named in every run."""
AFTER_AN_ECHO_S = 3.0
"""How long the rank that others have lost may take to say why: it may be writing a core file."""


@dataclass(slots=True)
class Heard:
    """What came back from a call. Ranks still silent after a failure were waiting; without one, they hang."""

    silent: set[int]
    """Ranks that live and have not answered."""
    answers: dict[int, Answer] = field(default_factory=dict)
    deaths: dict[int, Death] = field(default_factory=dict)
    """Rank -> how its process ended."""

    def answer(self, answer: Answer) -> None:
        """One rank has answered."""
        self.answers[answer.rank] = answer
        self.silent.discard(answer.rank)

    def death(self, rank: int, how: Death) -> None:
        """One rank will not answer any more."""
        self.deaths[rank] = how
        self.silent.discard(rank)

    @property
    def trouble(self) -> bool:
        """Whether any rank has failed or died."""
        return bool(self.deaths) or not all(answer.good for answer in self.answers.values())

    def patience(self) -> float:
        """Until when the others are worth waiting for, given what was heard just now (time.monotonic)."""
        if not self.trouble:
            return float("inf")
        bad = [answer for answer in self.answers.values() if not answer.good]
        only_echoes = not self.deaths and all(answer.echo for answer in bad)
        return time.monotonic() + (AFTER_AN_ECHO_S if only_echoes else AFTER_A_CAUSE_S)
