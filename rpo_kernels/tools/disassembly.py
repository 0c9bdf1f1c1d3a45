"""Loops of a compiled kernel, from its instructions: SASS of NVIDIA, GCN assembly of AMD.

    for loop in loops(code):
        print(loop.accesses, loop.exponentials, loop.issued)

Counts are static: each instruction counts once per iteration, even if its predicate or a branch
skips it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

# Operation and operands, after an address and a predicate: "/*0100*/ @!P0 BRA `(.L_x_0) ;",
# "s_cbranch_scc0 .LBB0_9".
_SASS = re.compile(
    r"\s*/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@!?U?P\w+\s+)?"
    r"(?P<operation>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_GCN = re.compile(
    r"\t(?P<operation>[sv]_\w+|(?:global|buffer|flat|ds|scratch)_\w+)(?P<operands>[^;]*)"
)
_LABEL = re.compile(r"(\.L\w+):")


@dataclass(frozen=True)
class Loop:
    """The instructions of one iteration, without those of inner loops."""

    operations: tuple[str, ...]
    innermost: bool = True

    @cached_property
    def accesses(self) -> Counter[tuple[str, int]]:
        """Accesses to global memory, by (`"load"` or `"store"`, bytes per thread)."""
        return Counter(filter(None, map(_access, self.operations)))

    def moved(self, kind: str) -> int:
        """Return the bytes that a thread loads or stores per iteration."""
        return sum(width * count for (what, width), count in self.accesses.items() if what == kind)

    def narrowest(self, kind: str) -> int:
        """Return the bytes of a thread's narrowest access, or 0."""
        return min((width for what, width in self.accesses if what == kind), default=0)

    def widest(self, kind: str) -> int | None:
        """Return the bytes of a thread's widest access, or None."""
        return max((width for what, width in self.accesses if what == kind), default=None)

    @property
    def spills(self) -> int:
        """Accesses to memory that stands for registers."""
        return sum(x.startswith(("LDL", "STL", "scratch_")) for x in self.operations)

    @property
    def exponentials(self) -> int:
        return sum(x.startswith(("MUFU.EX2", "v_exp_")) for x in self.operations)

    @property
    def special(self) -> int:
        """Instructions of the unit for exponentials, logarithms, reciprocals and roots."""
        return sum(
            bool(re.match(r"MUFU\.|v_(exp|log|rcp|rsq|sqrt|sin|cos)_", x)) for x in self.operations
        )

    @property
    def issued(self) -> int:
        """Instructions that take a vector issue slot.

        These are all of NVIDIA's, and `v_*` of AMD's, whose scalar ones use another port.
        """
        return sum(
            not x.startswith(("s_", "global_", "buffer_", "flat_", "ds_")) for x in self.operations
        )


@dataclass
class _Block:
    operations: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)  # labels that it may branch to
    falls_through: bool = True


def loops(code: str) -> list[Loop]:
    """Return every loop of a kernel, outer loops before inner ones."""
    import networkx  # comes with torch

    blocks, place = _blocks(code)
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(blocks)))
    for i, block in enumerate(blocks):
        graph.add_edges_from((i, place[target]) for target in block.targets if target in place)
        if block.falls_through and i + 1 < len(blocks):
            graph.add_edge(i, i + 1)
    bodies = _bodies(graph, set(graph), networkx.strongly_connected_components)
    return [
        Loop(tuple(x for i in sorted(body) for x in blocks[i].operations), innermost)
        for body, innermost in bodies
    ]


def _bodies(
    graph: Any, nodes: set[int], components: Callable[[Any], Iterable[set[int]]]
) -> Iterator[tuple[set[int], bool]]:
    """Yield the blocks of each loop without those of inner loops, and whether there are none."""
    view = graph.subgraph(nodes)
    for cycle in list(components(view)):
        if len(cycle) == 1 and not view.has_edge(*2 * tuple(cycle)):
            continue
        entries = {v for v in cycle for u in graph.predecessors(v) if u not in cycle} or {
            min(cycle)
        }
        inner = list(_bodies(graph, cycle - entries, components))
        yield cycle.difference(*(body for body, _ in inner)), not inner
        yield from inner


def _blocks(code: str) -> tuple[list[_Block], dict[str, int]]:
    """Split code into basic blocks, in order; return them and the block of each label."""
    blocks, place = [_Block()], {}
    instruction = _SASS if "/*0000*/" in code else _GCN
    for line in code.splitlines():
        if label := _LABEL.match(line):
            # no empty block: after a branch it would be a predecessor that is never executed
            if blocks[-1].operations:
                blocks.append(_Block())
            place[label[1]] = len(blocks) - 1
        elif found := instruction.match(line):
            operation, block = found["operation"], blocks[-1]
            block.operations.append(operation)
            ends = bool(re.match(r"EXIT|RET|s_endpgm", operation))
            if re.match(r"BRA|s_c?branch", operation):
                block.targets += re.findall(r"\.L\w+", found["operands"])
                # `BRA.U UP0, ...`, `BRA P0, ...` and s_cbranch_* may fall through, like a
                # predicated BRA
                ends = not re.search(r"\bU?P\d", found["operands"]) and not operation.startswith(
                    "s_cbranch"
                )
            if ends or block.targets:
                block.falls_through = not ends or bool(found.groupdict().get("predicate"))
                blocks.append(_Block())
    return blocks, place


def _access(operation: str) -> tuple[str, int] | None:
    if m := re.match(r"(LDG|STG|LDGSTS)\.E\b(.*)", operation):
        width = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", m[2])
        return "store" if m[1] == "STG" else "load", int(width[1] or width[2]) // 8 if width else 4
    if m := re.match(
        r"(?:global|buffer|flat)_(load|store)_(?:dword(?:x(\d))?|[su]?(byte|short))", operation
    ):
        return m[1], {"byte": 1, "short": 2}.get(m[3]) or 4 * int(m[2] or 1)
    return None
