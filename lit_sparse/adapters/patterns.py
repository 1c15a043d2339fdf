"""Patterns of layer names. Regular expressions are matched in bounded time, since downloaded files may hold them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

from lit_sparse.errors import UsageError

if sys.version_info >= (3, 11):
    from re import _constants as sre  # type: ignore[attr-defined]
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_constants as sre
    import sre_parse as parser

_LONGEST = 2_000  # characters of a pattern with more than names
_MOST_STEPS = 10_000_000  # about ten seconds; a pattern over all 20,000 modules of a large model takes 1,500,000
_NAME = r"(?:[\w.\-]|\\[.\-])+"
# Names, with dots as wildcards: re matches these in linear time.
_PLAIN = re.compile(rf"\^?(?:{_NAME}|\(\?:{_NAME}\))(?:\|(?:{_NAME}|\(\?:{_NAME}\)))*")


def matches_tail(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the whole name or whole trailing parts of it."""
    return f".{name}".endswith(f".{pattern}")


class NamePatterns:
    r"""Matches whole names against regular expressions, with the result of ``re`` and without its backtracking.

    For patterns such as ``(a+)+b``, ``re`` takes time exponential in the length of the name. This class follows all
    paths through a pattern at once and counts its steps.

    Args:
        argument: Name of the argument with the patterns, for messages.
        tails: Whether a pattern may also match the part of a name after any dot: PEFT's ``(.*\.)?(key)$``.
    """

    def __init__(self, argument: str, tails: bool = False) -> None:
        self.argument = argument
        self.tails = tails
        self._matchers: dict[str, Callable[[str], bool]] = {}
        self._steps = 0.0

    def matches(self, pattern: str, name: str) -> bool:
        """Whether ``pattern`` matches all of ``name``.

        Raises:
            UsageError: If the pattern is not valid; uses flags, back-references, word boundaries, look-behind, or
                atomic groups; or if all matches together take too long.
        """
        if pattern not in self._matchers:
            self._matchers[pattern] = self._matcher(pattern)
        self._count((100 + len(name)) / 1000, pattern)  # cost of a plain match
        return self._matchers[pattern](name)

    def _matcher(self, pattern: str) -> Callable[[str], bool]:
        if _PLAIN.fullmatch(pattern):
            plain = re.compile(rf"(?:.*\.)?(?:{pattern})" if self.tails else pattern)
            return lambda name: plain.fullmatch(name) is not None
        if len(pattern) > _LONGEST:
            raise self._refusal(pattern, f"is longer than {_LONGEST} characters")
        try:
            parsed = parser.parse(pattern)
            _require_regular(parsed)
        except (re.error, OverflowError, RecursionError) as error:
            raise self._refusal(pattern, f"is not a valid regular expression: {error}") from error
        except NotImplementedError as error:
            raise self._refusal(pattern, f"uses {error}, which patterns of layer names may not") from None

        def matches(name: str) -> bool:
            starts = {0, *(i + 1 for i, c in enumerate(name) if c == "." and self.tails)}
            return len(name) in self._ends(parsed, name, starts, pattern)

        return matches

    def _ends(self, nodes: Any, name: str, places: set[int], pattern: str) -> set[int]:
        """The positions in ``name`` where ``nodes`` can end if they begin at one of ``places``."""
        for kind, argument in nodes:
            if not places:
                break
            self._count(len(places), pattern)
            if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
                places = self._repeated(argument, name, places, pattern)
            elif kind is sre.SUBPATTERN:
                places = self._ends(argument[-1], name, places, pattern)
            elif kind is sre.BRANCH:
                places = set().union(*(self._ends(branch, name, places, pattern) for branch in argument[1]))
            elif kind in (sre.ASSERT, sre.ASSERT_NOT):
                wanted = kind is sre.ASSERT
                places = {p for p in places if bool(self._ends(argument[1], name, {p}, pattern)) == wanted}
            elif kind is sre.AT:
                places = places & _at(argument, name)
            else:
                places = {p + 1 for p in places if p < len(name) and _fits(kind, argument, name[p])}
        return places

    def _repeated(self, argument: tuple[int, int, Any], name: str, places: set[int], pattern: str) -> set[int]:
        least, most, nodes = argument
        for _ in range(least):
            before, places = places, self._ends(nodes, name, places, pattern)
            if places == before:
                break  # as after every further repetition
        reached, new = set(places), places
        for _ in range(most - least):
            new = self._ends(nodes, name, new, pattern) - reached
            if not new:
                break
            reached |= new
        return reached

    def _count(self, steps: float, pattern: str) -> None:
        self._steps += steps
        if self._steps > _MOST_STEPS:
            raise self._refusal(pattern, "takes too long to match. Give simpler or fewer patterns")

    def _refusal(self, pattern: str, reason: str) -> UsageError:
        shown = pattern if len(pattern) <= 100 else f"{pattern[:100]}…"
        return UsageError(f"{self.argument} {shown!r} {reason}.")


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


def _at(anchor: Any, name: str) -> set[int]:
    """The positions that an anchor allows."""
    if anchor in (sre.AT_BEGINNING, sre.AT_BEGINNING_STRING):
        return {0}
    return {len(name), *([len(name) - 1] if anchor is sre.AT_END and name.endswith("\n") else [])}


def _fits(kind: Any, argument: Any, character: str) -> bool:
    """Whether a node matches one character."""
    if kind is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        return any(_fits(part, value, character) for part, value in argument[negated:]) != negated
    if kind is sre.RANGE:
        return bool(argument[0] <= ord(character) <= argument[1])
    if kind is sre.CATEGORY:
        return _CATEGORIES[argument](character)
    if kind is sre.ANY:
        return character != "\n"
    return bool((ord(character) == argument) == (kind is sre.LITERAL))


def _require_regular(parsed: Any) -> None:
    """Raise NotImplementedError for constructs that need more than the set of positions."""
    if parsed.state.flags & ~re.UNICODE:
        raise NotImplementedError("flags")
    unchecked = [parsed]
    while unchecked:
        for kind, argument in unchecked.pop():
            if kind in (sre.MAX_REPEAT, sre.MIN_REPEAT):
                unchecked.append(argument[2])
            elif kind is sre.SUBPATTERN:
                if argument[1] or argument[2]:
                    raise NotImplementedError("flags")
                unchecked.append(argument[3])
            elif kind is sre.BRANCH:
                unchecked += argument[1]
            elif kind in (sre.ASSERT, sre.ASSERT_NOT):
                if argument[0] < 0:
                    raise NotImplementedError("look-behind")
                unchecked.append(argument[1])
            elif kind is sre.AT and argument in (sre.AT_BOUNDARY, sre.AT_NON_BOUNDARY):
                raise NotImplementedError("word boundaries")
            elif kind not in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN, sre.AT):
                raise NotImplementedError(str(kind).lower().replace("_", " "))
