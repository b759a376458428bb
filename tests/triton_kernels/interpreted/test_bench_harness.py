"""The harness of ``attn-core bench`` on these kernels: small shapes, checked and timed, ready for a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from triton_cases import SM90, bind

from attn_core.bench import run
from attn_core.bench.measure import Peaks
from attn_core.bench.shapes import grid


class Here:
    """A platform whose kernels are the interpreter's."""

    device = SM90
    catalog = SimpleNamespace(devices={str(SM90): SimpleNamespace(backends=())})

    def attention_backend(self, spec, allow_reference=None, **pins):
        form = {"mla": "materialised" if "prefill_backend" in pins else "absorbed"}.get(spec.kind)
        group = bind(spec, form=form, page_size=None if spec.attn_type == "encoder_only" else 16)
        return SimpleNamespace(groups={"all": group}, decision=SimpleNamespace(digest="0" * 16))

    def synchronize(self):
        pass


@pytest.mark.parametrize("shape", grid("smoke", "float32"), ids=lambda s: s.kind)
def test_every_kind_of_shape(shape):
    peaks = Peaks(copy=1e9, matmul=1e9)
    ((figure,),) = run.figures(Here(), [shape], ["triton"], peaks, rounds=1, least=1e-6)
    assert figure.status == "ok", figure.reason
    assert figure.call is not None
