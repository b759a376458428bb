"""Everything a plugin can do wrong, as real distributions. Each stands beside a healthy plugin that must not notice."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dists import HEAD, distribution, plugin

HEALTHY = """
ACME = Device(platform="acme", arch="a1", isa={"mma"}, name="Acme One")

@hookimpl
def attn_platforms():
    return [PlatformSpec(name="acme", torch_device="acme", known=(ACME, ), aliases={"one": "a1"})]

@hookimpl
def attn_probe_devices():
    return [ACME]

@hookimpl
def attn_backends(device):
    if device.platform == "acme":
        for role in ("prefill", "decode", "kv_write"):
            yield row(device, "steady", role, rank=1)
            yield row(device, "swift", role, requires=Requirement("acme-kernels>=2", install="ask acme"))

@hookimpl
def attn_constraints(device):
    if device.platform == "acme":
        yield Constraint(name="page", when={"decode": "steady"}, then={"page_size": [64, 32]}, because="measured")
"""

TEMPTING = """
def tempting(device):
    for role in ("prefill", "decode", "kv_write"):
        yield BackendSpec(backend="tempting", role=role, platform=device.platform, tier="BEST",
                          accepts={"dtype": ["bfloat16"], "head_dim": [64]})
"""
"""Rows that would win every decision for ``acme`` if any of them came through."""


@dataclass(frozen=True)
class Scenario:
    """``source`` of plugin ``bad``; the report must have ``status`` and an error that contains ``error``."""

    source: str
    error: str
    status: str = "failed"
    group: str = "attn_core.v1"
    probe: bool = False
    """Fails only when devices are probed."""
    twin: bool = False
    """A second distribution claims the same plugin name."""


def _hook(name: str, body: str, argument: str = "") -> str:
    return f"{TEMPTING}\n@hookimpl\ndef {name}({argument}):\n    {body}\n"


def _backends(body: str) -> str:
    return _hook("attn_backends", f"yield from tempting(device)\n    {body}", "device")


_ROWS = _hook("attn_backends", "return list(tempting(device))", "device")

SCENARIOS = {
    "import-raises": Scenario("raise RuntimeError('boom at import')", "import: RuntimeError: boom at import"),
    "import-exits": Scenario("import sys\nsys.exit('giving up')", "import: SystemExit: giving up"),
    "import-missing": Scenario(
        "import acme_vendor_sdk", "import: ModuleNotFoundError: No module named 'acme_vendor_sdk'"
    ),
    "import-syntax": Scenario("def (:", "import: SyntaxError"),
    "platforms-raises": Scenario(_ROWS + _hook("attn_platforms", "1 / 0"), "attn_platforms: ZeroDivisionError"),
    "platforms-exits": Scenario(
        _ROWS + _hook("attn_platforms", "raise SystemExit(2)"), "attn_platforms: SystemExit: 2"
    ),
    "platforms-claims": Scenario(
        _ROWS + _hook("attn_platforms", "return [PlatformSpec(name='acme', torch_device='x')]"),
        "attn_platforms: claims platform 'acme', so does acme; acme keeps it",
    ),
    "platforms-core": Scenario(
        _ROWS + _hook("attn_platforms", "return [PlatformSpec(name='cpu', torch_device='x')]"),
        "attn_platforms: claims platform 'cpu', so does core; core keeps it",
    ),
    "backends-raises": Scenario(
        _hook("attn_backends", "raise KeyError('a1')", "device"), "attn_backends: KeyError: 'a1'"
    ),
    "backends-midway": Scenario(_backends("raise OSError('table lost')"), "attn_backends item 3: OSError: table lost"),
    "backends-exits": Scenario(_backends("raise SystemExit"), "attn_backends item 3: SystemExit"),
    "backends-wrong-type": Scenario(
        _backends("yield {'backend': 'x'}"), "attn_backends item 3: DeclarationError: got dict"
    ),
    "backends-not-iterable": Scenario(
        _hook("attn_backends", "return next(tempting(device))", "device"), "'BackendSpec' object is not iterable"
    ),
    "backends-invalid": Scenario(
        _backends("yield row(device, 'x', 'decode', accepts={'dtype': 'bfloat16', 'head_dim': 64, 'sink': True})"),
        "attn_backends item 3: DeclarationError: BackendSpec('x', 'decode'): accepts unknown field 'sink'; "
        "did you mean 'sinks'?",
    ),
    "backends-unplain": Scenario(
        _backends("yield row(device, 'x', 'decode', evidence=object())"),
        "attn_backends item 3: DeclarationError: BackendSpec.evidence holds a object; declarations are plain data",
    ),
    "backends-foreign": Scenario(
        _backends("yield row(Device(platform='cuda', arch='sm_90'), 'x', 'decode')"),
        "attn_backends item 3: DeclarationError: BackendSpec('x', 'decode') is for platform 'cuda', but the core asked",
    ),
    "constraints-raises": Scenario(
        _ROWS + _hook("attn_constraints", "raise RuntimeError('no rules')", "device"),
        "attn_constraints: RuntimeError: no rules",
    ),
    "constraints-invalid": Scenario(
        _ROWS
        + _hook("attn_constraints", "yield Constraint(name='c', when={}, then={'pages': 1}, because='b')", "device"),
        "attn_constraints item 0: DeclarationError: Constraint('c'): accepts unknown field 'pages'",
    ),
    "misspelt": Scenario(
        _ROWS + _hook("attn_constraint", "return []", "device"),
        "register: unknown hook 'attn_constraint'; did you mean 'attn_constraints'?",
    ),
    "unmarked": Scenario(
        _ROWS + "def attn_constraints(device):\n    return []\n", "attn_constraints is not marked as a hook"
    ),
    "argument": Scenario(_hook("attn_backends", "return []", "device, model"), "register: PluginValidationError"),
    "newer-contract": Scenario(_ROWS, "written for contract attn_core.v2", "incompatible", group="attn_core.v2"),
    "twins": Scenario(_ROWS, "acme-bad 1.0 and acme-rival 1.0 both claim the plugin name 'bad'", twin=True),
    "probe-raises": Scenario(
        _ROWS + _hook("attn_probe_devices", "raise RuntimeError('driver lost')"),
        "attn_probe_devices: RuntimeError: driver lost",
        probe=True,
    ),
    "probe-stranger": Scenario(
        _ROWS + _hook("attn_probe_devices", "return [Device(platform='acme', arch='a9')]"),
        "attn_probe_devices: BadInputError: reports acme:a9, but declares no platform",
        probe=True,
    ),
    "probe-hangs": Scenario(
        _ROWS + _hook("attn_probe_devices", "import time; time.sleep(600)"),
        "attn_probe_devices: probe hung for 2 s",
        probe=True,
    ),
    "probe-dies": Scenario(
        _ROWS + _hook("attn_probe_devices", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        "attn_probe_devices: probe killed its process with signal SIGSEGV",
        probe=True,
    ),
    "probe-leaves": Scenario(
        _ROWS + _hook("attn_probe_devices", "import os; os._exit(7)"),
        "attn_probe_devices: probe ended its process with exit code 7",
        probe=True,
    ),
}


def build(root: Path) -> None:
    """Folder ``healthy`` with the healthy plugin, and one folder per scenario with its bad one, modules named apart."""
    plugin(root / "healthy", "acme", HEALTHY)
    for name, s in SCENARIOS.items():
        module = f"bad_{name.replace('-', '_')}"
        canary = f"open({str(root / name / 'imported')!r}, 'w').close()\n"
        source = canary + HEAD + s.source
        distribution(root / name, "acme-bad", {"bad": module}, group=s.group, modules={module: source})
        if s.twin:
            distribution(root / name, "acme-rival", {"bad": module}, group=s.group)
    heavy = f"open({str(root / 'lazy' / 'imported')!r}, 'w').close()"
    lazy = """
def __dir__():
    return ["attn_backends", "heavy_kernels"]

def __getattr__(name):
    import acme_heavy
    return getattr(acme_heavy, name)
"""
    distribution(
        root / "lazy",
        "acme-lazy",
        {"lazy": "acme_lazy"},
        modules={
            "acme_lazy": HEAD + lazy + _ROWS,
            "acme_heavy": heavy,
        },
    )
    distribution(
        root / "interrupt",
        "acme-interrupt",
        {"interrupt": "acme_interrupt"},
        modules={"acme_interrupt": "raise KeyboardInterrupt"},
    )
