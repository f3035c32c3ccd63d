"""Find the smallest set of switches that makes a run equal, with few runs.

A question is a set of switches to flip; the answer says whether the run is then equal to the reference. Nearly always
answers are monotone: equal exactly when all culprits are flipped, and flipping more does no harm. Then culprits are
found by halving, as QuickXplain does (U. Junker, AAAI 2004): k of n switches in at most 2 k (log2(n / k) + 1)
questions. Answers that are not monotone (two errors that cancel) are noticed, because the set that was found is asked
for itself; ddmin (A. Zeller and R. Hildebrandt, IEEE TSE 28(2), 2002) takes over then.

The set returned is 1-minimal: it is equal, and without any single one of its members it is not. For monotone answers
it is the only such set, so the smallest; otherwise a smaller one may exist elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache

Equal = Callable[[frozenset[str]], bool]


class NotExplained(Exception):
    """Even with all switches flipped the run is not equal."""


def find_switches(
    equal: Callable[[set[str]], bool],
    switches: Sequence[str],
    needed: Collection[str] = (),
    harmless: Collection[str] = (),
) -> set[str]:
    """A 1-minimal set of switches with ``equal(set)``.

    Args:
        equal: whether a run with exactly these switches flipped equals the reference. Asked once per set.
        switches: all of them, likely culprits first.
        needed: those without which all others do not suffice.
        harmless: those without which all others do suffice. Both sets are what flips of one switch tell; they save
            questions, and may be wrong or empty.

    Raises:
        NotExplained: flipping all of them is not enough.
    """
    ask = cache(lambda flipped: bool(equal(set(flipped))))
    if not ask(frozenset(switches)):
        raise NotExplained
    found = _start(ask, switches, frozenset(needed), frozenset(harmless))
    if ask(found):
        return set(_one_minimal(ask, found, switches))
    return set(ddmin(ask, switches))


def _start(ask: Equal, switches: Sequence[str], needed: frozenset[str], harmless: frozenset[str]) -> frozenset[str]:
    """The set that follows if answers are monotone."""
    if ask(needed):
        return needed
    open_questions = [s for s in switches if s not in needed and s not in harmless]
    if not ask(needed | frozenset(open_questions)):  # of two harmless ones, one may have to be flipped
        open_questions = [s for s in switches if s not in needed]
    return needed | _culprits(ask, needed, False, open_questions)


def _culprits(ask: Equal, base: frozenset[str], fresh: bool, among: Sequence[str]) -> frozenset[str]:
    """Those of ``among`` that are needed beside ``base``, of which it is known that base | among is equal.

    ``fresh``: base has just grown, so it may suffice now.
    """
    if not among or (fresh and ask(base)):
        return frozenset()
    if len(among) == 1:
        return frozenset(among)
    first, second = among[: len(among) // 2], among[len(among) // 2 :]
    later = _culprits(ask, base | frozenset(first), True, second)
    return later | _culprits(ask, base | later, bool(later), first)


def _one_minimal(ask: Equal, found: frozenset[str], switches: Sequence[str]) -> frozenset[str]:
    """Drop members, the least likely first, until none can go."""
    dropped = True
    while dropped:
        dropped = False
        for switch in reversed([s for s in switches if s in found]):
            if ask(found - {switch}):
                found, dropped = found - {switch}, True
    return found


def ddmin(ask: Equal, switches: Sequence[str]) -> frozenset[str]:
    """A 1-minimal equal subset of ``switches``, which are equal together; any kind of answers will do."""
    found, parts = list(switches), 2
    while len(found) > 1:
        cuts = [len(found) * i // parts for i in range(parts + 1)]
        pieces = [found[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        rests = [[s for s in found if s not in piece] for piece in pieces]
        piece = next((p for p in pieces if ask(frozenset(p))), None)
        rest = next((r for r in rests if ask(frozenset(r))), None) if piece is None else None
        if piece is not None:
            found, parts = piece, 2
        elif rest is not None:
            found, parts = rest, max(parts - 1, 2)
        elif parts == len(found):
            break
        else:
            parts = min(2 * parts, len(found))
    return frozenset() if ask(frozenset()) else frozenset(found)
