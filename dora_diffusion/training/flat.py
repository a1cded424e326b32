"""Many small parameters as a few flat ones, so that an optimizer does not pay for each of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from dora_diffusion.numerics.prepare.layout import join, split_like

Groups = list[dict[str, Any]]


class FlatParameters:
    """One flat parameter for each parameter group; the group's own become views of it.

    Clipping and AdamW treat every number alike, so they see the flat ones, and do the same. Not for
    optimizers to which a parameter's shape or size matters.

    Attributes:
        groups: The parameter groups, with a flat parameter each.
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
        self.groups: Groups = [
            group | {"params": [flat]} for group, flat in zip(groups, self._flat, strict=True)
        ]
        for flat, members in zip(self._flat, self._members, strict=True):
            for member, view in zip(members, split_like(flat, members), strict=True):
                member.data = view

    def take_gradients(self) -> None:
        """Give the flat parameters the gradients of their members.

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
        """Let the members' gradients be views of the flat ones, which clipping then changes too."""
        for shares, members in zip(self._shares, self._members, strict=True):
            for share, member in zip(shares, members, strict=True):
                member.grad = None if member.grad is None else share

    def finish(self) -> None:
        """After the optimizer's step: drop the members' gradients, and count them as written.

        A member that had none is what it was before: no weight decay acts on it.
        """
        for member, value in self._unused:
            member.data.copy_(value)
        self._unused = []
        for members in self._members:
            for member in members:
                member.grad = None
                # Memory that is given by ``.data`` brings no version counter along.
                increment_version(member)


def join_states(state: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A saved optimizer's state, with one parameter in each group as flat ones have.

    Args:
        state: Of an optimizer over many parameters, or over flat ones, which is returned as it is.
        groups: The present optimizer's, whose parameters are flat.
    """
    sizes = [[p.numel() for p in group["params"]] for group in groups]
    if all(len(group["params"]) == 1 for group in state["param_groups"]):
        return state
    joined: dict[int, dict[str, Any]] = {}
    saved_groups = []
    for number, (group, (size,)) in enumerate(zip(state["param_groups"], sizes, strict=True)):
        found = [state["state"].get(index) for index in group["params"]]
        saved_groups.append(group | {"params": [number]})
        if not any(found):
            continue
        if not all(found):
            raise ValueError("some of its parameters were never trained")
        joined[number] = {"step": found[0]["step"]}
        for key in ("exp_avg", "exp_avg_sq"):
            joined[number][key] = torch.cat([moments[key].reshape(-1) for moments in found])
        if joined[number]["exp_avg"].numel() != size:
            raise ValueError("its parameters have other sizes")
    return state | {"state": joined, "param_groups": saved_groups}


def _check_memory(flat: Tensor, members: Sequence[Tensor]) -> None:
    place, size = flat.data_ptr(), flat.element_size()
    for member in members:
        if member.data_ptr() != place:
            raise RuntimeError(
                "a trained parameter was moved or replaced while it trains, so that the optimizer "
                "no longer reaches it; build the optimizer after the model is where it stays"
            )
        place += member.numel() * size
