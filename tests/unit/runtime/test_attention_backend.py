"""What attention_backend() returns: one group's functions are its own; several groups are told apart."""

from __future__ import annotations

import pytest
from simple_kernels import CPU, Pick, group, spec

from attn_core.errors import AttnCoreError, BadInputError, BindError
from attn_core.runtime import AttentionBackend, BoundGroup, SeveralGroupsError
from attn_core.runtime.bound import DELEGATED
from attn_core.spec import Decision, EngineOptions, LinearSpec, ModelSpec


def backend(model: ModelSpec, groups: dict[str, BoundGroup]) -> AttentionBackend:
    decision = Decision(
        devices={"": CPU}, model=model, options=EngineOptions(), groups={}, roles={}, values={}, because={}
    )
    return AttentionBackend(decision=decision, groups=groups)


def two_groups() -> AttentionBackend:
    full, window = spec(layers=(0, 2)), spec(layers=(1, 3), sliding_window=4)
    bound = {"full": group(full), "window": group(window, name="window")}
    return backend(ModelSpec(groups={"full": full, "window": window}), bound)


def test_with_one_group_its_functions_are_the_backends() -> None:
    only = group(spec())
    attn = backend(ModelSpec.of(spec()), {"full": only})
    for name in DELEGATED:
        assert getattr(attn, name) is getattr(only, name), name
        assert name in vars(attn), "a plain attribute, found without a lookup function"
    assert attn.group_of(17) is only


def test_linear_groups_are_decided_but_not_bound() -> None:
    full = spec(layers=(1,))
    linear = LinearSpec(kind="gdn", num_heads=2, head_dim=8, dtype="float32", layers=(0,))
    attn = backend(ModelSpec(groups={"full": full, "gdn": linear}), {"full": group(full)})
    assert attn.plan is attn.groups["full"].plan
    with pytest.raises(BadInputError, match="layer 0 belongs to group 'gdn', which the engine runs itself"):
        attn.group_of(0)


def test_several_groups_are_asked_one_by_one() -> None:
    attn = two_groups()
    assert attn.group_of(3) is attn.groups["window"]
    for name in DELEGATED:
        with pytest.raises(AttnCoreError, match=rf"2 attention groups \(full, window\), each with its own {name}"):
            getattr(attn, name)
    assert not hasattr(attn, "plan"), "hasattr still answers"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = attn.nonsense
    assert issubclass(SeveralGroupsError, AttributeError)
    with pytest.raises(TypeError):
        attn.groups["third"] = attn.groups["full"]  # type: ignore[index]


def test_groups_that_share_a_cache_must_see_it_alike() -> None:
    full, reader = spec(layers=(0,)), spec(layers=(1,), kv_from="full")
    model = ModelSpec(groups={"full": full, "reader": reader})
    backend(model, {"full": group(full), "reader": group(reader, name="reader")})
    wide = Pick(head_dim=16)
    other = group(reader, name="reader", prefill=wide, decode=wide)
    with pytest.raises(BindError, match="'reader' reads the cache of 'full'; they differ in"):
        backend(model, {"full": group(full), "reader": other})


def test_a_model_without_attention_binds_nothing() -> None:
    linear = LinearSpec(kind="gdn", num_heads=2, head_dim=8, dtype="float32")
    with pytest.raises(BindError, match="no attention group"):
        backend(ModelSpec.of(linear), {})
