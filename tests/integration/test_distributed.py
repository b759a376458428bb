"""Real gloo groups of processes on this machine, each rank with a simulated device: they agree, or say who stands out.

Every wait is bounded. Groups are started once per test; a rank that dies really is gone.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from attn_core import BadInputError, ModelSpec, simulate
from attn_core.fleet import read
from attn_core.integrations import distributed

RANK = Path(__file__).with_name("distributed_rank.py")
LIMIT = 60
H200, MI300X = "cuda:h200", "rocm:mi300x"

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")


def group(*ranks: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What every rank printed, step by step; a rank that died printed less."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    alive = [
        subprocess.Popen(
            [sys.executable, str(RANK), str(i), str(len(ranks)), str(port), json.dumps(steps)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ,
        )
        for i, steps in enumerate(ranks)
    ]  # fmt: skip
    out: list[list[dict[str, Any]]] = []
    try:
        for p, steps in zip(alive, ranks):
            assert p.stdout is not None
            lines = []
            for _ in steps:
                line = p.stdout.readline()  # bounded: every step of a rank is
                if not line:
                    break
                lines.append(json.loads(line))
            out.append(lines)
    finally:
        for p in alive:
            try:
                p.communicate(timeout=LIMIT)
            except subprocess.TimeoutExpired:
                p.kill()
                p.communicate()
    return out


def agree(device: str, **step: Any) -> dict[str, Any]:
    return {"do": "agree", "device": device, **step}


def texts(results: list[dict[str, Any]]) -> str:
    """The one text that all ranks raised."""
    assert {r.get("error") for r in results} == {"FleetError"}, results
    (text,) = {r["text"] for r in results}
    return text


def test_ranks_with_different_devices_hold_one_decision_and_pd_too():
    plain = [agree(H200), agree(H200), agree(MI300X)]
    roles = [agree(H200, roles=["prefill"]), agree(H200, roles=["prefill"]), agree(MI300X, roles=["decode"])]
    pair = [agree(d, ranks=[1, 2]) for d in (H200, H200, MI300X)]
    out = group(*zip(plain, roles, pair))
    first, second, third = zip(*out)
    for step in (first, second):
        assert len({r["digest"] for r in step}) == 1
        assert len({r["bytes"] for r in step}) == 1
        assert (
            len({(r["values"]["page_size"], r["values"]["kv_cache_dtype"], r["values"]["kv_layout"]) for r in step})
            == 1
        )
        assert [r["device"] for r in step] == ["cuda:sm_90", "cuda:sm_90", "rocm:gfx942"]
        assert all(r["seconds"] < 4 for r in step)
    assert [r["roles"] for r in second] == [["kv_write", "prefill"]] * 2 + [["decode", "kv_write"]]
    assert first[0]["decision"] == first[1]["decision"] != first[2]["decision"]
    assert third[0] == {}
    assert third[1]["digest"] == third[2]["digest"] != first[1]["digest"]
    paper = read({"ranks": [{"device": H200, "count": 2}, {"device": MI300X}]}).resolve(ModelSpec.of(
        num_heads=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"))  # fmt: skip
    assert paper.values["page_size"] == first[0]["values"]["page_size"]
    assert paper.decision_of(2).backend("decode") == first[2]["backends"]["decode"]


def test_every_difference_is_named():
    steps: list[list[dict[str, Any]]] = [
        [agree(H200), agree(H200), agree(H200, extra=True)],
        [agree(H200), agree(H200, packages={"flashinfer-python": "9.9"}), agree(H200)],
        [agree(H200), agree(H200, model={"head_dim": 64}), agree(H200)],
        [agree(H200), agree(H200), agree("broken")],
        [agree("broken"), agree(H200), agree(H200)],
        [agree(H200), agree(H200), agree(H200, roles=["chat"])],
        [agree(H200, roles=["prefill"])] * 3,
        [agree(H200, extra=r == 2, tolerate=True) for r in range(3)],
        [agree(H200), agree(H200), agree(H200, version="0.0.9")],
        [agree(d, options={"backend": "fa3"}, version=None) for d in (H200, H200, MI300X)],
    ]
    out = [*zip(*group(*zip(*steps)))]
    assert texts(out[0]).startswith("rank 2 has plugin extra in-process, the others no plugin extra. Install the same")
    assert "rank 1 has flashinfer-python 9.9, the other cuda:sm_90 ranks flashinfer-python" in texts(out[1])
    assert texts(out[2]).startswith("rank 1 asks another question")
    assert texts(out[3]) == "rank 2 failed: RuntimeError: the driver does not answer"
    assert texts(out[4]) == "rank 0 failed: RuntimeError: the driver does not answer"
    assert all("rank 2: unknown role 'chat'" in r["text"] for r in out[5])
    assert all(r["text"] == "no rank runs decode, a role of this model; give it to some ranks" for r in out[6])
    assert len({r["digest"] for r in out[7]}) == 1
    assert "rank 2 runs attn-core 0.0.9 (wire format 1); here is " in texts(out[8])
    assert {tuple(r["ranks"]) for r in out[8]} == {(2,)}
    assert all(r["seconds"] < 4 for step in out for r in step)
    assert {r["code"] for r in out[9]} == {"no_backend"}
    (text,) = {r["text"] for r in out[9]}
    assert "rank 2 (rocm:gfx942): no installed plugin offers backend 'fa3'" in text
    assert any(r.startswith("without rank 2 (rocm:gfx942): fa3 / fa3") for r in out[9][2]["relaxations"])
    assert out[9][0]["rejections"]
    assert all("; rank 2 (rocm:gfx942)" in r for r in out[9][0]["rejections"])


def test_ranks_that_die_are_named_within_the_timeout():
    """Rank 1 first, then rank 0, which decides."""
    twice, die = [agree(H200, options={"timeout": 2.5})] * 2, {"do": "die"}
    out = group([*twice, die], [twice[0], die], [*twice, twice[0]], [*twice, twice[0]])
    assert len({r[0]["digest"] for r in out}) == 1
    assert [len(r) for r in out] == [2, 1, 3, 3]
    late = [out[0][1], out[2][1], out[3][1]]
    assert texts(late) == "rank 1 did not answer within 2.5 s (dead, or not in this call); 3 of 4 ranks did"
    assert all(2 < r["seconds"] < 7 for r in late)
    text = texts([out[2][2], out[3][2]])
    assert text == "ranks 0, 1 did not answer within 7.5 s (dead, or not in this call); 2 of 4 ranks did"


def test_binding_together_and_again_without_a_kernel_that_one_rank_lacks():
    patient = {"timeout": 30.0}  # the first import of what flex_attention needs takes seconds
    here = {"do": "bind", "device": "here", "model": {"dtype": "float32"}, "options": patient}
    encoder = {**here, "model": {"dtype": "float32", "attn_type": "encoder_only"}}
    lacks, broken = {**encoder, "lacks": "torch_native"}, {"do": "bind", "device": H200, "options": patient}
    bf16 = {"do": "bind", "device": "here", "options": patient}
    needed = {**here, "lacks": "torch_native"}
    out = group([here, encoder, here, bf16], [here, lacks, needed, broken])
    assert out[0][0] == out[1][0]
    assert out[0][0]["backends"]["decode"] == "torch_native"
    assert [r[1]["backends"] for r in out] == [{"encode": "torch_native"}, {"encode": "flex_attention"}]
    assert out[0][1]["values"] == out[1][1]["values"]
    assert {r[2]["code"] for r in out} == {"no_backend"}
    assert all("rank 1 (cpu:" in r[2]["text"] for r in out)
    assert all("its kernel could not be bound: the library is not there" in r[2]["text"] for r in out)
    assert texts([r[3] for r in out]) == (
        "rank 1 cannot bind: BindError: cuda:sm_90 is simulated: decisions can be explained, kernels cannot be bound"
    )


def test_without_a_process_group():
    with pytest.raises(BadInputError, match="init_process_group"):
        distributed.agree(num_heads=8, head_dim=64, dtype="float16", model=None, platform=simulate(H200))
