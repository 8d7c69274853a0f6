"""Test the tree of a bitwise run's sums, in one process with expressions instead of numbers, and over ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from isobatch.scaling.geometry import Cut, solve
from isobatch.trainers.engines.tree import Growing, halves, node_sum, nodes_by_rank, nodes_in, sum_over_ranks
from isobatch.trainers.ranks.world import World
from tests.support.harness import in_ranks

LEAVES, WORLDS = range(1, 41), range(1, 13)


class Term:
    """A sum that records its additions."""

    def __init__(self, text: str) -> None:
        self.text = text

    def add_(self, other: Term) -> None:
        self.text = f"({self.text}+{other.text})"


def cut_of(leaves: int, world: int) -> Cut:
    cut = solve(world, global_size=leaves, per_gpu=1, bitwise=True)
    assert cut.pieces == leaves
    return cut


def by_hand(start: int, stop: int) -> str:
    """Return the expression of the tree over [start, stop)."""
    if stop - start == 1:
        return str(start)
    half = start + math.ceil((stop - start) / 2)
    return f"({by_hand(start, half)}+{by_hand(half, stop)})"


def all_nodes(start: int, stop: int) -> list[tuple[int, int]]:
    half = start + math.ceil((stop - start) / 2)
    below = [] if stop - start == 1 else all_nodes(start, half) + all_nodes(half, stop)
    return [(start, stop), *below]


def grown(block: range, leaves: int) -> Growing:
    growing, most = Growing(), 0
    for leaf in block:
        growing.add(leaf, Term(str(leaf)), leaves)
        most = max(most, len(growing.sums))
    assert most <= 2 * math.log2(leaves) + 1
    return growing


@pytest.mark.parametrize("leaves", LEAVES)
def test_every_world_makes_the_same_additions(leaves: int) -> None:
    """The expression is the same for each number of ranks."""
    for world in WORLDS:
        cut, found = cut_of(leaves, world), {}
        for rank in range(world):
            sums = grown(cut.block(rank), leaves).sums
            assert tuple(node for node, _ in sums) == nodes_by_rank(cut)[rank]
            found |= dict(sums)
        assert node_sum((0, leaves), found).text == by_hand(0, leaves)


@pytest.mark.parametrize("leaves", LEAVES)
def test_nodes_of_a_block_equal_brute_force(leaves: int) -> None:
    nodes = all_nodes(0, leaves)
    for start in range(leaves + 1):
        for stop in range(start, leaves + 1):
            inside = [node for node in nodes if start <= node[0] and node[1] <= stop]
            largest = [n for n in inside if not any(o != n and o[0] <= n[0] and n[1] <= o[1] for o in inside)]
            assert list(nodes_in(range(start, stop), (0, leaves))) == sorted(largest)


@pytest.mark.parametrize("leaves", [1, 2, 3, 7, 12, 25])
def test_halves_equal_brute_force(leaves: int) -> None:
    split = {
        node: node[0] + math.ceil((node[1] - node[0]) / 2) for node in all_nodes(0, leaves) if node[1] > node[0] + 1
    }
    pairs = {((start, half), (half, stop)) for (start, stop), half in split.items()}
    for left in all_nodes(0, leaves):
        for right in all_nodes(0, leaves):
            if left[1] == right[0]:
                assert halves(left, right, leaves) == ((left, right) in pairs)


def test_ranks_send_few_nodes() -> None:
    """If 2, 4 or 8 ranks share the leaves evenly, each sends one node, as many bytes as an all-reduce."""
    for leaves in range(2, 200):
        for world in (world for world in (2, 4, 8) if world == 2 or leaves % world == 0):
            assert [len(nodes) for nodes in nodes_by_rank(cut_of(leaves, world))] == [1] * world, (world, leaves)
        for world in range(3, min(leaves, 12) + 1):
            most = max(len(nodes) for nodes in nodes_by_rank(cut_of(leaves, world)))
            assert most <= 2 * math.log2(leaves / world + 1) + 1, (world, leaves)


def numbers(leaf: int) -> torch.Tensor:
    return torch.randn(24, generator=torch.Generator().manual_seed(leaf)) * 10.0 ** (leaf % 5)


@pytest.mark.parametrize(("world", "leaves"), [(2, 7), (3, 7), (4, 12), (4, 3)])
def test_real_ranks_compute_the_tree(tmp_path: Path, world: int, leaves: int) -> None:
    def body(ranks: World) -> Any:
        cut, growing = cut_of(leaves, world), Growing()
        for leaf in cut.block(ranks.rank):
            growing.add(leaf, numbers(leaf), leaves)
        own = [sums for _, sums in growing.sums]
        root = own[0] if own else torch.empty(24)
        sum_over_ranks(own, nodes_by_rank(cut), leaves, root)
        return root.tolist()

    wanted = node_sum((0, leaves), {(leaf, leaf + 1): numbers(leaf) for leaf in range(leaves)}).tolist()
    one_by_one = sum((numbers(leaf) for leaf in range(1, leaves)), numbers(0)).tolist()
    assert in_ranks(world, body, tmp_path) == [wanted] * world
    assert leaves < 4 or wanted != one_by_one  # the order of additions changes these numbers
