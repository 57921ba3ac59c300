"""A traced model as a chain of blocks, cut where the rest of the model needs one tensor only.

The model is traced twice. In the first trace each layer of torch is an operation; this trace shows where cuts are
possible. In the second trace a module without a cut inside is one operation, so that the blocks hold the user's own
modules, whole where possible. Between two weight layers the last possible place is taken: an in-place activation stays
with the layer before it, and the norm that opens a residual unit stays with its unit.
"""

import operator
import re
from collections.abc import Sequence
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn

from memdfa_lab.core.compat import ANY_CONVOLUTION
from memdfa_lab.core.tracing import Untraceable, called, held, in_place, operations, running

WEIGHT_LAYERS = (nn.Linear, ANY_CONVOLUTION, nn.Bilinear)
NOT_A_CHAIN = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag)
# Functions by name: weight layers if given a parameter; those that draw random numbers; those without one tensor
PRODUCTS = re.compile(r"(bi)?linear|conv(_transpose)?[123]d|(mat|b|m)mul|b?mm|(ba)?addb?mm|einsum|embedding")
RANDOM = re.compile(r"rand|dropout|bernoulli|normal|multinomial|poisson")
NO_TENSOR = {"size", "getattr", "dim", "numel", "chunk", "split", "unbind", "tensor_split"}


_Mode = tuple[bool, ...]  # whether each of several modules is in training


def traced_blocks(model: nn.Module, cut: Sequence[str] | None, granularity: str | None) -> list[nn.Module]:
    """Return the blocks of a model, which is left as it was; `cut` and `granularity` are those of `as_blocks`.

    A module of an nn.Sequential or nn.ModuleList that cannot be traced stays whole, and so do others of its type. The
    model is traced in its present mode, in training mode and in evaluation mode.

    Raises TypeError for a model that cannot be traced, or that does not map one tensor to one tensor; ValueError for a
    name in `cut` that the model does not have, or at which more than one tensor is needed.
    """
    lists = [part for part in model.modules() if isinstance(part, (nn.Sequential, nn.ModuleList))]
    listed = {type(item) for part in lists for item in part} - {nn.Sequential, nn.ModuleList}
    whole = set(listed) if granularity == "unit" else set()
    while True:
        try:
            flow = _Flow(operations(model, lambda m: type(m) in whole))
            break
        except Untraceable as stopped:
            stuck = next((type(m) for m in reversed(stopped.inside) if type(m) in listed - whole), None)
            if stuck is None:
                raise
            whole.add(stuck)
    nodes, ends = flow.nodes, flow.places(model, cut).values()
    paths = {""}.union(*(running(nodes[i]) & running(nodes[i + 1]) for i in ends))
    opened = [part for path, part in model.named_modules() if path in paths]
    now, flows = [m.training for m in opened], []
    for mode in dict.fromkeys([tuple(now), *((mode,) * len(opened) for mode in (True, False))]):
        _set_mode(opened, mode)
        try:
            flow = _Flow(operations(model, lambda m: type(m) in whole or all(m is not part for part in opened)))
        finally:
            _set_mode(opened, now)
        flows.append((mode, flow, flow.places(model, cut)))
    keys = set.intersection(*(set(places) for _, _, places in flows))
    in_modes = []
    for mode, flow, places in flows:
        spans = pairwise([0, *sorted(places[key] for key in keys), len(flow.nodes) - 2])
        in_modes.append([(mode, flow, *span) for span in spans])
    return [_block(opened, parts) for parts in zip(*in_modes, strict=True)]


def _set_mode(modules: Sequence[nn.Module], mode: Sequence[bool]) -> None:
    for m, training in zip(modules, mode, strict=True):
        m.training = training


class _Flow:
    """Which values of a model's operations are needed where.

    `constants`: nodes that do not depend on the input, and whether they depend on a parameter. `alive`: after each
    node, the values that later nodes need; an in-place operation stands for its input. `weights`: the positions of the
    weight layers.
    """

    def __init__(self, nodes: list[fx.Node]):
        self.nodes = nodes
        self.constants: dict[fx.Node, bool] = {}
        same: dict[fx.Node, fx.Node] = {}
        last: dict[fx.Node, int] = {}
        for i, node in enumerate(nodes):
            inputs = node.all_input_nodes
            if node.op == "get_attr":
                self.constants[node] = isinstance(held(node), nn.Parameter)
            elif called(node) and not RANDOM.search(called(node)) and self.constants.keys() >= set(inputs):
                self.constants[node] = any(self.constants[one] for one in inputs)
            last.update((same[one], i) for one in inputs)
            same[node] = same[inputs[0]] if in_place(node) else node
        born = {node: i for i, node in enumerate(nodes) if node in last and node not in self.constants}
        self.alive = [{node for node, start in born.items() if start <= i < last[node]} for i in range(len(nodes))]
        self.weights = [i for i, node in enumerate(nodes) if self._has_weights(node)]

    def _has_weights(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return any(isinstance(part, (*WEIGHT_LAYERS, *NOT_A_CHAIN)) for part in held(node).modules())
        given = any(self.constants.get(one) for one in node.all_input_nodes)
        return given and node not in self.constants and bool(PRODUCTS.fullmatch(called(node)))

    def _one_tensor_after(self, i: int) -> bool:
        if len(self.alive[i]) != 1 or self.nodes[i] in self.constants:
            return False
        (value,) = self.alive[i]
        parts = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in value.users)
        return not parts and called(value) not in NO_TENSOR

    def places(self, model: nn.Module, cut: Sequence[str] | None) -> dict[Any, int]:
        """Return the nodes after which a block ends, by the number of weight layers before, or by names in `cut`."""
        if not self.weights:
            raise ValueError("the model has no weight layer (Linear or convolution): there is nothing to train")
        if cut is None:
            spans = enumerate(pairwise(self.weights))
            return {k: i for k, (a, b) in spans for i in range(a, b) if self._one_tensor_after(i)}
        found: dict[Any, int] = {}
        for name in cut:
            if name not in dict(model.named_modules()):
                raise ValueError(f"cut: the model has no module {name!r}: take names of model.named_modules()")
            last = next((i for i, node in enumerate(self.nodes[1:]) if name in running(node)), None)
            if last is None:
                raise ValueError(f"cut: {name!r} does not run on its own: it stands in a module that stays whole")
            if len(alive := self.alive[last]) != 1:
                values = f"{len(alive)} tensors are needed from {name!r} on ({', '.join(sorted(map(str, alive)))})"
                raise ValueError(f"cut: {values}: cut elsewhere")
            found[name] = last
        ends = pairwise([0, *sorted(found.values()), len(self.nodes)])
        for name, (a, b) in zip([*sorted(found, key=found.__getitem__), "the end"], ends, strict=True):
            if not any(a < i <= b for i in self.weights):
                raise ValueError(f"cut: the block before {name!r} would have no weight layer: leave that name out")
        return found

    def part(self, a: int, b: int) -> tuple[list[fx.Node], Any]:
        """Return the operations after number a up to b, and the one whose value they return."""
        body = [node for node in self.nodes[a + 1 : b + 1] if node not in self.constants]
        return body, self.nodes[-1].args[0] if b == len(self.nodes) - 2 else next(iter(self.alive[b]))


