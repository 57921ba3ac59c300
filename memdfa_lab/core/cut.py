"""Any model that torch.fx can trace as a chain of blocks: cut where one tensor is all that what follows needs.

The model is traced twice. The first graph has every layer of torch, and says where cuts can be. In the second one a
module without a cut in it is one node, so that the blocks hold the user's own modules, whole where that can be. Between
two weight layers the last possible place is taken: an in-place activation stays with its layer, and the norm that opens
a residual unit with its unit.
"""

import operator
import os
import random
import re
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from memdfa_lab.core.compat import ANY_CONVOLUTION, has_hooks, is_causal_mask
from memdfa_lab.core.watcher import unwatched

WEIGHT_LAYERS = (nn.Linear, ANY_CONVOLUTION, nn.Bilinear)
NOT_A_CHAIN = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Embedding, nn.EmbeddingBag)
# Functions, by name, that are a weight layer if they take a parameter; that draw numbers; that return no one tensor
PRODUCTS = re.compile(r"(bi)?linear|conv(_transpose)?[123]d|(mat|b|m)mul|b?mm|(ba)?addb?mm|einsum|embedding")
RANDOM = re.compile(r"rand|dropout|bernoulli|normal|multinomial|poisson")
NO_TENSOR = {"size", "getattr", "dim", "numel", "chunk", "split", "unbind", "tensor_split"}
AS_MODULES: dict[Any, Any] = {torch.flatten: nn.Flatten, "flatten": nn.Flatten, F.relu: nn.ReLU, torch.relu: nn.ReLU}
AS_MODULES |= {torch.tanh: nn.Tanh, torch.sigmoid: nn.Sigmoid, F.gelu: nn.GELU, F.max_pool2d: nn.MaxPool2d}
WAYS_OUT = (
    "pass a list of modules, or put that code into a module of an nn.ModuleList, which then stays whole, or into a "
    "function that is given to torch.fx.wrap"
)
fx.wrap("is_causal_mask")


def traced_blocks(model: nn.Module, cut: Sequence[str] | None, granularity: str | None) -> list[nn.Module]:
    """Return the blocks of a model, which is left as it was; `cut` and `granularity` as `as_blocks` has them.

    A module of an nn.Sequential or nn.ModuleList that cannot be traced stays whole. The model is traced in the mode in
    which it is, and in training and evaluation: a block whose code asks for the mode has a graph for each.

    Raises TypeError for a model that cannot be traced, or that does not map one tensor to one tensor; ValueError for a
    name in `cut` that is not there, or before which more than one tensor is needed.
    """
    lists = [part for part in model.modules() if isinstance(part, (nn.Sequential, nn.ModuleList))]
    listed = [item for part in lists for item in part if not isinstance(item, (nn.Sequential, nn.ModuleList))]
    whole = {type(item) for item in listed} if granularity == "unit" else set()
    while True:
        tracer = _Tracer(model, whole)
        try:
            nodes = tracer.nodes()
            break
        except _Stopped as stopped:
            stuck = next((type(m) for m in reversed(tracer.running) if any(m is item for item in listed)), None)
            if stuck is None or stuck in whole:
                raise TypeError(str(stopped)) from stopped.__cause__
            whole.add(stuck)
    ends = _places(model, nodes, cut).values()
    paths = {""} | {path for i in ends for path in _running(nodes[i]) & _running(nodes[i + 1])}
    opened = [part for path, part in model.named_modules() if path in paths]
    modes = dict.fromkeys([tuple(m.training for m in opened), *((mode,) * len(opened) for mode in (True, False))])
    traced = []
    for mode in modes:
        with _in_mode(opened, mode):
            nodes = _Tracer(model, whole, set(map(id, opened))).nodes()
        traced.append((nodes, _places(model, nodes, cut)))
    shared = set.intersection(*(set(places) for _, places in traced))
    in_modes = []
    for nodes, places in traced:
        spans = [-1, *sorted(places[key] for key in shared), len(nodes) - 2]
        in_modes.append([_Piece(nodes, *span) for span in pairwise(spans)])
    return [_block(opened, dict(zip(modes, pieces, strict=True))) for pieces in zip(*in_modes, strict=True)]


