"""What one plugin can do wrong while it loads, registers and answers, and that it all becomes text."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_core.domain import Domain, OneOf
from attn_core.hookspecs import hookimpl
from attn_core.plugins.guard import HOOKS, ContainedError, Hooks, guard, load
from attn_core.plugins.validate import check_item
from attn_core.spec import BackendSpec, Constraint, Device, PlatformSpec, Requirement

DEVICE = Device(platform="acme", arch="a1")


def row(**changes: Any) -> BackendSpec:
    plain = {"backend": "fast", "role": "decode", "platform": "acme", "accepts": {"dtype": "bfloat16", "head_dim": 64}}
    return BackendSpec(**{**plain, **changes})


def module(**functions: Callable[..., Any]) -> ModuleType:
    out = ModuleType("acme")
    for name, f in functions.items():
        setattr(out, name, hookimpl(f))
    return out


def answers(function: Callable[..., Any]) -> list[BackendSpec]:
    return Hooks(module(attn_backends=function)).collect("attn_backends", BackendSpec, device=DEVICE)


def test_the_hooks_are_the_ones_the_contract_names() -> None:
    assert HOOKS == ("attn_platforms", "attn_probe_devices", "attn_backends", "attn_constraints")


def test_lists_generators_none_and_hooks_without_arguments_are_all_answers() -> None:
    def generator(device: Device) -> Iterator[BackendSpec]:
        yield row(rank=device.index)

    assert answers(lambda: [row()]) == [row()]
    assert answers(generator) == [row()]
    assert answers(lambda device: None) == []
    assert Hooks(ModuleType("empty")).collect("attn_backends", BackendSpec, device=DEVICE) == []


def test_a_generator_that_raises_midway_loses_all_its_items() -> None:
    def broken(device: Device) -> Iterator[BackendSpec]:
        yield row()
        yield row(backend="second")
        raise RuntimeError("table lost")

    with pytest.raises(ContainedError, match=r"^attn_backends item 2: RuntimeError: table lost$"):
        answers(broken)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (lambda: 7, "attn_backends: TypeError: 'int' object is not iterable"),
        (lambda: row(), "attn_backends: TypeError: 'BackendSpec' object is not iterable"),
        (lambda: [row(), "fast"], "attn_backends item 1: DeclarationError: got str, wanted BackendSpec"),
        (lambda: [DEVICE], "attn_backends item 0: DeclarationError: got Device, wanted BackendSpec"),
        (lambda: [row(role="decod")], "attn_backends: DeclarationError: BackendSpec('fast', 'decod'): unknown role"),
        (lambda: 1 / 0, "attn_backends: ZeroDivisionError: division by zero"),
        (lambda: sys.exit(3), "attn_backends: SystemExit: 3"),
    ],
)
def test_wrong_answers_name_hook_item_and_error(answer: Callable[[], Any], text: str) -> None:
    with pytest.raises(ContainedError) as e:
        answers(answer)
    assert str(e.value).startswith(text)


def test_a_generator_without_end_is_cut() -> None:
    def endless(device: Device) -> Iterator[BackendSpec]:
        while True:
            yield one

    one = row()
    with pytest.raises(ContainedError, match="more than 10000 items"):
        answers(endless)


def test_interrupts_are_the_users() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answers(interrupted)


def test_an_exception_that_cannot_be_printed_is_still_contained() -> None:
    class EvilError(Exception):
        def __str__(self) -> str:
            raise ValueError

    with pytest.raises(ContainedError, match="import: EvilError: its message cannot be printed"), guard("import"):
        raise EvilError


# ---- registering -----------------------------------------------------------------------------------------------------


def refusal(plugin: Any) -> ContainedError:
    with pytest.raises(ContainedError) as e:
        Hooks(plugin)
    return e.value


def test_misspelt_hooks_get_a_suggestion() -> None:
    e = refusal(module(attn_backend=lambda device: []))
    assert str(e) == "register: unknown hook 'attn_backend'; did you mean 'attn_backends'?"
    assert "attn_probe_devices" in e.hint


def test_a_hook_of_a_newer_contract_may_be_marked_optional() -> None:
    plugin = module(attn_backends=lambda: [row()])
    plugin.attn_tune = hookimpl(optionalhook=True)(lambda device: [])  # type: ignore[attr-defined]
    assert Hooks(plugin).names == {"attn_backends"}


def test_a_hook_without_the_marker_is_not_silently_ignored() -> None:
    plugin = ModuleType("acme")
    plugin.attn_backends = lambda device: []  # type: ignore[attr-defined]
    assert "attn_backends is not marked" in str(refusal(plugin))


def test_helpers_with_our_prefix_are_left_alone() -> None:
    plugin = module(attn_backends=lambda: [row()])
    plugin.attn_table = lambda: 1  # type: ignore[attr-defined]
    assert Hooks(plugin).names == {"attn_backends"}


def test_unknown_arguments_wrappers_and_defaults_are_refused() -> None:
    assert "devise" in str(refusal(module(attn_backends=lambda devise: [])))
    assert "gives its argument 'device' a default" in str(refusal(module(attn_backends=lambda device=None: [])))
    wrapper = ModuleType("acme")

    def attn_backends(device: Device) -> Iterator[None]:
        yield

    wrapper.attn_backends = hookimpl(wrapper=True)(attn_backends)  # type: ignore[attr-defined]
    assert "declared as a wrapper" in str(refusal(wrapper))


def test_a_failed_registration_leaves_nothing_behind() -> None:
    """The same module, mended, registers again: no hook of the first attempt is left anywhere."""
    plugin = module(attn_backends=lambda: [row()], attn_constraints=lambda devise: [])
    refusal(plugin)
    plugin.attn_constraints = hookimpl(lambda device: [])  # type: ignore[attr-defined]
    hooks = Hooks(plugin)
    assert hooks.names == {"attn_backends", "attn_constraints"}
    assert hooks.collect("attn_backends", BackendSpec, device=DEVICE) == [row()]


def test_only_our_prefix_is_read_from_a_lazy_module() -> None:
    touched: list[str] = []

    class Lazy(ModuleType):
        def __dir__(self) -> list[str]:
            return ["heavy", "kernels", "attn_backends"]

        def __getattr__(self, name: str) -> Any:
            touched.append(name)
            return lambda: None

    plugin = Lazy("lazy")
    plugin.attn_backends = hookimpl(lambda: [row()])  # type: ignore[attr-defined]
    assert Hooks(plugin).collect("attn_backends", BackendSpec, device=DEVICE) == [row()]
    assert "heavy" not in touched
    assert "kernels" not in touched


def test_plugins_are_never_compared_with_each_other() -> None:
    class Hostile:
        def __eq__(self, other: object) -> bool:
            if other is not self:
                raise RuntimeError("compared with a stranger")
            return True

        __hash__ = None  # type: ignore[assignment]

        @hookimpl
        def attn_backends(self) -> list[BackendSpec]:
            return [row()]

    a, b = Hooks(Hostile()), Hooks(Hostile())
    assert a.collect("attn_backends", BackendSpec, device=DEVICE) == b.collect(
        "attn_backends", BackendSpec, device=DEVICE
    )


def test_references_name_modules_or_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = ModuleType("acme_pkg")
    fake.inner = SimpleNamespace(plugin=7)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "acme_pkg", fake)
    assert load("acme_pkg") is fake
    assert load("acme_pkg:inner.plugin") == 7
    assert load("acme_pkg [extra]") is fake
    with pytest.raises(ContainedError, match=r"^import: ModuleNotFoundError"):
        load("acme_missing")
    with pytest.raises(ContainedError, match=r"^import: AttributeError"):
        load("acme_pkg:nothing")


# ---- material --------------------------------------------------------------------------------------------------------


class Subclass(BackendSpec):
    pass


class Odd:
    """Hashable, unprintable by JSON: what must not reach the resolver."""


@pytest.mark.parametrize(
    "item",
    [
        row(evidence=3),
        row(evidence=Odd()),
        row(variants={"long": Odd()}),
        row(variants={1: "x"}),
        row(needs={"wgmma", 9}),
        row(accepts={"dtype": "bfloat16", "head_dim": Domain(step=0)}),
        row(accepts={"dtype": "bfloat16", "head_dim": Domain(step=16, max="big")}),  # type: ignore[arg-type]
        row(accepts={"dtype": "bfloat16", "head_dims": OneOf((64, "x"))}),
        row(accepts={"dtype": "bfloat16", "head_dims": OneOf((64,))}),
        row(accepts={"dtype": "bfloat16", "head_dim": 64, "logit_softcap": OneOf(float("nan"))}),
        row(requires=Requirement("flash>=1", written_for="newest")),
        row(requires=Requirement("flash>=1", symbols=(1,))),  # type: ignore[arg-type]
        row(rank=0, form=None, unified=Odd()),
        Subclass(**{f: getattr(row(), f) for f in ("backend", "role", "platform", "accepts")}),
    ],
)
def test_declarations_are_plain_data_in_every_corner(item: BackendSpec) -> None:
    with pytest.raises(ValueError, match=r"."):
        check_item(item, BackendSpec)


def test_devices_platforms_and_constraints_are_checked_too() -> None:
    check_item(DEVICE, Device)
    check_item(PlatformSpec(name="acme", torch_device="acme", known=(DEVICE,), aliases={"best": "a1"}), PlatformSpec)
    rule = Constraint(name="same page", when={"decode": "fast"}, then={"page_size": [64]}, because="measured")
    check_item(rule, Constraint)
    for bad, kind in (
        (replace(DEVICE, versions={"driver": 580}), Device),
        (replace(DEVICE, isa=frozenset({1})), Device),
        (PlatformSpec(name="acme", torch_device="acme", known=(replace(DEVICE, name=Odd()),)), PlatformSpec),
        (replace(rule, evidence=Odd()), Constraint),
    ):
        with pytest.raises(ValueError, match=r"."):
            check_item(bad, kind)


@given(st.sampled_from([BackendSpec, Constraint, Device, PlatformSpec]), st.one_of(st.none(), st.integers(), st.text()))
def test_nothing_but_the_promised_type_passes(kind: type, item: object) -> None:
    with pytest.raises(ValueError, match="wanted"):
        check_item(item, kind)
