"""A sum over micro-batches whose additions are the same on any number of ranks.

Floating-point addition is deterministic but not associative, so a sum is the same bit by bit if the same additions
produce it. The additions here follow a binary tree over the micro-batches 0 … M−1, whatever the number of ranks. A rank
adds up the nodes inside its own block (see Cut.block). The nodes of the other ranks are sent to the rank that owns an
element, added there in the order of the tree, and copied to all ranks. The tree halves its nodes, as the blocks do:
if 2, 4, 8, … ranks share the micro-batches evenly, each rank sends one node, and no more bytes than an all-reduce.
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
"""A node of the tree: the sum of the micro-batches [start, stop)."""


def middle(node: Node) -> int:
    """Return the start of the node's right half."""
    return node[0] + (node[1] - node[0] + 1) // 2


def halves(left: Node, right: Node, leaves: int) -> bool:
    """Return whether ``left`` and ``right`` are the halves of a node of the tree over ``leaves``."""
    joined, node = (left[0], right[1]), (0, leaves)
    while node != joined:
        split = middle(node)
        if joined[0] < split < joined[1]:
            return False
        node = (node[0], split) if joined[1] <= split else (split, node[1])
    return middle(node) == left[1]


def nodes_in(block: range, node: Node) -> Iterator[Node]:
    """Yield the largest nodes at or below ``node`` that lie in ``block``."""
    if node[1] <= block.start or block.stop <= node[0] or not block:
        return
    if block.start <= node[0] and node[1] <= block.stop:
        yield node
        return
    yield from nodes_in(block, (node[0], middle(node)))
    yield from nodes_in(block, (middle(node), node[1]))


@lru_cache
def nodes_by_rank(cut: Cut) -> tuple[tuple[Node, ...], ...]:
    """Return, for each rank, the nodes that it adds up without communication."""
    assert cut.pieces
    return tuple(tuple(nodes_in(cut.block(rank), (0, cut.pieces))) for rank in range(cut.world))


class Growing:
    """This rank's nodes while leaves, which have ``add_``, are added one by one; at most about 2·log₂(leaves)."""

    def __init__(self) -> None:
        self.sums: list[tuple[Node, Any]] = []

    def add(self, leaf: int, new: Any, leaves: int) -> None:
        """Add the next leaf; ``new`` is kept and added to in place."""
        self.sums.append(((leaf, leaf + 1), new))
        while len(self.sums) > 1 and halves(self.sums[-2][0], self.sums[-1][0], leaves):
            (left, into), (right, other) = self.sums[-2:]
            into.add_(other)
            self.sums[-2:] = [((left[0], right[1]), into)]


def sum_over_ranks(own: Sequence[Tensor], by_rank: Sequence[Sequence[Node]], leaves: int, root: Tensor) -> None:
    """Sum the tree over all ranks into ``root``.

    Args:
        own: the sums of this rank's nodes, 1-D, their length a multiple of the number of ranks.
        by_rank: the nodes of every rank.
        root: receives the sum of all leaves on every rank; may be one of ``own``.
    """
    ranks, share = len(by_rank), len(root) // len(by_rank)
    shares = [node.view(ranks, share) for node in own]
    message = own[0] if len(own) == 1 else torch.cat(shares, 1).view(-1) if own else root[:0]
    received = root.new_empty(sum(map(len, by_rank)) * share)
    dist.all_to_all_single(received, message, [len(nodes) * share for nodes in by_rank], [len(own) * share] * ranks)
    found = dict(zip(chain.from_iterable(by_rank), received.view(-1, share), strict=True))
    dist.all_gather_single(root, node_sum((0, leaves), found))


def node_sum(node: Node, found: Mapping[Node, Any]) -> Any:
    """Return the sum of ``node``, added up in place from the nodes in ``found``."""
    if node in found:
        return found[node]
    left, right = (node_sum(half, found) for half in ((node[0], middle(node)), (middle(node), node[1])))
    left.add_(right)
    return left
