"""Contracts are facts that still hold where their source can be read, and stand-ins refuse what a signature refuses."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from simulators import condense
from simulators.contract import HERE, Contract, Refused, signature
from simulators.standin import StandIn, installed

NAMES = sorted(p.stem for p in HERE.glob("*.json"))
SOURCES = os.environ.get("VENDOR_CONTRACTS")
"""A folder of extracted contracts; where it is, the condensed ones are compared with it."""


@pytest.mark.parametrize("name", NAMES)
def test_contracts_can_be_read(name):
    contract = Contract.load(name)
    assert contract.facts["distribution"]
    assert contract.facts["version"]
    assert contract.functions
    for limit in contract.facts.get("limits", {}).values():
        assert set(limit) == {"is", "source"}
    assert all(len(text) > 20 for text in contract.quirks.values())
    assert set(contract.aliases.values()) <= set(contract.functions)


@pytest.mark.skipif(SOURCES is None, reason="VENDOR_CONTRACTS names no folder of extracted contracts")
@pytest.mark.parametrize("name", NAMES)
def test_contracts_agree_with_their_source(name):
    facts = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
    if facts["source"].get("file") is None:
        pytest.skip("written by hand")
    assert condense.condense(Path(SOURCES), facts) == facts


def test_signatures_are_what_they_say():
    assert str(signature("(a, b=None, *, c=(-1, -1), **rest)")) == "(a, b=None, *, c=(-1, -1), **rest)"
    found = signature("(dtype=torch.bfloat16, version=DEFAULT)").parameters
    assert found["dtype"].default is torch.bfloat16
    assert str(found["version"].default) == "DEFAULT"


def extracted(folder):
    """A source folder in both of its forms."""
    p = "POSITIONAL_OR_KEYWORD"
    f = {"parameters": [
        {"name": "q", "kind": p, "default": None}, {"name": "scale", "kind": p, "default": "1.0"},
        {"name": "needed", "kind": p, "default": None}, {"name": "rest", "kind": "VAR_KEYWORD", "default": None},
    ]}  # fmt: skip
    run = {"parameters": [{"name": "x", "kind": p, "default": None}]}
    plain = {
        "package": "pkg",
        "version": "1.2",
        "functions": {"pkg.f": f, "pkg.W": {**run, "constructor_of": "W"}, "pkg.W.run": run},
    }
    (folder / "plain.json").write_text(json.dumps(plain))
    block = {"distribution": "pkg-fork", "commit": "0123456789abcdef", "functions": {"pkg.f": f}}
    (folder / "variants.json").write_text(json.dumps({"package": "pkg", "variants": {"fork": block}}))


def test_condensing_keeps_names_kinds_and_defaults(tmp_path):
    extracted(tmp_path)
    made = condense.condense(
        tmp_path, {"source": {"file": "plain.json"}, "functions": ["pkg.f", "pkg.W", "pkg.W.run"], "limits": {"a": 1}}
    )
    assert made["functions"]["pkg.f"] == {"kind": "function", "signature": "(q, scale=1.0, *, needed, **rest)"}
    assert [made["functions"][n]["kind"] for n in ("pkg.W", "pkg.W.run")] == ["class", "method"]
    assert (made["distribution"], made["version"], made["limits"]) == ("pkg", "1.2", {"a": 1})
    variant = {"source": {"file": "variants.json", "variant": "fork"}, "functions": ["pkg.f"]}
    assert condense.condense(tmp_path, variant)["version"] == "0123456789ab"


def test_the_script_notices_a_contract_that_no_longer_agrees(tmp_path):
    """With a folder that holds other facts for a contract of ours."""
    facts = json.loads((HERE / "sgl_kernel_fa3.json").read_text(encoding="utf-8"))
    block = {"distribution": "x", "version": "0", "functions": {n: {"parameters": []} for n in facts["functions"]}}
    assert condense.condense(_folder(tmp_path, block), facts) != facts


def _folder(tmp_path, block):
    (tmp_path / "sgl_kernel.json").write_text(json.dumps({"package": "x", "variants": {"sgl_kernel": block}}))
    return tmp_path


def test_stand_ins_refuse_what_the_signature_refuses_and_leave_nothing_behind():
    made = StandIn("sgl_kernel_fa3", {"sgl_kernel.flash_attn.is_fa3_supported": lambda a: a.device})
    assert "sgl_kernel" not in sys.modules
    with installed(made):
        module = importlib.import_module("sgl_kernel.flash_attn")
        assert module.is_fa3_supported(3) == 3
        assert made.last("is_fa3_supported").device == 3
        assert "sinks" in inspect.signature(module.flash_attn_varlen_func).parameters
        with pytest.raises(TypeError, match="softmax_scal"):
            module.flash_attn_varlen_func(1, 2, 3, 4, 5, softmax_scal=1)
        with pytest.raises(NotImplementedError):
            module.flash_attn_varlen_func(1, 2, 3, 4, 5)
        assert importlib.util.find_spec("sgl_kernel.flash_attn")
    assert not [n for n in sys.modules if n.startswith("sgl_kernel")]


def test_answers_to_functions_that_do_not_exist_are_noticed():
    with pytest.raises(ValueError, match=r"sgl_kernel\.flash_attn\.f"):
        StandIn("sgl_kernel_fa3", {"sgl_kernel.flash_attn.f": None})


def test_limits():
    contract = Contract.load("sgl_kernel_fa3")
    contract.require("head_dim", 64)
    contract.require("unequal_head_dims", (192, 128))
    contract.require_dtype("dtype", torch.zeros(1, dtype=torch.float16))
    for what, value in (("head_dim", 12), ("head_dim", 264), ("num_splits", 257), ("unequal_head_dims", (64, 128))):
        with pytest.raises(Refused, match=what):
            contract.require(what, value)
    with pytest.raises(Refused):
        contract.require_dtype("dtype", torch.zeros(1))


def test_the_script_runs_from_a_shell(tmp_path):
    done = subprocess.run(
        [sys.executable, str(HERE.parent / "condense.py"), str(tmp_path), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--check" in done.stdout