class _Stopped(Exception):
    """Tracing has stopped; the message is for the user."""


class _One(nn.Module):
    """A model with one input: its further arguments have their defaults."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, whole: set[type[nn.Module]], opened: set[int] | None = None):
        super().__init__()
        self.model, self.whole, self.opened = model, whole, opened
        self.running: list[nn.Module] = []  # where tracing is, or has stopped

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        closed = self.opened is not None and id(m) not in self.opened
        if closed or type(m) in self.whole or (has_hooks(m) and m is not self.model):
            return True
        return not isinstance(m, (nn.TransformerEncoder, nn.ModuleDict)) and super().is_leaf_module(
            m, module_qualified_name
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.running.append(m)
        if type(m) is nn.TransformerEncoder:  # it asks for values, to run faster on padded words
            forward = partial(_encode, m)
        out = super().call_module(m, forward, args, kwargs)
        self.running.pop()
        return out

    def nodes(self) -> list[fx.Node]:
        """Return the operations of the model in order, its input first. Raises TypeError or _Stopped."""
        name, before = type(self.model).__name__, [(vars(m), dict(vars(m))) for m in self.model.modules()]
        drawn = _generators()
        try:
            root = _One(self.model)
            graph = self.trace(root)
            vars(graph)["root"] = root
            nodes = list(graph.nodes)
        except Exception as problem:  # of any kind: the user's code meets values that are none
            raise _Stopped(f"{name} cannot be traced: {_where(problem)}; {WAYS_OUT}") from problem
        finally:
            changed = [key for held, old in before for key in held.keys() | old if held.get(key) is not old.get(key)]
            for held, old in before:
                held.clear()
                held.update(old)
        if drawn != _generators():
            torch.random.set_rng_state(torch.tensor(drawn[0], dtype=torch.uint8))
            random.setstate(drawn[1])
            changed.append("random numbers that do not depend on x")
        changed += [str(n.args[0]) for n in nodes if _in_place(n) and n.all_input_nodes[0].op == "get_attr"]
        if changed:
            raise _Stopped(f"{name} cannot be traced: each run sets or draws {changed[0]}; {WAYS_OUT}")
        if not isinstance(nodes[-1].args[0], fx.Node):
            kind = type(nodes[-1].args[0]).__name__.removeprefix("immutable_")
            raise TypeError(f"{name} returns a {kind}, not one tensor: switch its other outputs off, or wrap it")
        return nodes


def _generators() -> tuple[list[int], Any]:
    with unwatched():
        return torch.get_rng_state().tolist(), random.getstate()


def _encode(m: nn.TransformerEncoder, src: Any, mask: Any = None, src_key_padding_mask: Any = None, **more: Any) -> Any:
    is_causal = more.get("is_causal")
    if mask is not None and is_causal is None:
        is_causal = is_causal_mask(mask)
    for layer in m.layers:
        src = layer(src, src_mask=mask, is_causal=is_causal or False, src_key_padding_mask=src_key_padding_mask)
    return src if m.norm is None else m.norm(src)


def _where(problem: Exception) -> str:
    """Return the line of the user's code that stopped tracing, and why."""
    why = " ".join(str(problem).split())[:120]
    own = [frame for frame in traceback.extract_tb(problem.__traceback__) if not _of_torch(frame.filename)]
    return f"`{own[-1].line}` ({own[-1].filename}, line {own[-1].lineno}): {why}" if own else why


def _of_torch(filename: str) -> bool:
    return filename.startswith((os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep, "<"))


@contextmanager
def _in_mode(modules: list[nn.Module], mode: Sequence[bool]) -> Iterator[None]:
    before = [m.training for m in modules]
    for m, training in zip(modules, mode, strict=True):
        m.training = training
    try:
        yield
    finally:
        for m, training in zip(modules, before, strict=True):
            m.training = training


def _running(node: fx.Node) -> set[str]:
    """Return the paths in the model of the modules that run this operation."""
    return {path.removeprefix("model").removeprefix(".") for path, _ in node.meta["nn_module_stack"].values()}


def _root(node: fx.Node) -> Any:
    return vars(node.graph)["root"]


def _name(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)) if node.op in ("call_function", "call_method") else ""