class _Code:
    """A forward function from its source, which can be copied and pickled."""

    def __init__(self, source: str, names: dict[str, Any]):
        self.source = source
        self.names = {name: value for name, value in names.items() if not isinstance(value, ModuleType)}
        space = {"torch": torch, **self.names}
        exec(source, space)  # noqa: S102, as torch.fx runs its graphs
        self.run = space["forward"]

    def __reduce__(self) -> Any:
        return _Code, (self.source, self.names)


def _block(opened: Sequence[nn.Module], parts: Sequence[tuple[_Mode, _Flow, int, int]]) -> nn.Module:
    """Return a module that runs a part of the operations, given for each mode: the user's own module if it does so."""
    chains = []
    for _, flow, a, b in parts:
        body, _ = flow.part(a, b)
        plain = all(node.op == "call_module" and (*node.all_input_nodes,) == node.args for node in body)
        plain &= all(after.args[0] is node for node, after in pairwise(body)) and body[0].args[0] not in flow.constants
        chains.append([held(node) for node in body] if plain and body[-1].users else [])
    if chains[0] and all(chain == chains[0] for chain in chains):
        return chains[0][0] if len(chains[0]) == 1 else nn.Sequential(*chains[0])
    return Traced(opened, parts)


class Traced(nn.Module):
    """A block that runs a part of a traced model's code, and holds the modules and parameters that this part uses."""

    def __init__(self, opened: Sequence[nn.Module], parts: Sequence[tuple[_Mode, _Flow, int, int]]):
        super().__init__()
        self._opened = tuple(opened)  # the modules whose code this is
        codes = {mode: self._code(flow, a, b) for mode, flow, a, b in parts}
        alike = len({code.source for code in codes.values()}) == 1
        self._asked = () if alike else self._opened  # the modules on whose mode it depends
        self._codes: dict[_Mode, _Code] = {(): codes[parts[0][0]]} if alike else codes

    @property
    def model(self) -> nn.Module:
        """The model that was traced."""
        return self._opened[0]

    @property
    def training(self) -> bool:
        return self._opened[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        for part in vars(self).get("_opened", ()):
            part.training = mode

    def forward(self, h: Tensor) -> Tensor:
        code = self._codes.get(tuple([part.training for part in self._asked]))
        if code is None:
            raise RuntimeError("some modules are in other modes than when it was cut: call train() or eval() on all")
        out: Tensor = code.run(self, h)
        return out

    def extra_repr(self) -> str:
        return "\n".join(code.source for code in self._codes.values())

    def _code(self, flow: _Flow, a: int, b: int) -> _Code:
        """Return the operations after number a up to b as code."""
        graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
        h, (body, out) = graph.placeholder("h"), flow.part(a, b)
        inside = {*body, *flow.constants}

        def copy(node: fx.Node) -> fx.Node:
            if node not in inside:
                return h
            if node not in copies:
                copies[node] = graph.node_copy(node, copy)
                if node.op in ("call_module", "get_attr"):
                    copies[node].target = self._name(node)
            return copies[node]

        for node in body:
            copy(node)
        graph.output(copy(out))
        code = graph.python_code("self")
        return _Code(code.src[code.src.index("def forward") :], code.globals)  # before it: what fx.wrap is to wrap

    def _name(self, node: fx.Node) -> str:
        """Register a node's module or tensor in the block, and return its name there."""
        part, path = held(node), str(node.target)
        if not isinstance(part, (nn.Module, nn.Parameter)):  # read where the model has it: moving the model replaces it
            vars(self)["_model"] = node.graph.owning_module
            return f"_model.{path}"
        name = path.partition(".")[2].replace(".", "_")
        while getattr(self, name, part) is not part:
            name += "_"
        setattr(self, name, part)
        return name
