"""Names of two recordings brought together: rules that rename, a wrapper's prefix, and what a reader could write."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from shardproof.errors import UsageError
from shardproof.parallel.names import ROOT

Shapes = Mapping[str, tuple[int, ...]]
"""Parameter name -> shape of the whole."""

SUGGESTED = 6
"""Rules that are suggested at most: a model repeats its layers, so that few rules name all of it."""


@dataclass(frozen=True, slots=True)
class Rule:
    """`model.layers.*=blocks.*`: a name that matches the left side is read as the right side."""

    left: str
    right: str

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Raises `UsageError` where the text is no rule, or the right side has more wildcards than the left."""
        left, equals, right = text.partition("=")
        if not equals or not left or "=" in right:
            raise UsageError(f"map {text!r}: write NAME=NAME, as 'model.layers.*=blocks.*'")
        if right.count("*") > left.count("*"):
            raise UsageError(
                f"map {text!r}: the right side has {right.count('*')} wildcards, the left {left.count('*')}: each * on "
                "the right stands for what the * at the same place on the left matched"
            )
        return cls(left=left, right=right)

    def apply(self, name: str) -> str | None:
        """The new name; None where the rule does not match. A `*` matches any text, dots included."""
        matched = re.fullmatch("(.*)".join(map(re.escape, self.left.split("*"))), name)
        if matched is None:
            return None
        found = iter(matched.groups())
        return re.sub(r"\*", lambda _: next(found), self.right) or ROOT

    def __str__(self) -> str:
        return f"{self.left}={self.right}"


def check(rules: Sequence[Rule], names: Sequence[Collection[str]], parameters: Sequence[Collection[str]]) -> None:
    """Raises `UsageError` for a rule that renames nothing, and for rules that give two parameters of a run one name.

    `names` are all names of each recording, `parameters` those of its parameters.
    """
    every = sorted(set().union(*names)) if rules else []
    for rule in rules:
        if not any(rule.apply(name) is not None for name in every):
            near = difflib.get_close_matches(rule.left, every, n=SUGGESTED, cutoff=0.3) or every[:SUGGESTED]
            raise UsageError(
                f"map '{rule}': neither recording has a name that {rule.left} matches; "
                f"near names: {', '.join(near) or 'there are none'}"
            )
    for own in parameters:
        given: dict[str, str] = {}
        for name in own:
            other = given.setdefault(renamed(name, rules), name)
            if other != name:
                raise UsageError(
                    f"map: {other} and {name} of one run would both be read as {renamed(name, rules)}; write rules "
                    "under which they stay two, the narrower ones first"
                )


def renamed(name: str, rules: Sequence[Rule]) -> str:
    """`name` under the first rule that matches it, or as it is."""
    return next((new for rule in rules if (new := rule.apply(name)) is not None), name)


def without_prefix(got: Shapes, want: Shapes) -> str | None:
    """The one prefix (`model.`) that `got` puts before every name of `want`, same shapes; None if there is none.

    A trainer's wrapper is a module like any other, so that no wrapper type gives it away.
    """
    if not got or len(got) != len(want) or got.keys() == want.keys():
        return None
    first = next(iter(want))
    for name in got:
        prefix = name.removesuffix(first)
        if (
            prefix
            and prefix != name
            and prefix.endswith(".")
            and all(got.get(f"{prefix}{other}") == shape for other, shape in want.items())
        ):
            return prefix
    return None


def suggestions(got: Shapes, want: Shapes) -> list[Rule]:
    """Rules that would make names meet which do not: parameters of equal shapes in the same order, numbers as `*`.

    Nothing is renamed by them: a reader decides.
    """
    pairs = list(_paired(got, want))
    prefixes = {left.removesuffix(right) for left, right in pairs}
    if (
        len(prefixes) == 1
        and (prefix := prefixes.pop()).endswith(".")
        and all(left == prefix + right for left, right in pairs)
    ):
        return [Rule(left=f"{prefix}*", right="*")]
    found: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        left, right = map(_numbers_out, _without_common_end(*pair))
        if left.count("*") >= right.count("*"):
            found[left].add(right)
    # A left side that would stand for several right ones is no rule; the longest first, as the first that matches wins.
    rules = [Rule(left=f"{left}*", right=f"{rights.pop()}*") for left, rights in found.items() if len(rights) == 1]
    return sorted(rules, key=lambda rule: -len(rule.left))[:SUGGESTED]


def _paired(got: Shapes, want: Shapes) -> Iterator[tuple[str, str]]:
    """Names in order, shape by shape: only where both sides have equally many of a shape is the order a guide."""
    by_shape: dict[tuple[int, ...], tuple[list[str], list[str]]] = defaultdict(lambda: ([], []))
    for name in got:
        if name not in want:
            by_shape[got[name]][0].append(name)
    for name in want:
        if name not in got:
            by_shape[want[name]][1].append(name)
    for left, right in by_shape.values():
        if len(left) == len(right):
            yield from zip(left, right, strict=True)


def _without_common_end(left: str, right: str) -> tuple[str, str]:
    """Both names without the last parts that they share, of which at least one part is left."""
    one, two = left.split("."), right.split(".")
    while len(one) > 1 and len(two) > 1 and one[-1] == two[-1] and not one[-1].isdigit():
        one.pop()
        two.pop()
    return ".".join(one), ".".join(two)


def _numbers_out(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
