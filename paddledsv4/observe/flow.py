"""Follow gradients from op to op during a backward pass, and say whose backward gave the first one of a kind.

A hook on every tensor that an op makes or takes tells when its gradient is complete. By then all ops that took the
tensor have run their backward, on gradients that were told before. Hooks change nothing about the graph, so that the
bits stay; what they hold is let go as soon as an op's backward is over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import paddle
from paddle import Tensor

from paddledsv4.observe.ops import OpCall, tensors_in


@dataclass(eq=False)
class FlowingCall:
    """A call whose backward is still to come: gradients ``arrived`` at its results, inputs that ``wait`` for theirs."""

    call: OpCall | None
    waits: int = 0
    arrived: dict[int, Tensor] = field(default_factory=dict)

    def inputs(self) -> list[Tensor]:
        """The tensors that want a gradient, as :func:`paddledsv4.observe.replay.replay` numbers them."""
        return [t for t in tensors_in([self.call.args, self.call.kwargs]) if not t.stop_gradient]


@dataclass(eq=False)
class Edge:
    """A tensor with the calls that made it (and which result it is) and those that took it."""

    tensor: Tensor | None
    makers: list[tuple[FlowingCall, int]] = field(default_factory=list)
    takers: list[FlowingCall] = field(default_factory=list)

    def suspects(self) -> list[FlowingCall]:
        """Takers that ran their backward: on good gradients, since this is the first bad one."""
        return [taker for taker in self.takers if taker.arrived]

    def let_go(self) -> None:
        """Forget everything: the hook on the tensor would keep it alive."""
        self.tensor, self.makers, self.takers = None, [], []


class GradientFlow:
    """Tells ``refused(edge, gradient)`` of the first gradient that ``accepts`` says no to, once per pass."""

    def __init__(self, accepts: Callable[[Tensor], bool], refused: Callable[[Edge, Tensor], None]):
        self.accepts, self.refused = accepts, refused
        self._edges: dict[int, Edge] = {}  # by identity; an edge holds its tensor, so that no other gets its id
        self._leaves: list = []
        self._refused = False

    def follow(self, call: OpCall, outputs: tuple) -> None:
        """A call was made; nothing to follow if it is in no graph."""
        if not paddle.is_grad_enabled():
            return
        flowing = FlowingCall(call)
        inputs = {id(t): t for t in flowing.inputs()}
        flowing.waits = len(inputs)
        for tensor in inputs.values():
            self._edge(tensor).takers.append(flowing)
        for i, x in enumerate(outputs):
            if isinstance(x, Tensor) and not x.stop_gradient:
                self._edge(x).makers.append((flowing, i))

    def end_pass(self) -> None:
        """The backward pass is over, or given up: let go of everything."""
        for handle in self._leaves:
            handle.remove()
        for edge in self._edges.values():
            edge.let_go()
        self._leaves, self._edges, self._refused = [], {}, False

    def _edge(self, tensor: Tensor) -> Edge:
        known = self._edges.get(id(tensor))
        if known is None:
            known = self._edges[id(tensor)] = Edge(tensor)
            handle = tensor.register_hook(lambda gradient: self._complete(known, gradient))
            if tensor.is_leaf:  # parameters outlive the pass
                self._leaves.append(handle)
        return known

    def _complete(self, edge: Edge, gradient: Tensor | None) -> None:
        if edge.tensor is None or self._refused:
            return
        if gradient is not None:
            if not self.accepts(gradient):
                self._refused = True
                self.refused(edge, gradient)
                return
            for maker, index in edge.makers:
                maker.arrived.setdefault(index, gradient.detach().clone())
        for taker in edge.takers:
            taker.waits -= 1
            if taker.waits == 0:  # its backward is over and gave nothing but good gradients
                taker.call, taker.arrived = None, {}
        del self._edges[id(edge.tensor)]
        edge.let_go()
