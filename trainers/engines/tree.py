"""A sum over micro-batches whose additions are the same on any number of ranks.

Why the result is the same, and isn't only seen to be: adding floating-point numbers is deterministic, but not
associative, so a sum is the same bit by bit wherever the same additions make it. These follow a binary tree over the
micro-batches 0 … M−1, which knows nothing of ranks. A rank adds up the nodes that lie in its own block (see Cut.block).
What others have is moved, not added, to the rank that owns an element, added there as the tree says, and copied to all.
The tree halves, as the blocks do: on 2, 4, 8, … ranks most have one node to send, as many bytes as an all-reduce takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

Node = tuple[int, int]
"""The micro-batches [start, stop) that it sums."""


def middle(node: Node) -> int:
    """Where its right half begins."""
    return node[0] + (node[1] - node[0] + 1) // 2


def halves(left: Node, right: Node, leaves: int) -> bool:
    """Whether they are the halves of a node of the tree over ``leaves``."""
    wanted, node = (left[0], right[1]), (0, leaves)
    while node != wanted:
        split = middle(node)
        if wanted[0] < split < wanted[1]:
            return False
        node = (node[0], split) if wanted[1] <= split else (split, node[1])
    return middle(node) == left[1]


def nodes_in(block: range, node: Node) -> Iterator[Node]:
    """The largest nodes, of those below ``node``, that lie in ``block``."""
    if node[1] <= block.start or block.stop <= node[0] or not block:
        return
    if block.start <= node[0] and node[1] <= block.stop:
        yield node
        return
    yield from nodes_in(block, (node[0], middle(node)))
    yield from nodes_in(block, (middle(node), node[1]))


class Growing:
    """This rank's nodes, while its leaves come one after another. At most some 2·log₂(leaves) are held at a time."""

    def __init__(self) -> None:
        self.sums: list[tuple[Node, list[Tensor]]] = []

    def add(self, leaf: int, tensors: list[Tensor], leaves: int) -> None:
        """Take in, and keep, the tensors of the next leaf."""
        self.sums.append(((leaf, leaf + 1), tensors))
        while len(self.sums) > 1 and halves(self.sums[-2][0], self.sums[-1][0], leaves):
            (left, into), (right, tensors) = self.sums[-2:]
            torch._foreach_add_(into, tensors)
            self.sums[-2:] = [((left[0], right[1]), into)]


def over_ranks(
    mine: Sequence[Tensor], held: Sequence[Sequence[Node]], leaves: int, like: Tensor, beside: Tensor
) -> tuple[Tensor, Tensor]:
    """The root of the tree, on all ranks, and what each of them says ``beside`` it.

    Args:
        mine: this rank's nodes, 1-D.
        held: the nodes of every rank.
        like: a tensor of their shape and dtype.
        beside: 1-D, of that dtype.

    Returns:
        The root, and [ranks, elements beside].
    """
    ranks, size = len(held), len(like)
    if ranks == 1:
        return mine[0], beside[None]
    share = -(-size // ranks)
    sent = [pad(node, (0, ranks * share - size)).view(ranks, share) for node in mine]
    message = torch.stack(sent, 1).reshape(-1) if sent else like[:0]
    received = like.new_empty(sum(map(len, held)) * share)
    dist.all_to_all_single(received, message, [len(nodes) * share for nodes in held], [len(mine) * share for _ in held])
    found = dict(zip(chain.from_iterable(held), received.view(-1, share), strict=True))
    own = torch.cat((added((0, leaves), found), beside))
    everyone = own.new_empty(ranks * len(own))
    dist.all_gather_single(everyone, own)
    shares, said = everyone.view(ranks, -1).split((share, len(beside)), 1)
    return shares.reshape(-1)[:size], said


def added(node: Node, found: Mapping[Node, Tensor]) -> Tensor:
    """A node, in place, of those below it that were found."""
    if node in found:
        return found[node]
    left, right = (added(half, found) for half in ((node[0], middle(node)), (middle(node), node[1])))
    return left.add_(right)
