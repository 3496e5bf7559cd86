"""Operations as PyTorch's compilers see them: one node of a graph each, and one its gradient.

``torch.compile`` and ``torch.export`` cannot look into a compiled kernel, nor into a loop over
chunks whose number depends on the batch. So what has a backward pass of its own is registered with
``torch.library`` as well. Without a compiler the same two functions are called directly, through
an ``autograd.Function``: the dispatcher would cost more than the smaller of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "fairchem_equiformer"

# The kernels below choose the device themselves, and call operations that PyTorch has for each.
_KEY = "CompositeExplicitAutograd"
_library = torch.library.Library(NAMESPACE, "DEF")

NAMES: set[str] = set()
"""Of all operations that are registered."""


def register(
    name: str,
    arguments: str,
    forward: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Sequence[Tensor | None]] | None = None,
    gradients: str = "",
    *,
    keeps: bool = False,
) -> Callable[..., Any]:
    """Register an operation, and as another one its gradient.

    Args:
        name: of the operation; that of its gradient ends in ``_backward``.
        arguments: types and names, as in a schema of PyTorch.
        forward: gives a new tensor; with ``keeps`` also a second one, for the backward pass.
        fake: gives such tensors without numbers, for the same arguments.
        backward: takes the gradient of the first result, the arguments, and what was kept; gives
            the gradients of all tensors that ``gradients`` names, in that order, and None for those
            that are missing.
        gradients: names of arguments, with spaces between; may be lists of tensors.
        keeps: see ``forward``.

    Returns:
        What to call where :func:`torch.compiler.is_compiling`.
    """
    results = "(Tensor, Tensor)" if keeps else "Tensor"
    operation: Callable[..., Any] = _define(f"{name}({arguments}) -> {results}", forward, fake)
    if backward is None:
        _refuse_gradient(name)
        return operation
    types = [argument.split()[0] for argument in arguments.split(", ")]
    names = [argument.split()[-1] for argument in arguments.split(", ")]
    wanted = [names.index(argument) for argument in gradients.split()]

    def fresh(*tensors: Any) -> list[Tensor]:
        with _autograd_below():
            return _apart([t.contiguous() for t in backward(*tensors) if t is not None])

    def fake_backward(_: Tensor, *values: Any) -> list[Tensor]:
        return [t.new_empty(t.shape) for index in wanted for t in _tensors(values[index])]

    kept = ", Tensor kept" if keeps else ""
    schema = f"{name}_backward(Tensor grad, {arguments}{kept}) -> Tensor[]"
    gradient = _define(schema, fresh, fake_backward)
    _refuse_gradient(f"{name}_backward")

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [t for value in inputs for t in _tensors(value)]
        ctx.arguments = [None if _tensors(value) else value for value in inputs]
        ctx.counts = [len(_tensors(value)) for value in inputs]
        if keeps:
            ctx.mark_non_differentiable(output[1])
            tensors.append(output[1])
        ctx.save_for_backward(*tensors)

    def differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        values = [
            _taken(saved, kind, count) if count else value
            for kind, count, value in zip(types, ctx.counts, ctx.arguments, strict=True)
        ]
        found = iter(gradient(grad, *values, *saved))
        out: list[Any] = [
            [None] * count if kind == "Tensor[]" else None
            for kind, count in zip(types, ctx.counts, strict=True)
        ]
        for index in wanted:
            if ctx.counts[index]:
                out[index] = _taken(found, types[index], ctx.counts[index])
        return tuple(out)

    torch.library.register_autograd(
        f"{NAMESPACE}::{name}", differentiate, setup_context=keep, lib=_library
    )
    return operation


def _apart(tensors: list[Tensor]) -> list[Tensor]:
    """The same, each all that is in its memory: results of an operation must be."""
    memory: set[int] = set()
    found = []
    for tensor in tensors:
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in memory or storage.nbytes() != tensor.nbytes
        found.append(tensor.clone() if shared else tensor)
        memory.add(storage.data_ptr())
    return found


def _autograd_below() -> Any:
    """Within, autograd works also where PyTorch has left it for good: a backward pass needs it."""
    excluded = torch._C._dispatch_tls_local_exclude_set()  # noqa: SLF001
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):  # noqa: SLF001
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()  # noqa: SLF001
    return torch._C._ForceDispatchKeyGuard(included, excluded)  # noqa: SLF001


def _define(schema: str, function: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    name = schema.partition("(")[0]
    _library.define(schema)
    NAMES.add(name)
    _library.impl(name, function, _KEY)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _refuse_gradient(name: str) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError(f"the operation {name} has no gradient")

    torch.library.register_autograd(f"{NAMESPACE}::{name}", refuse, lib=_library)


def _tensors(value: Any) -> list[Tensor]:
    """Those in one argument."""
    if isinstance(value, Tensor):
        return [value]
    return [t for t in value if isinstance(t, Tensor)] if isinstance(value, list) else []


def _taken(tensors: Iterator[Tensor], kind: str, count: int) -> Any:
    """The next of some tensors, as an argument of this type."""
    return [next(tensors) for _ in range(count)] if kind == "Tensor[]" else next(tensors)


def by_autograd(
    function: Callable[..., Tensor],
    grad: Tensor,
    inputs: Sequence[Tensor],
    wanted: Sequence[bool] | None = None,
) -> list[Tensor | None]:
    """Gradients of a function of tensors, which is computed again.

    Args:
        function: gives one tensor.
        grad: of that one.
        inputs: of the function.
        wanted: which of their gradients to compute; by default all.
    """
    wanted = wanted or [True] * len(inputs)
    leaves = [t.detach().requires_grad_(want) for t, want in zip(inputs, wanted, strict=True)]
    with torch.enable_grad():
        out = function(*leaves)
    found = iter(torch.autograd.grad(out, [t for t in leaves if t.requires_grad], grad))
    return [next(found) if want else None for want in wanted]


def present(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[bool]]:
    """The tensors among some that may be missing, and which they are: a schema knows no others."""
    return [t for t in tensors if t is not None], [t is not None for t in tensors]


def with_missing(tensors: Sequence[Tensor], there: Sequence[bool]) -> list[Tensor | None]:
    """Inverse of :func:`present`."""
    found = iter(tensors)
    return [next(found) if is_there else None for is_there in there]
