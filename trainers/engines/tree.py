"""A sum over micro-batches whose additions are the same on any number of ranks.

Why the result is the same, and isn't only seen to be: adding floating-point numbers is deterministic, but not
associative, so a sum is the same bit by bit wherever the same additions make it. These follow a binary tree over the
micro-batches 0 … M−1, which knows nothing of ranks. A rank adds up the nodes that lie in its own block (see Cut.block).
What others have is moved, not added, to the rank that owns an element, added there as the tree says, and copied to all.
The tree halves, as the blocks do: where 2, 4, 8, … ranks share the micro-batches evenly each of them has one node to
send, so no more bytes move than in an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from isobatch.scaling.geometry import Cut

Node = tuple[int, int]
"""The micro-batches [start, stop) that it sums."""


def middle(node: Node) -> int:
    """Return where its right half begins."""
    return node[0] + (node[1] - node[0] + 1) // 2


def halves(left: Node, right: Node, leaves: int) -> bool:
    """Return whether they are the halves of a node of the tree over ``leaves``."""
    wanted, node = (left[0], right[1]), (0, leaves)
    while node != wanted:
        split = middle(node)
        if wanted[0] < split < wanted[1]:
            return False
        node = (node[0], split) if wanted[1] <= split else (split, node[1])
    return middle(node) == left[1]


def nodes_in(block: range, node: Node) -> Iterator[Node]:
    """Yield the largest nodes, of those from ``node`` down, that lie in ``block``."""
    if node[1] <= block.start or block.stop <= node[0] or not block:
        return
    if block.start <= node[0] and node[1] <= block.stop:
        yield node
        return
    yield from nodes_in(block, (node[0], middle(node)))
    yield from nodes_in(block, (middle(node), node[1]))


@lru_cache
def dealt(cut: Cut) -> tuple[tuple[Node, ...], ...]:
    """Return the nodes that each rank adds up by itself."""
    assert cut.pieces
    return tuple(tuple(nodes_in(cut.block(rank), (0, cut.pieces))) for rank in range(cut.world))


class Growing:
    """This rank's nodes, while its leaves, which have ``add_``, come one by one; some 2·log₂(leaves) at most."""

    def __init__(self) -> None:
        self.sums: list[tuple[Node, Any]] = []

    def add(self, leaf: int, new: Any, leaves: int) -> None:
        """Take in the next leaf, and keep it."""
        self.sums.append(((leaf, leaf + 1), new))
        while len(self.sums) > 1 and halves(self.sums[-2][0], self.sums[-1][0], leaves):
            (left, into), (right, other) = self.sums[-2:]
            into.add_(other)
            self.sums[-2:] = [((left[0], right[1]), into)]


def over_ranks(mine: Sequence[Tensor], held: Sequence[Sequence[Node]], leaves: int, root: Tensor) -> None:
    """Bring the tree's nodes together.

    Args:
        mine: this rank's nodes, 1-D, as long as a multiple of the ranks.
        held: the nodes of every rank.
        root: becomes the sum of all leaves, on all ranks; may be one of ``mine``.
    """
    ranks, share = len(held), len(root) // len(held)
    by_rank = [node.view(ranks, share) for node in mine]
    message = mine[0] if len(mine) == 1 else torch.cat(by_rank, 1).view(-1) if mine else root[:0]
    received = root.new_empty(sum(map(len, held)) * share)
    dist.all_to_all_single(received, message, [len(nodes) * share for nodes in held], [len(mine) * share] * ranks)
    found = dict(zip(chain.from_iterable(held), received.view(-1, share), strict=True))
    dist.all_gather_single(root, added((0, leaves), found))


def added(node: Node, found: Mapping[Node, Any]) -> Any:
    """Return a node, added up in place from those below it that were found."""
    if node in found:
        return found[node]
    left, right = (added(half, found) for half in ((node[0], middle(node)), (middle(node), node[1])))
    left.add_(right)
    return left
