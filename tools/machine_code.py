"""Machine code as cuobjdump lists it: instructions, loops and paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\d+\s+)?([A-Z0-9_.]+)([^;]*);")
# Instructions that end a path; RET and BRX go where the text does not say.
_ENDS = ("EXIT", "RET", "BRX", "JMX")
# An integer division, signed or not, is a reciprocal in floating point and its correction; one of 64 bits is a call.
_RECIPROCAL = "MUFU.RCP"


@dataclass(frozen=True)
class Instruction:
    """One instruction: its address, its predicate or "", its name with all suffixes, its operands."""

    address: int
    predicate: str
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        """Where a branch goes; None for other instructions."""
        if self.name.split(".")[0] not in ("BRA", "JMP"):
            return None
        found = re.search(r"0x([0-9a-f]+)", self.operands)
        return int(found.group(1), 16) if found else None


@dataclass(frozen=True)
class Loop:
    """A natural loop: the numbers of its blocks, the first one, and its instructions."""

    blocks: frozenset[int]
    head: int
    instructions: tuple[Instruction, ...]

    def count(self, name: str) -> int:
        """Instructions whose names begin so."""
        return count(self.instructions, name)


def count(instructions: Iterable[Instruction], name: str) -> int:
    """Instructions whose names begin so."""
    return sum(each.name.startswith(name) for each in instructions)


def divisions(instructions: Iterable[Instruction]) -> int:
    """Integer divisions by numbers that the compiler did not know."""
    return sum(each.name.startswith(_RECIPROCAL) or each.name.startswith("CALL") for each in instructions)


def parse(sass: str) -> list[Instruction]:
    """The instructions of one function in cuobjdump's listing; the padding behind its end is left out.

    Examples:
        >>> from tools.machine_code import parse
        >>> [one] = parse("        /*0010*/  @!P0 BRA 0x40 ;   /* 0x0000 */")
        >>> one.name, one.target, one.predicate
        ('BRA', 64, '@!P0')
    """
    found = [
        Instruction(int(address, 16), (predicate or "").strip(), name, operands.strip())
        for address, predicate, name, operands in _LINE.findall(sass)
    ]
    while found and (found[-1].name == "NOP" or found[-1].target == found[-1].address):
        found.pop()
    return found


class Code:
    """A function's basic blocks and what leads where.

    Args:
        sass: its listing, as ``compile_cuda.functions_of`` returns it.
    """

    def __init__(self, sass: str) -> None:
        self.instructions = parse(sass)
        starts = {self.instructions[0].address} if self.instructions else set()
        for one, following in zip(self.instructions, self.instructions[1:], strict=False):
            if one.target is not None or one.name.split(".")[0] in _ENDS:
                starts.add(following.address)
            if one.target is not None:
                starts.add(one.target)
        self.blocks: list[list[Instruction]] = []
        for one in self.instructions:
            if one.address in starts:
                self.blocks.append([])
            self.blocks[-1].append(one)

    @cached_property
    def successors(self) -> list[list[int]]:
        """The blocks that may follow each block."""
        number = {block[0].address: i for i, block in enumerate(self.blocks)}
        following = []
        for i, block in enumerate(self.blocks):
            last = block[-1]
            to = [number[last.target]] if last.target in number else []
            # A branch without a predicate of its own may still have one among its operands.
            ends = last.name.split(".")[0] in _ENDS or (last.target is not None and "P" not in last.operands)
            if (last.predicate or not ends) and i + 1 < len(self.blocks):
                to.append(i + 1)
            following.append(to)
        return following

    @cached_property
    def dominators(self) -> list[set[int]]:
        """Of each block, those that every path from the entry to it goes through; empty where there is no path."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for i, to in enumerate(self.successors):
            for j in to:
                before[j].append(i)
        reached, open_ = {0}, [0]
        while open_:
            for j in self.successors[open_.pop()]:
                if j not in reached:
                    reached.add(j)
                    open_.append(j)
        found = [set(reached) if i in reached else set() for i in range(len(self.blocks))]
        found[0] = {0}
        changed = True
        while changed:
            changed = False
            for i in sorted(reached - {0}):
                paths = [found[j] for j in before[i] if j in reached]
                now = {i} | set.intersection(*paths)
                if now != found[i]:
                    found[i], changed = now, True
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """All natural loops, the smallest first."""
        before: list[list[int]] = [[] for _ in self.blocks]
        for i, to in enumerate(self.successors):
            for j in to:
                before[j].append(i)
        bodies: dict[int, set[int]] = {}
        for i, to in enumerate(self.successors):
            for head in to:
                if head not in self.dominators[i]:
                    continue
                body, open_ = bodies.setdefault(head, {head}), [i]
                while open_:
                    block = open_.pop()
                    if block not in body:
                        body.add(block)
                        open_ += [j for j in before[block] if self.dominators[j]]
        found = [
            Loop(frozenset(body), head, tuple(one for i in sorted(body) for one in self.blocks[i]))
            for head, body in bodies.items()
        ]
        return sorted(found, key=lambda loop: len(loop.instructions))

    def innermost(self, wanted: Callable[[Instruction], bool]) -> Loop | None:
        """The smallest of the loops that hold the most of the wanted instructions outside of loops of their own."""
        best, most = None, 0
        for loop in self.loops:
            inner = [other for other in self.loops if other.blocks < loop.blocks]
            own = loop.blocks - frozenset().union(*(other.blocks for other in inner))
            number = sum(wanted(one) for i in own for one in self.blocks[i])
            if number > most:
                best, most = loop, number
        return best

    def path(
        self,
        first: int,
        last: int | None,
        within: frozenset[int] | None = None,
        wanted: Callable[[Instruction], bool] = lambda one: False,
        enough: int = 1 << 20,
        longest: bool = False,
    ) -> int:
        """Instructions on the way from the start of a block to the start of another one, or to any end.

        Of all ways that with the most wanted instructions, and of those the shortest. Loops on the way are gone
        through once.

        Args:
            first: number of the first block.
            last: number of the block before which the way ends; None: where nothing follows.
            within: the blocks to stay in; None: all.
            wanted: which instructions the way should have.
            enough: more wanted instructions than these count for nothing.
            longest: the longest of the ways instead.

        Raises:
            ValueError: if there is no way.
        """
        known: dict[int, tuple[int, int] | None] = {}
        sign = 1 if longest else -1

        def visit(i: int, above: frozenset[int]) -> tuple[int, int] | None:
            if i in known:
                return known[i]
            here, ends = above | {i}, [(0, 0)] if last is None and not self.successors[i] else []
            for j in self.successors[i]:
                if j == last:
                    ends.append((0, 0))
                elif j not in here and (within is None or j in within) and (end := visit(j, here)) is not None:
                    ends.append(end)
            found = sum(map(wanted, self.blocks[i]))
            scores = [(min(enough, found + count), sign * len(self.blocks[i]) + length) for count, length in ends]
            known[i] = max(scores) if scores else None
            return known[i]

        best = visit(first, frozenset())
        if best is None:
            raise ValueError(f"path(): expected `last` to be reached from {first}, got {last}.")
        return sign * best[1]

    def before(self, loop: Loop) -> list[Instruction]:
        """The instructions that may run before a loop is entered, and not after it."""
        behind, open_ = {loop.head}, [loop.head]
        while open_:
            for j in self.successors[open_.pop()]:
                if j not in behind:
                    behind.add(j)
                    open_.append(j)
        return [one for i, block in enumerate(self.blocks) if i not in behind and self.dominators[i] for one in block]
