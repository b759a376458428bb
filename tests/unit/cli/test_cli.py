"""The command line: exit statuses, one object on stdout, one line on stderr; and all of it without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attn_core import Decision

MODELS = Path(__file__).parents[2] / "data" / "models"
GPT_OSS = str(MODELS / "gpt-oss-20b.json")

BLOCKED = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, NoTorch())
from attn_core.cli import main
main()
"""


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The command in an environment where torch cannot be imported."""
    command = [sys.executable, "-c", BLOCKED, *args]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_resolve_prints_one_object_of_the_documented_shape():
    out = run("resolve", "--model", GPT_OSS, "--device", "cuda:sm_121", "--json")
    assert out.returncode == 0, out.stderr
    d = json.loads(out.stdout)
    assert d["schema"] == 1
    assert d["device"]["platform"] == "cuda"
    assert d["device"]["arch"] == "sm_121"
    assert "tcgen05" not in d["device"]["isa"]
    assert d["model"]["architecture"] == "GptOssForCausalLM"
    assert set(d["groups"]) == {"full", "sliding"}
    for role in ("prefill", "decode"):
        choice = d["groups"]["full"][role]
        assert {"backend", "plugin", "tier", "head_dim", "padded_from"} <= set(choice)
        assert (choice["head_dim"], choice["padded_from"]) == (64, None)
    assert d["groups"]["full"]["values"]["scale"] == 0.125
    assert d["roles"]["allreduce_fusion"]["backend"] == "unfused"
    assert {"page_size", "kv_cache_dtype", "kv_layout", "graph"} <= set(d["values"])
    assert d["because"]["page_size"]
    sinks = [r for r in d["rejections"] if r["field"] == "sinks" and r["backend"] == "flashinfer"]
    assert {(r["code"], r["got"], tuple(r["allowed"])) for r in sinks} == {("feature", True, (False,))}
    keys = {"code", "backend", "role", "group", "field", "got", "allowed", "plugin", "hint", "text"}
    assert all(keys <= set(r) for r in sinks)
    assert {p["name"] for p in d["plugins"]} >= {"core", "cuda"}
    assert Decision.from_json(out.stdout).digest == d["digest"]


def test_nothing_fits_exits_3():
    out = run("resolve", "--model", GPT_OSS, "--device", "cuda:sm_90", "--backend", "flashinfer", "--json")
    assert out.returncode == 3
    error = json.loads(out.stdout)["error"]
    assert error["code"] == "no_backend"
    assert "does not support sinks=true" in error["text"]
    assert error["rejections"]
    assert any(r.startswith("without backend=flashinfer") for r in error["relaxations"])
    text = run("resolve", "--model", GPT_OSS, "--device", "cuda:sm_90", "--backend", "flashinfer")
    assert (text.returncode, text.stdout) == (3, "")
    assert "ways out" in text.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--device", "cuda:sm_91"), "unknown device 'cuda:sm_91'"),
        (("--device", "tpu:v5"), "no installed plugin describes platform 'tpu'"),
        (("--page-size", "-1"), "page_size=-1"),
        (("--page-size", "many"), "'many' is not a valid integer"),
        (("--kv-cache-dtype", "fp9"), "kv_cache_dtype='fp9'"),
        (("--graph", "whole"), "graph='whole'"),
        (("--tensor-parallel", "7"), "tensor_parallel=7"),
        (("--with", "cuda"), "package==1.2.3"),
        (("--backend", "ful=triton"), "backend names group 'ful'"),
        (("--nonsense",), "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(args, says):
    out = run("resolve", "--model", GPT_OSS, "--device", "cuda:sm_90", *args)
    assert out.returncode == 2, out.stderr
    assert out.stdout == ""
    (line,) = out.stderr.strip().splitlines()
    assert line.startswith("attn-core: ")
    assert says in line


@pytest.mark.parametrize("content", [None, "{not json", "[1, 2]", "{}", '{"hello": "world"}', b"\xff\xfe\x00"])
def test_unreadable_models_are_one_line(tmp_path, content):
    path = tmp_path / "config.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        path.write_text(content)
    out = run("resolve", "--model", str(path))
    assert out.returncode == 2
    assert len(out.stderr.strip().splitlines()) == 1
    assert "config.json" in out.stderr


def test_packages_can_be_taken_away_and_toolkits_changed():
    base = ("resolve", "--model", str(MODELS / "llama-3.1-8b.json"), "--device", "cuda:sm_90", "--json")
    whole = json.loads(run(*base).stdout)
    assert whole["groups"]["full"]["decode"]["backend"] == "fa3"
    less = run(*base, "--with", "cuda==12.1")
    d = json.loads(less.stdout)
    old = [r for r in d["rejections"] if r["backend"] == "fa3" and r["code"] == "version"]
    assert old[0]["field"] == "cuda"
    assert old[0]["got"] == "12.1"
    bare = run(*base, "--installed", "--without", "triton", "--deny", "flex_attention")
    assert bare.returncode == 3  # no vendor package is installed here, and a reference must not win silently
    assert json.loads(bare.stdout)["error"]["code"] == "reference_only"


def test_explain_says_what_was_refused():
    out = run("explain", "--model", GPT_OSS, "--device", "cuda:sm_90")
    assert out.returncode == 0
    assert "flashinfer (cuda)" in out.stdout
    assert "does not support sinks=true" in out.stdout


def test_doctor_and_plugins():
    doctor = run("doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    data = json.loads(doctor.stdout)
    assert any(d["platform"] == "cpu" for d in data["devices"])
    assert {p["name"] for p in data["plugins"]} >= {"core", "cuda"}
    listed = json.loads(run("plugins", "--json", "--no-import").stdout)["plugins"]
    assert {p["status"] for p in listed} == {"not imported"}
    assert {p["name"] for p in listed} >= {"core", "cuda", "rocm", "musa", "ascend", "intel"}
    for args in (("doctor",), ("plugins",), ("plugins", "--no-import")):
        assert "attn-core" in run(*args).stdout


def test_diff_and_replay(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    a.write_text(run("resolve", "--model", GPT_OSS, "--device", "cuda:sm_90", "--json").stdout)
    b.write_text(run("resolve", "--model", GPT_OSS, "--device", "cuda:sm_90", "--page-size", "64", "--json").stdout)
    assert run("diff", str(a), str(a)).returncode == 0
    changed = run("diff", str(a), str(b))
    assert changed.returncode == 1
    assert "values.page_size: 16 -> 64" in changed.stdout
    assert run("replay", str(a)).stdout == "same decision\n"
    data = json.loads(a.read_text())
    data["groups"]["full"]["decode"]["backend"] = "something_else"
    a.write_text(json.dumps(data))
    drifted = run("replay", str(a), "--json")
    assert drifted.returncode == 1
    assert not json.loads(drifted.stdout)["same"]
    assert run("replay", str(tmp_path / "none.json")).returncode == 2
    a.write_text("{}")
    assert run("diff", str(a), str(b)).returncode == 2
