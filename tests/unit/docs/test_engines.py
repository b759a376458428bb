"""The engine's page and the package's README: their code runs, in order, in one namespace per document."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from docblocks import blocks

from attn_core import Batch, BindError, simulate
from attn_core.plugins import load_plugins

ROOT = Path(__file__).parents[3]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("docs/engines.md", "core/README.md")}
CONFIG = ROOT / "tests" / "data" / "models" / "gpt-oss-20b.json"

sys.path.append(str(ROOT / "tests" / "unit" / "runtime"))
stand_in = importlib.import_module("simple_kernels")
mla = importlib.import_module("test_prefill_with_context")


def code(page: str, argument: str = "") -> list[str]:
    """Blocks to run; they run on the CPU whatever this machine has."""
    found = [b.body for b in blocks(PAGES[page]) if (b.kind, b.argument) == ("run", argument)]
    assert found
    return [body.replace("get_platform()", 'get_platform("cpu")') for body in found]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(CONFIG, tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_is_run(page: str) -> None:
    assert {b.kind for b in blocks(PAGES[page]) if b.language == "python"} == {"run"}


def test_the_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    space: dict[str, Any] = {}
    for body in code("docs/engines.md"):
        exec(body, space)
    told = capsys.readouterr().out
    assert "GptOssForCausalLM on cpu:" in told
    assert "full prefill torch_native pin kv_cache_dtype nvfp4" in told
    assert re.search(r"^\('without kv_cache_dtype=nvfp4: ", told, re.MULTILINE)
    assert re.search(r"^sliding 128 \d+ NHD bfloat16$", told, re.MULTILINE)
    assert "absorbed packed" in told
    assert space["order"] == [1, 2, 0]
    assert space["out"].shape == (9, 16, 512)
    assert space["out"].isfinite().all()


def test_mla_in_both_forms() -> None:
    space: dict[str, Any] = {}
    (body,) = code("docs/engines.md", "materialised")
    exec(body, space)
    for materialised in (True, False):
        group = mla.mla_group(None if materialised else stand_in.Pick(form="absorbed", claims=stand_in.NATIVE))
        assert group.materialised is materialised
        batch, cache, q, latent, rope = mla.step(group)
        k, v = mla.new_rows(batch, latent, rope)
        new = cache.data[0].flatten(0, 1)[batch.slot_mapping].split((mla.LATENT, mla.ROPE), dim=-1)
        plan, absorbed_q = group.plan(batch), torch.randn(batch.num_tokens, mla.H, mla.LATENT + mla.ROPE)
        a, b = space["mla_step"](group, plan, cache, absorbed_q, *new, q, k, v, mla.expand)
        assert a.shape == (1 if materialised else 11, mla.H, mla.LATENT)
        assert (b is not None) is materialised
        if materialised:
            torch.testing.assert_close(b, mla.expected(batch, q, latent, rope)[0])


def test_capture_on_a_kernel_that_claims_graphs(capsys: pytest.CaptureFixture[str]) -> None:
    group = stand_in.group(stand_in.spec(), values={"graph": "full"})
    space: dict[str, Any] = {
        "group": group, "Batch": Batch, "cache": group.new_kv_cache(20), "slot": torch.tensor([4]),
        "table": torch.arange(1, 17, dtype=torch.int32)[None], "two_requests": stand_in.paged([1, 1], [5, 9]),
        "q": torch.randn(4, 6, 8), "k": torch.randn(4, 2, 8), "v": torch.randn(4, 2, 8),
    }  # fmt: skip
    (body,) = code("docs/engines.md", "capture")
    exec(body, space)
    assert space["out"].shape == (4, 6, 8)
    assert space["plan"].batch.num_seqs == 4
    assert space["plan"].decode.fills == 2
    assert "4 decode rows of 1" in capsys.readouterr().out


def test_what_the_page_says_of_binding_is_true() -> None:
    """All rows have adapters but linear attention's, which engines run, and two that no model can satisfy: they say why
    encoders are refused.

    A device that is not here can be asked and not bound.
    """
    plugins = load_plugins(strict=False)
    unbound = {
        (r.backend, r.role)
        for platform in plugins.platforms().values()
        for device in platform.known
        for r in plugins.catalog(device).devices[str(device)].backends
        if r.bind is None
    }
    engines = {("engine", "linear_prefill"), ("engine", "linear_decode")}
    assert unbound == {*engines, ("vllm_cpu", "encode"), ("aiter", "encode")}
    with pytest.raises(BindError, match="simulated"):
        simulate("cpu:avx2").attention_backend(num_heads=2, head_dim=64, dtype="float32")


def test_links_and_anchors_exist() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    anchors = {m[1].lower().replace(" ", "-") for m in re.finditer(r"^#+ ([\w -]+)$", reference, re.MULTILINE)}
    for page in ("docs/engines.md", "docs/tutorial-plugin.md"):
        for link in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            assert (ROOT / page).parent.joinpath(path).exists(), link
            assert not anchor or anchor in anchors, link


def test_the_readme_of_the_package_runs(capsys: pytest.CaptureFixture[str]) -> None:
    for body in code("core/README.md"):
        exec(body, {})
    assert "encode" in capsys.readouterr().out