def _in_place(node: fx.Node) -> bool:
    if node.op == "call_module":
        return bool(getattr(_held(node), "inplace", False))
    return bool(node.all_input_nodes) and bool(re.search("[^_]_$", _name(node)) or node.kwargs.get("inplace"))


def _held(node: fx.Node) -> Any:
    """Return the module that a node calls, or the tensor that it is."""
    return operator.attrgetter(str(node.target))(_root(node))


def _constants(nodes: list[fx.Node]) -> dict[fx.Node, bool]:
    """Return the nodes that do not depend on the input, and whether a parameter is in them."""
    found: dict[fx.Node, bool] = {}
    for node in nodes:
        if node.op == "get_attr":
            found[node] = isinstance(_held(node), nn.Parameter)
        elif _name(node) and not RANDOM.search(_name(node)) and found.keys() >= set(node.all_input_nodes):
            found[node] = any(found[one] for one in node.all_input_nodes)
    return found


def _has_weights(node: fx.Node, constants: dict[fx.Node, bool]) -> bool:
    if node.op == "call_module":
        return any(isinstance(part, (*WEIGHT_LAYERS, *NOT_A_CHAIN)) for part in _held(node).modules())
    given = [one for one in node.all_input_nodes if constants.get(one)]
    if node in constants or not given:
        return False
    owners = [_root(node).get_submodule(str(one.target).rpartition(".")[0]) for one in given if one.op == "get_attr"]
    return bool(PRODUCTS.fullmatch(_name(node))) or any(isinstance(owner, WEIGHT_LAYERS) for owner in owners)


def _alive(nodes: list[fx.Node], constants: dict[fx.Node, bool]) -> list[set[fx.Node]]:
    """Return, after each node, the values that later ones need; what works in place hands its input on."""
    same: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for i, node in enumerate(nodes):
        for one in node.all_input_nodes:
            last[same[one]] = i
        same[node] = same[node.all_input_nodes[0]] if _in_place(node) else node
    born = {node: i for i, node in enumerate(nodes) if same[node] is node and node not in constants and node in last}
    return [{node for node, start in born.items() if start <= i < last[node]} for i in range(len(nodes))]


def _is_tensor(node: fx.Node) -> bool:
    parts = all(user.target is operator.getitem and isinstance(user.args[1], int) for user in node.users)
    return not parts and _name(node) not in NO_TENSOR


def _places(model: nn.Module, nodes: list[fx.Node], cut: Sequence[str] | None) -> dict[Any, int]:
    """Return after which nodes a block ends: by the number of weight layers before, or by the names in `cut`."""
    constants = _constants(nodes)
    alive, weights = _alive(nodes, constants), [i for i, node in enumerate(nodes) if _has_weights(node, constants)]
    if not weights:
        raise ValueError("the model has no weight layer (Linear or convolution): there is nothing to train")
    if cut is None:
        free = [
            i
            for i, values in enumerate(alive)
            if nodes[i] not in constants and len(values) == 1 and all(map(_is_tensor, values))
        ]
        between = {k: [i for i in free if a <= i < b] for k, (a, b) in enumerate(pairwise(weights))}
        return {k: places[-1] for k, places in between.items() if places}
    found: dict[Any, int] = {}
    for name in cut:
        if name not in dict(model.named_modules()):
            raise ValueError(f"cut: the model has no module {name!r}: take names of model.named_modules()")
        first = next((i for i, node in enumerate(nodes) if node.op != "placeholder" and name in _running(node)), None)
        if not first:
            raise ValueError(f"cut: {name!r} does not run on its own: it stands in a module that stays whole")
        if len(alive[first - 1]) != 1:
            values = ", ".join(sorted(map(str, alive[first - 1])))
            raise ValueError(
                f"cut: {len(alive[first - 1])} tensors are needed from {name!r} on ({values}): cut elsewhere"
            )
        found[name] = first - 1
    for name, (a, b) in zip([*found, "the end"], pairwise([-1, *sorted(found.values()), len(nodes)]), strict=True):
        if not any(a < i <= b for i in weights):
            raise ValueError(f"cut: the block before {name!r} would have no weight layer: leave that name out")
    return found


