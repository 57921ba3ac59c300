"""A model as a list of blocks: each weight layer with everything after it, up to the next one."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from memdfa_lab.core.compat import autocast_is_on, has_hooks, version
from memdfa_lab.core.cut import NOT_A_CHAIN, WEIGHT_LAYERS, Traced, traced_blocks
from memdfa_lab.core.watcher import has_data


def as_blocks(
    model: nn.Module | Iterable[nn.Module], cut: Sequence[str] | None = None, granularity: str | None = None
) -> nn.Sequential:
    """Return the model's own modules, grouped into blocks that are cut before each weight layer.

    An `nn.Sequential` or a list of modules is opened, and so are those nested inside it. Any other module in it stays
    whole, so that a residual unit (or a group of layers that you want to keep together) is one block. Modules before
    the first weight layer belong to the first block. The blocks hold the modules of `model`: nothing is copied, renamed
    or moved. Cutting a model that is already cut returns the same blocks.

    Any other model is traced by torch.fx, and cut between two weight layers where the rest needs one tensor only.
    `cut`: names of its modules; a block begins at each of them, and nowhere else. `granularity`: "unit" keeps each
    module of an nn.Sequential or nn.ModuleList whole; "layer" opens these modules, also those of an nn.Sequential.
    torch.fx does not record a test by `is`, such as `x.dtype is torch.long`, so a rule's first step compares the
    blocks' output with the model's.

    Raises TypeError if the model cannot be traced, or holds complex numbers; ValueError if it has no weight layer, has
    hooks of its own, or has nothing that can be trained, or if two blocks share a parameter or a buffer.
    """
    if isinstance(model, nn.Module) and has_hooks(model):
        raise ValueError("the model has hooks, and only its parts are called: move the hooks to the parts")
    before_first_weight: list[nn.Module] = []
    groups: list[list[nn.Module]] = []
    if granularity not in (None, "layer", "unit"):
        raise ValueError(f'granularity must be "layer" or "unit", not {granularity!r}')
    if isinstance(model, nn.Module) and not isinstance(model, (torch.fx.GraphModule, Traced, *NOT_A_CHAIN)):
        if cut is not None or granularity == "layer" or not _is_chain(model):
            cut = [cut] if isinstance(cut, str) else cut
            groups, model = [[block] for block in traced_blocks(model, cut, granularity)], []
    elif cut is not None:
        raise TypeError("cut= names the modules of one model: pass the model, not a list")
    for module in _chain(model):
        if isinstance(module, Traced) or any(isinstance(part, WEIGHT_LAYERS) for part in module.modules()):
            groups.append([*before_first_weight, module])
            before_first_weight = []
        else:
            (groups[-1] if groups else before_first_weight).append(module)
    if not groups:
        raise ValueError("the model has no weight layer (Linear or convolution): there is nothing to train")
    blocks = nn.Sequential(*(group[0] if len(group) == 1 else nn.Sequential(*group) for group in groups))
    if not any(parameter.requires_grad for parameter in blocks.parameters()):
        raise ValueError("every parameter is frozen (requires_grad=False): unfreeze what should be trained")
    for name, tensor in _tensors(blocks):
        if is_lazy(tensor):
            raise ValueError(f"{name} has no shape yet: run the model once on a batch before it is cut into blocks")
        if tensor.is_complex():
            raise TypeError(f"{name} is {tensor.dtype}: the rules take networks of real numbers, float32 for example")
    _refuse_sharing(blocks)
    return blocks


def parts_of(block: nn.Module) -> list[nn.Module]:
    """Return the modules that a block runs, in order."""
    return list(_chain(block)) if _is_chain(block) and not has_hooks(block) else [block]


def describe(block: nn.Module) -> str:
    """Return the kinds of modules that a block runs."""
    parts = [] if isinstance(block, Traced) else parts_of(block)
    return " + ".join(type(part).__name__ for part in parts or [*block.children()] or [block])


def run_block(block: nn.Module, h: Tensor) -> Tensor:
    """Return block(h). Raises TypeError if that is not a tensor, RuntimeError if the block changed h in place."""
    forget_casts()
    before = version(h)
    out = block(h)
    if not isinstance(out, Tensor):
        raise TypeError(f"a block maps a tensor to a tensor; {describe(block)} returned {type(out).__name__}")
    if version(h) != before:
        raise RuntimeError(
            f"{describe(block)} works in place on its input, which the block before it (or the caller) still "
            "needs: use inplace=False where it begins"
        )
    return out


def forget_casts() -> None:
    """Drop autocast's cached casts of weights: they would grow with depth, and be older than the last update."""
    if autocast_is_on():
        torch.clear_autocast_cache()


def _chain(model: nn.Module | Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules of a chain in the order in which they run."""
    if isinstance(model, torch.fx.GraphModule):
        raise TypeError("the model is a traced graph, whose modules say nothing of their order: pass it untraced")
    if isinstance(model, nn.Module) and not _is_chain(model):
        raise TypeError(
            f"{type(model).__name__} is not a chain of modules: pass an nn.Sequential, or a list of modules in the "
            "order in which they run (a unit with a skip inside is one module)"
        )
    if not isinstance(model, Iterable) or isinstance(model, (str, bytes, dict)):
        raise TypeError(f"expected an nn.Sequential or a list of modules, got {type(model).__name__}")
    for module in model:
        if not isinstance(module, nn.Module):
            raise TypeError(f"expected a list of modules, got {type(module).__name__} in it")
        if isinstance(module, NOT_A_CHAIN):
            raise TypeError(
                f"{type(module).__name__} does not map one tensor to one tensor of real numbers: wrap it in a module "
                "that does, or leave it out"
            )
        if _is_chain(module) and not has_hooks(module):  # an opened module is not called: its hooks would not run
            yield from _chain(module)
        else:
            yield module


def _is_chain(module: nn.Module) -> bool:
    """Tell whether the module runs its children one after the other; a subclass may have another forward."""
    plain = isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward
    return plain or isinstance(module, nn.ModuleList)


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _refuse_sharing(blocks: nn.Sequential) -> None:
    owner: dict[int, tuple[int, str]] = {}
    for i, block in enumerate(blocks):
        for name, tensor in _tensors(block):
            for key in _identities(tensor):
                first, first_name = owner.setdefault(key, (i, name))
                if first != i:
                    raise ValueError(
                        f"blocks {first} and {i} share a tensor ({first_name} and {name}): each block is updated on "
                        "its own, so give each its own parameters, or put both layers into one module"
                    )


def _identities(tensor: Tensor) -> Iterator[int]:
    yield id(tensor)
    if tensor.numel() and type(tensor) in (Tensor, nn.Parameter) and has_data(tensor):
        yield -tensor.data_ptr()  # finds two parameters over one memory; negative, so that it equals no id
