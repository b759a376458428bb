"""Installing all five plugins together changes no decision of any of them alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
from together import ALONE, MODELS, NAMES, answer, devices, plugins

from attn_core import Device, simulate
from attn_core.hookspecs import hookimpl
from attn_core.plugins import Plugins

ALL = plugins(*reversed(NAMES))
KNOWN = [pytest.param(name, device, id=f"{name}-{device.arch}") for name, device in devices()]
OPTIONS = (
    {"backend": "fa3"}, {"backend": "flashmla"}, {"decode_backend": "triton"},  # names that several plugins have
    {"page_size": 64}, {"lse": True, "tensor_parallel": 2},
)  # fmt: skip
FEW = ("llama-3.1-8b", "deepseek-v3", "gte-small")


def differing(
    name: str, device: Device, models: Iterable[str], together: Plugins = ALL, **options: object
) -> Iterator[tuple[str, str]]:
    """(model, key) of what differs, but for the reports: they list what is installed, which is the question here."""
    alone, all_five = (simulate(device, plugins=p) for p in (ALONE[name], together))
    for model in models:
        one, other = (answer(p, MODELS[model], **options) for p in (alone, all_five))
        for found in (one, other):
            assert all(r["status"] == "ok" for r in found.pop("plugins", ()))
        yield from ((model, key) for key in sorted({*one, *other}) if one.get(key) != other.get(key))


@pytest.mark.parametrize(("name", "device"), KNOWN)
def test_every_model_is_decided_as_by_one_plugin_alone(name, device):
    assert not list(differing(name, device, MODELS))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_mean_the_same(options):
    for name, device in devices():
        assert not list(differing(name, device, FEW, **options))


class Meddler:
    """A plugin that offers MATE's kernels to every device."""

    @hookimpl
    def attn_backends(self, device: Device):
        mp31 = next(d for name, d in devices() if name == "musa" and d.arch == "mp31")
        own = ALONE["musa"].catalog(mp31).devices[str(mp31)].backends
        return [replace(r, platform=device.platform) for r in own if r.plugin == "musa"]


def test_a_plugin_that_speaks_about_foreign_devices_would_be_noticed():
    meddled = plugins(*NAMES, more=[("meddler", Meddler())])
    for name, device in devices():
        if device.platform in ("cuda", "rocm"):
            found = {key for _, key in differing(name, device, FEW, meddled)}
            assert "rejections" in found, "even where none of its rows fits, it shows"
