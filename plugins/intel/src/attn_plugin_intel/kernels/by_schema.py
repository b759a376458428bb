"""Calls of a torch operator whose argument list differs between versions, built from the schema it registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from attn_core.errors import MissingKernelError


class Arguments:
    """Where each argument goes, by the names this adapter uses, and a list with the constant ones filled in.

    A schema argument that nobody knows takes its default; without one the operator is another than we know, and
    :class:`MissingKernelError` says so. So it does for a ``needed`` name that the operator lacks: this version cannot
    do what the model asks.
    """

    def __init__(
        self,
        op: Any,
        *,
        aliases: Mapping[str, str],
        constants: Mapping[str, Any],
        varying: frozenset[str],
        needed: Mapping[str, str],
    ) -> None:
        """``aliases``: schema's name -> ours. ``constants``: ours -> value. ``varying``: ours, set per step or call.
        ``needed``: ours -> what it is for, in words."""
        schema = op.default._schema
        self.call: Callable[..., Any] = op.default
        self.template: list[Any] = []
        self.at: dict[str, int] = {}
        self.optional: set[str] = set()
        """Names that may be None."""
        unknown = []
        for place, argument in enumerate(schema.arguments):
            name = aliases.get(argument.name, argument.name)
            self.at[name] = place
            if isinstance(argument.type, torch.OptionalType):
                self.optional.add(name)
            if name not in constants and name not in varying and not argument.has_default_value():
                unknown.append(argument.name)
            self.template.append(constants.get(name, argument.default_value))
        if unknown:
            raise MissingKernelError(
                f"{schema.name} wants {', '.join(unknown)}, which this adapter does not know; it was registered as "
                f"{schema}"
            )
        if missing := [f"{name} ({what})" for name, what in needed.items() if name not in self.at]:
            raise MissingKernelError(
                f"{schema.name} of this version takes no {', '.join(missing)}; it was registered as {schema}"
            )

    def filled(self, values: Mapping[str, Any]) -> list[Any]:
        """The list with some more arguments in place; names that this version does not take are left out."""
        out = self.template.copy()
        for name, value in values.items():
            if name in self.at:
                out[self.at[name]] = value
        return out

    def places(self, *names: str) -> tuple[int, ...]:
        return tuple(self.at[name] for name in names)
