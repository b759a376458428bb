"""The bench runs what is bound here, believes no kernel, and tells who was not timed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from attn_core import get_platform
from attn_core.bench import run
from attn_core.bench.case import build
from attn_core.bench.check import wrong
from attn_core.bench.measure import Peaks
from attn_core.bench.shapes import grid
from attn_core.cli import main

PEAKS = Peaks(copy=1e9, matmul=1e9)
SHAPES = {s.kind: s for s in grid("smoke", "float32")}


def figures(kind: str, *backends: str, **options: object) -> dict[str, run.Figure]:
    parts = run.figures(get_platform("cpu"), [SHAPES[kind]], backends, PEAKS, rounds=2, least=1e-4, **options)
    return {f.backend: f for part in parts for f in part}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_runs_and_is_right(kind):
    f = figures(kind, "torch_native")["torch_native"]
    assert f.status == "ok", f.reason
    assert f.call is not None
    assert f.call[1] <= f.call[0] <= f.call[2]
    assert f.roofline == pytest.approx(max(f.moved, f.flops) / 1e9 / f.call[0])
    assert f.versus_best == 1.0


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "int8"])
def test_quantised_caches_are_judged_by_what_they_hold(dtype):
    f = figures("decode", "torch_native", kv_cache_dtype=dtype)["torch_native"]
    assert f.status == "ok", f.reason
    assert f.moved < figures("decode", "torch_native")["torch_native"].moved


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("error", [lambda out: out * 1.001, lambda out: out.roll(1, 0), lambda out: out.flip(1)])
def test_a_wrong_kernel_is_caught(kind, error):
    case = build(get_platform("cpu"), SHAPES[kind], "torch_native")
    assert wrong(case) == []
    broken = replace(case, call=lambda: error(case.call()))
    assert wrong(broken)


def test_a_kernel_that_is_wrong_or_raises_is_not_timed(monkeypatch):
    def build_with(error):
        def patched(*args, **kwargs):
            case = build(*args, **kwargs)
            return replace(case, call=error(case.call))

        return patched

    def failing(call):
        def raises():
            raise RuntimeError("no such kernel image")

        return raises

    monkeypatch.setattr(run, "build", build_with(lambda call: lambda: call() * 2))
    f = figures("decode", "torch_native")["torch_native"]
    assert (f.status, f.call) == ("wrong", None)
    assert "sequence 0" in f.reason
    monkeypatch.setattr(run, "build", build_with(failing))
    f = figures("decode", "torch_native")["torch_native"]
    assert (f.status, f.reason) == ("failed", "RuntimeError: no such kernel image")


def test_who_does_not_serve_a_shape_is_told_why():
    found = figures("mla_decode", "flex_attention", "torch_native")
    assert found["torch_native"].status == "ok"
    assert found["flex_attention"].status == "refused"
    assert "kind=mla" in found["flex_attention"].reason


def test_backends_are_compared_on_one_shape():
    found = figures("prefill", "flex_attention", "torch_native")
    assert sorted(f.versus_best for f in found.values())[-1] == 1.0
    slower, faster = sorted(found.values(), key=lambda f: f.versus_best)
    assert slower.call[0] > faster.call[0]
    assert slower.versus_best == pytest.approx(faster.call[0] / slower.call[0])


def test_the_command_writes_a_table_json_and_a_picture(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.__stdout__", None)  # pytest's capture stands in for it
    target, picture = tmp_path / "figures.json", tmp_path / "roofline.png"
    args = ["bench", "--size", "smoke", "--shapes", "decode", "--backend", "torch_native", "--threads", "1"]
    main([*args, "--dtype", "float32", "--json", str(target), "--plot", str(picture)])
    data = json.loads(target.read_text())
    assert {"schema", "device", "dtype", "size", "threads", "versions", "peaks", "figures"} <= data.keys()
    assert [f["status"] for f in data["figures"]] == ["ok"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "torch_native" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--shapes", "decod"], "did you mean"),
        (["--backend", "fa9"], "nobody declares it"),
        (["--size", "huge"], "size"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, text, capsys):
    with pytest.raises(SystemExit) as e:
        main(["bench", *args])
    assert e.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert text in line


def test_a_wrong_answer_exits_1(monkeypatch, capsys):
    def patched(*args, **kwargs):
        case = build(*args, **kwargs)
        return replace(case, call=lambda: case.call() * 2)

    monkeypatch.setattr(run, "build", patched)
    with pytest.raises(SystemExit) as e:
        main(["bench", "--size", "smoke", "--shapes", "decode", "--backend", "torch_native"])
    assert e.value.code == 1