class _Piece:
    """The nodes after number a up to b, as a block of its own."""

    def __init__(self, nodes: list[fx.Node], a: int, b: int):
        constants = _constants(nodes)
        body = [node for node in nodes[max(a, 0) + 1 : b + 1] if node not in constants]
        inside = set(body)
        self.needed = {one for node in body for one in node.all_input_nodes}
        while True:  # constants, of constants
            more = {one for node in self.needed if node in constants for one in node.all_input_nodes}
            if more <= self.needed:
                break
            self.needed |= more
        self.body = [node for node in nodes if node in inside or (node in constants and node in self.needed)]
        self.inputs = self.needed - inside - constants.keys()
        if b == len(nodes) - 2:
            self.out = nodes[-1].args[0]
        else:
            (self.out,) = _alive(nodes, constants)[b]

    def chain(self) -> list[nn.Module] | None:
        """Return the modules that run one after the other, if that is all."""
        modules, before = [], self.inputs
        for node in self.body:
            if not node.args or node.args[0] not in before or len(node.all_input_nodes) != 1:
                return None
            kind = AS_MODULES.get(node.target)
            if node.op == "call_module" and len(node.args) == 1 and not node.kwargs:
                modules.append(_held(node))
            elif kind is not None and (kind is not nn.Flatten or len(node.args) + len(node.kwargs) > 1):
                modules.append(kind(*node.args[1:], **node.kwargs))
            else:
                return None
            before = {node}
        return modules

    def code(self, block: nn.Module) -> tuple[Any, str]:
        """Return a forward function and its source, and give the block the parts of the model that it uses."""
        graph, values = fx.Graph(), dict[Any, Any]()
        h = graph.placeholder("h")
        values.update(dict.fromkeys(self.inputs, h))
        for node in self.body:
            copied = values[node] = graph.node_copy(node, values.__getitem__)
            if node.op in ("call_module", "get_attr"):
                path, held = str(node.target).removeprefix("model."), _held(node)
                name = path.replace(".", "_")
                while getattr(block, name, held) is not held:
                    name += "_"
                if isinstance(held, (nn.Module, nn.Parameter)):
                    setattr(block, name, held)
                else:  # read where the model has it, since moving the model replaces it
                    owner, _, attribute = str(node.target).rpartition(".")
                    name = f"of_{owner.replace('.', '_')}"
                    vars(block)[name] = _root(node).get_submodule(owner)
                    name = f"{name}.{attribute}"
                copied.target = name
        graph.output(values.get(self.out, h))
        code = graph.python_code("self")
        space = dict(code.globals)
        exec(code.src, space)  # noqa: S102, as torch.fx runs its graphs
        return space["forward"], code.src.strip()


class Traced(nn.Module):
    """A block that is a part of a traced model's code, with the modules and parameters that this uses."""

    _opened: tuple[nn.Module, ...]
    _codes: tuple[Any, ...]

    def __init__(self, opened: list[nn.Module], in_modes: dict[tuple[bool, ...], _Piece]):
        vars(self)["_opened"] = tuple(opened)  # the modules whose code this is
        super().__init__()
        self._codes = tuple((mode, *piece.code(self)) for mode, piece in in_modes.items())

    @property
    def training(self) -> bool:
        return self._opened[0].training

    @training.setter
    def training(self, mode: bool) -> None:
        if vars(self).get("_codes") and mode != self.training:
            for part in self._opened:
                part.training = mode

    def forward(self, h: Tensor) -> Tensor:
        mode = tuple([part.training for part in self._opened])
        code = next((run for known, run, _ in self._codes if known == mode), self._codes[0][1])
        out: Tensor = code(self, h)
        return out

    def extra_repr(self) -> str:
        return "\n".join(dict.fromkeys(source for _, _, source in self._codes))


def _block(opened: list[nn.Module], in_modes: dict[tuple[bool, ...], _Piece]) -> nn.Module:
    chains = [piece.chain() for piece in in_modes.values()]
    alike = len({str(chain) for chain in chains}) == 1  # what stands for a function is made anew each time
    if chains[0] is None or not alike:
        return Traced(opened, in_modes)
    return chains[0][0] if len(chains[0]) == 1 else nn.Sequential(*chains[0])
