"""Parameters that an optimizer sees: those that train themselves, or a few flat ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dora_diffusion.adapters.norms.layout import join, split_like

Groups = list[dict[str, Any]]


class SteppedParameters:
    """Parameters that an optimizer sees: those that train themselves.

    Attributes:
        groups: The parameter groups, with what the optimizer is given.
        whole: Of these, what every process has whole.
    """

    def __init__(self, groups: Groups, whole: Sequence[nn.Parameter] | None = None) -> None:
        self.groups = groups
        self.whole = list(self) if whole is None else list(whole)

    def __iter__(self) -> Iterator[nn.Parameter]:
        return (parameter for group in self.groups for parameter in group["params"])

    def take_gradients(self) -> None:
        """Prepare the gradients for the optimizer after the backward passes."""

    def share_gradients(self) -> None:
        """Make clipping change the parameters' own gradients."""

    def clip(self, limit: float, accelerator: Any) -> Tensor:
        """Limit the gradients' L2 norm; return it as it was; 0: no limit."""
        if limit:
            norm: Tensor = accelerator.clip_grad_norm_(list(self), limit)
            return norm
        accelerator.unscale_gradients()
        return torch.nn.utils.get_total_norm([p.grad for p in self if p.grad is not None])

    def finish(self) -> None:
        """Drop the gradients after the optimizer's step."""

    def gather_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """An optimizer's state with whole moments, in the first process."""
        return state

    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of a whole state that is this process's."""
        return state


class FlatParameters(SteppedParameters):
    """One flat parameter for each parameter group; the group's own become views of it.

    Clipping and AdamW treat every number alike, so they see the flat ones, and do the same. Not for
    optimizers to which a parameter's shape or size matters.
    """

    def __init__(self, groups: Groups) -> None:
        self._members: list[list[nn.Parameter]] = [list(group["params"]) for group in groups]
        self._flat = [nn.Parameter(join(members)) for members in self._members]
        self._gradients = [torch.zeros_like(flat) for flat in self._flat]
        self._shares = [
            split_like(gradient, members)
            for gradient, members in zip(self._gradients, self._members, strict=True)
        ]
        self._unused: list[tuple[nn.Parameter, Tensor]] = []
        each = zip(groups, self._flat, strict=True)
        super().__init__([group | {"params": [flat]} for group, flat in each])
        for flat, members in zip(self._flat, self._members, strict=True):
            for member, view in zip(members, split_like(flat, members), strict=True):
                member.data = view

    def take_gradients(self) -> None:
        """Copy the gradients of their members to the flat parameters.

        Raises:
            RuntimeError: If a member's memory was exchanged, as ``.to()`` does it.
        """
        self._unused = []
        each = zip(self._flat, self._gradients, self._shares, self._members, strict=True)
        for flat, gradient, shares, members in each:
            _check_memory(flat, members)
            found = [member.grad for member in members]
            pairs = [(s, grad) for s, grad in zip(shares, found, strict=True) if grad is not None]
            unused = [m for m, grad in zip(members, found, strict=True) if grad is None]
            if unused:
                gradient.zero_()
                self._unused += [(m, m.detach().clone()) for m in unused if pairs]
            if pairs:
                torch._foreach_copy_([share for share, _ in pairs], [grad for _, grad in pairs])
            flat.grad = gradient if pairs else None

    def share_gradients(self) -> None:
        """Make the members' gradients views of the flat ones, which clipping then changes too."""
        for shares, members in zip(self._shares, self._members, strict=True):
            for share, member in zip(shares, members, strict=True):
                member.grad = None if member.grad is None else share

    def finish(self) -> None:
        """Drop the members' gradients after the optimizer's step, and count them as written.

        A member that had none is what it was before: no weight decay acts on it.
        """
        for member, value in self._unused:
            member.data.copy_(value)
        self._unused = []
        for members in self._members:
            for member in members:
                member.grad = None
            # Memory that is given by ``.data`` brings no version counter along.
            increment_version(members)


def _check_memory(flat: Tensor, members: Sequence[Tensor]) -> None:
    place, size = flat.data_ptr(), flat.element_size()
    for member in members:
        if member.data_ptr() != place:
            raise RuntimeError(
                "a trained parameter was moved or replaced while it trains, so that the optimizer "
                "no longer reaches it; build the optimizer after the model is where it stays"
            )
        place += member.numel() * size
