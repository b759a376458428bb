"""PyTorch's one slot for foreign devices: two vendors' packages in one environment, and in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from attn_core.errors import AttnCoreError
from attn_core.plugins import slot_conflict
from attn_core.runtime import services
from attn_core.spec import PlatformSpec
from dists import distribution


def platform(name: str, module: str | None) -> PlatformSpec:
    return PlatformSpec(name=name, torch_device=name, torch_module=module)


PLATFORMS = (platform("cuda", None), platform("acme", "acme_torch"), platform("umbra", "umbra_torch"))


@pytest.mark.parametrize("here", [(), ("acme",), ("umbra",)])
def test_one_package_at_most_is_as_it_should_be(site: Path, here: tuple[str, ...]) -> None:
    for name in here:
        distribution(site, f"{name}-torch", modules={f"{name}_torch": "raise RuntimeError('imported')"})
    assert slot_conflict(PLATFORMS) is None


def test_two_packages_that_want_the_slot(site: Path) -> None:
    for name in ("umbra", "acme"):
        distribution(site, f"{name}-torch", modules={f"{name}_torch": "raise RuntimeError('imported')"})
    text = slot_conflict(PLATFORMS) or ""
    for word in ("acme_torch and umbra_torch", "PrivateUse1", "TORCH_DEVICE_BACKEND_AUTOLOAD=0"):
        assert word in text


def test_a_slot_that_is_taken_is_named_before_anything_is_imported(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(site, "acme-torch", modules={"acme_torch": "raise RuntimeError('imported')"})
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "umbra")
    with pytest.raises(AttnCoreError, match=r"'acme'.*PrivateUse1.*'umbra'"):
        services.ready(PLATFORMS[1])
    services.ready(PLATFORMS[0])
    monkeypatch.setattr(torch._C, "_get_privateuse1_backend_name", lambda: "acme")
    with pytest.raises(RuntimeError, match="imported"):
        services.ready(PLATFORMS[1])
