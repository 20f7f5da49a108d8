"""A graph of single elements: which node depends on which, and what follows for inputs and outputs.

Arrays of node numbers stand for the arrays of a program: at every element the node that holds all it depends on, 0 for nothing. So an
equation that only moves elements moves numbers and adds no node, and one that lets many elements meet adds one node for all of
them: the size of the graph is linear in the number of elements, however dense the matrices that it stands for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Nodes = np.ndarray  # integers
EDGES = 8  # an element of the program costs so many dependences before the analysis is given up


class GivenUp(Exception):
    """The program is too large, or has what cannot be followed."""


class Graph:
    """Nodes 1, 2, … and edges from what is depended on to what depends.

    Args:
        limit: how many elements may depend on an input, over all variables of the program.
    """

    def __init__(self, limit: int):
        self.count = 1
        self._limit, self._elements, self._dependences = limit, 0, 0
        self._edges: list[tuple[Nodes, Nodes]] = []

    def fresh(self, shape: tuple[int, ...]) -> Nodes:
        """New nodes, of which nothing is known yet."""
        size = int(np.prod(shape, dtype=np.int64))
        self.count += size
        return np.arange(self.count - size, self.count).reshape(shape)

    def spend(self, elements: int) -> None:
        """Counts elements that depend on an input."""
        self._elements += elements
        if self._elements > self._limit:
            raise GivenUp

    def connect(self, before: Nodes, after: Nodes) -> None:
        """Lets every node `after` depend on the node `before` at the same place."""
        before, after = before.ravel(), after.ravel()
        some = (before != 0) & (after != 0)
        self._edges.append((before[some], after[some]))
        self._dependences += int(some.sum())
        if self._dependences > EDGES * self._limit:
            raise GivenUp

    def edges(self) -> tuple[Nodes, Nodes]:
        """(from, to)."""
        nothing = np.zeros(0, np.int64)
        return np.concatenate([nothing, *(a for a, _ in self._edges)]), np.concatenate([nothing, *(b for _, b in self._edges)])

    def mark(self) -> tuple[int, int]:
        """A place to go back to."""
        return self.count, len(self._edges)

    def reset(self, mark: tuple[int, int]) -> None:
        """Forgets all nodes and edges since."""
        self.count = mark[0]
        del self._edges[mark[1] :]

    def repeated(self, mark: tuple[int, int], times: int, arrays: Sequence[Nodes]) -> list[Nodes]:
        """Repeats all nodes and edges since `mark` until there are `times` of them; the arrays of each copy, stacked: (times, …)."""
        first, size = mark[0], self.count - mark[0]
        copies = np.arange(times) * size

        def copied(nodes):
            moved = copies.reshape(-1, *[1] * nodes.ndim)
            return np.where(nodes >= first, nodes + moved, nodes)

        self.spend(size * (times - 1))
        self.count += size * (times - 1)
        edges = self._edges[mark[1] :]
        del self._edges[mark[1] :]
        for before, after in edges:
            self.connect(copied(before), copied(after))
        return [copied(nodes) for nodes in arrays]

    def merge(self, nodes: Nodes, groups: Nodes, count: int) -> Nodes:
        """For each of `count` groups the node that depends on all nodes of the group. A group of one node is that node."""
        some = nodes != 0
        nodes, groups = nodes[some], groups[some]
        out = np.zeros(count, np.int64)
        out[groups] = nodes
        several = np.zeros(count, bool)
        several[groups[out[groups] != nodes]] = True
        out[several] = self.fresh((int(several.sum()),))
        meet = several[groups]
        self.connect(nodes[meet], out[groups[meet]])
        return out

    def union(self, arrays: Iterable[Nodes]) -> Nodes:
        """Element by element; at least one array, all of one shape."""
        first, *rest = arrays
        for other in rest:
            if other is not first:
                places = np.arange(first.size)
                first = self.merge(np.concatenate([first.ravel(), other.ravel()]), np.concatenate([places, places]), first.size).reshape(first.shape)
        return first

    def reduce(self, nodes: Nodes, axes: Sequence[int]) -> Nodes:
        """Everything along these axes, which are gone from the result."""
        kept = [d for d in range(nodes.ndim) if d not in axes]
        shape = tuple(nodes.shape[d] for d in kept)
        size = int(np.prod(shape, dtype=np.int64))
        merged = int(np.prod([nodes.shape[d] for d in axes], dtype=np.int64))
        return self.merge(nodes.transpose(*kept, *axes).ravel(), np.repeat(np.arange(size), merged), size).reshape(shape)

    def spread(self, nodes: Nodes, place: Mapping[int, int], shape: tuple[int, ...]) -> Nodes:
        """Every element of the result depends on all elements that have the same index along the kept dimensions.

        place: kept dimension → dimension of the result, which has this `shape`.
        """
        order = sorted(place, key=place.__getitem__)
        reduced = self.reduce(nodes, [d for d in range(nodes.ndim) if d not in place])
        reduced = reduced.transpose([sorted(order).index(d) for d in order])
        return np.broadcast_to(reduced.reshape([shape[d] if d in place.values() else 1 for d in range(len(shape))]), shape)

    def accumulate(self, nodes: Nodes, axis: int, reverse: bool) -> Nodes:
        """Everything up to and including each index along the axis, or from it on."""
        x = np.moveaxis(nodes, axis, 0)
        x = x[::-1] if reverse else x
        out = np.where(np.logical_or.accumulate(x != 0, axis=0), self.fresh(x.shape), 0)
        self.connect(x, out)
        self.connect(out[:-1], out[1:])
        return np.moveaxis(out[::-1] if reverse else out, 0, axis)

    def windows(self, nodes: Nodes, axis: int, taps: Nodes) -> Nodes:
        """Everything that each window reads along the axis; taps: (windows, width), indices along it, -1 for none."""
        hole = np.zeros((*nodes.shape[:axis], 1, *nodes.shape[axis + 1 :]), np.int64)
        return self.reduce(np.take(np.concatenate([nodes, hole], axis), taps, axis), (axis + 1,))

    def written(self, nodes: Nodes, axis: int, taps: Nodes, size: int) -> Nodes:
        """The converse: everything that is written along an axis of that size, each of the nodes being written wherever its window reads."""
        x = np.moveaxis(nodes, axis, -1)
        lead = int(np.prod(x.shape[:-1], dtype=np.int64))
        window, index = np.nonzero(taps >= 0)[0], taps[taps >= 0]
        groups = np.arange(lead)[:, None] * size + index
        out = self.merge(x.reshape(lead, x.shape[-1])[:, window].ravel(), groups.ravel(), lead * size)
        return np.moveaxis(out.reshape(*x.shape[:-1], size), -1, axis)


# --- what follows ------------------------------------------------------------------------------------------------------------


def _matrix(rows: Nodes, columns: Nodes, shape: tuple[int, int]) -> Any:
    import scipy.sparse

    return scipy.sparse.csr_array((np.ones(len(rows), bool), (rows, columns)), shape=shape)


def _reached(before: Nodes, after: Nodes, starts: Nodes, count: int) -> Nodes:
    """Whether each node can be reached from the starts."""
    from scipy.sparse import csgraph

    source = np.full(len(starts), count)
    graph = _matrix(np.concatenate([before, source]), np.concatenate([after, starts]), (count + 1, count + 1))
    found = np.zeros(count + 1, bool)
    found[csgraph.breadth_first_order(graph, count, return_predecessors=False)] = True
    return found[:count]


def _live(graph: Graph, tangents: int, outputs: Nodes) -> tuple[Nodes, Nodes, Nodes]:
    """The edges on a path from a tangent, nodes 1 … `tangents`, to an output; and the outputs, 0 where they depend on nothing."""
    before, after = graph.edges()
    forward = _reached(before, after, np.arange(1, tangents + 1), graph.count)
    outputs = np.where(forward[outputs], outputs, 0)
    backward = _reached(after, before, outputs[outputs != 0], graph.count)
    alive = forward & backward
    some = alive[before] & alive[after]
    return before[some], after[some], outputs


def labels(graph: Graph, tangents: int, outputs: Nodes) -> tuple[np.ndarray, np.ndarray]:
    """The connected components of tangents, nodes 1 … `tangents`, and outputs: (labels of tangents, labels of outputs)."""
    from scipy.sparse import csgraph

    before, after, outputs = _live(graph, tangents, outputs)
    count, label = csgraph.connected_components(_matrix(before, after, (graph.count, graph.count)), directed=False)
    return label[1 : tangents + 1], np.where(outputs != 0, label[outputs], count + np.arange(len(outputs)))


def reachability(graph: Graph, tangents: int, outputs: Nodes, limit: int) -> Any:
    """Which output depends on which tangent: a sparse boolean (outputs, tangents); GivenUp if there are more than `limit` entries on the way.

    Nodes of a cycle depend on the same tangents and count as one. The others are taken as soon as all they depend on are known, all of
    these at once; rows that nobody reads any more are dropped.
    """
    import scipy.sparse
    from scipy.sparse import csgraph

    before, after, outputs = _live(graph, tangents, outputs)
    count, label = csgraph.connected_components(_matrix(before, after, (graph.count, graph.count)), directed=True, connection="strong")
    across = label[before] != label[after]
    reads = _matrix(label[after][across], label[before][across], (count, count))  # duplicates are summed: every entry counts once
    readers = reads.T.tocsr()
    missing, unread = np.diff(reads.indptr), np.diff(readers.indptr)
    wanted = np.zeros(count, bool)
    wanted[label[outputs[outputs != 0]]] = True

    rows: Any = _matrix(np.arange(tangents), np.arange(tangents), (tangents, tangents))
    active = ready = label[1 : tangents + 1]  # the nodes that `rows` belong to, those that came last, at the end
    done, finished, stored = [_matrix(active[:0], active[:0], (1, tangents))], [active[:0]], 0  # a row of nothing first
    place = np.zeros(count, np.int64)
    while ready.size:
        last = np.flatnonzero(wanted[ready]) + len(active) - len(ready)
        done.append(rows[last])
        finished.append(active[last])
        stored += done[-1].nnz
        told = readers[ready].indices
        np.subtract.at(missing, told, 1)
        ready = np.unique(told[missing[told] == 0])
        place[active] = np.arange(len(active))
        some = reads[ready]
        new = scipy.sparse.csr_array((some.data, place[some.indices], some.indptr), shape=(len(ready), len(active))) @ rows
        np.subtract.at(unread, some.indices, 1)
        kept = unread[active] > 0
        rows, active = scipy.sparse.vstack([rows[np.flatnonzero(kept)], new], format="csr"), np.concatenate([active[kept], ready])
        if rows.nnz + stored > limit:
            raise GivenUp
    place[np.concatenate(finished)] = np.arange(1, 1 + sum(map(len, finished)))
    every: Any = scipy.sparse.vstack(done, format="csr")
    chosen = np.where(outputs != 0, place[label[outputs]], 0)
    if np.diff(every.indptr)[chosen].sum() > limit:
        raise GivenUp
    return every[chosen]
