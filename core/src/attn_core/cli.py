"""``attn-core``: doctor, resolve, explain, plugins, diff, replay, bench. Works without torch, but for bench.

Exit status: 0 answered, 1 decisions differ (``diff``, ``replay``), 2 bad input, 3 no backend.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click
from rich.console import Console
from rich.table import Table

from attn_core.bench.command import bench
from attn_core.catalog import Catalog, Installed
from attn_core.compare import differences, replay
from attn_core.errors import AttnCoreError, BadInputError, NoBackendError
from attn_core.fleet import FleetDecision
from attn_core.fleet import read as read_fleet
from attn_core.platform import Platform, find_device, get_platform, installed_plugins, simulate
from attn_core.plugins import Plugins, discover, installed_packages, load_plugins, slot_conflict
from attn_core.spec import Decision, ModelSpec, Requirement
from attn_core.spec.decision import SCHEMA
from attn_core.spec.fields import FIELDS

F = TypeVar("F", bound=Callable[..., Any])

_WIDE = 110


def answer() -> TextIO:
    """The real standard output; ``main`` turns ``sys.stdout`` away from it, because plugins print."""
    return sys.__stdout__ or sys.stdout


def _console() -> Console:
    return Console(file=answer(), width=None if answer().isatty() else _WIDE, highlight=False)


def _print(text: str) -> None:
    click.echo(text, file=answer())


def _print_json(data: Any) -> None:
    _print(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False))


def _engine_options(command: F) -> F:
    """One command-line option per engine option, documented from the vocabulary."""

    def doc(name: str) -> str:
        return FIELDS[name].doc

    options = [
        click.option("--page-size", type=int, help=doc("page_size")),
        click.option("--kv-cache-dtype", help=doc("kv_cache_dtype")),
        click.option("--kv-layout", help=doc("kv_layout")),
        click.option("--graph", help=f"{doc('graph')}: {', '.join(FIELDS['graph'].choices)}"),
        click.option("--backend", help="backend for every attention role, or GROUP=NAME[,GROUP=NAME]"),
        click.option("--prefill-backend", help="backend for prefill, or GROUP=NAME[,...]"),
        click.option("--decode-backend", help="backend for decode, or GROUP=NAME[,...]"),
        click.option("--uniform", help="for engines that cannot mix: none, groups or all"),
        click.option("--deterministic", is_flag=True, default=None, help=doc("deterministic")),
        click.option("--lse", is_flag=True, default=None, help=doc("lse")),
        click.option("--verify-width", type=int, help=doc("verify_width")),
        click.option("--tree-mask", is_flag=True, default=None, help=doc("tree_mask")),
        click.option("--host-lengths", help=doc("host_lengths")),
        click.option("--tensor-parallel", type=int, help=doc("tensor_parallel")),
        click.option("--world-size", type=int, help=doc("world_size")),
        click.option("--kv-offload-io", help=doc("kv_offload_io")),
        click.option("--max-model-len", type=int, help=doc("max_model_len")),
        click.option("--max-num-seqs", type=int, help=doc("max_num_seqs")),
        click.option("--allow-reference", is_flag=True, default=None, help="accept a slow reference backend"),
        click.option("--deny", multiple=True, help="backend that must not be chosen (repeatable)"),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _question_options(command: F) -> F:
    options = [
        click.option("--model", "model_path", required=True, help="config.json of a Hugging Face model, or its folder"),
        click.option("--draft", "draft_path", help="config.json of a draft model, solved together"),
        click.option("--device", help="platform:arch or platform:product; default: this machine"),
        click.option(
            "--fleet", help="fleet.json: ranks on several kinds of devices, decided together (docs/fleets.md)"
        ),
        click.option(
            "--with", "with_packages", multiple=True, metavar="PKG==VER", help="count as installed (repeatable)"
        ),
        click.option("--without", multiple=True, metavar="PKG", help="count as absent (repeatable)"),
        click.option("--installed", is_flag=True, help="with --device: only packages really installed here"),
        click.option("--json", "as_json", is_flag=True, help="print one JSON object"),
    ]
    command = _engine_options(command)
    for option in reversed(options):
        command = option(command)
    return command


def _decide(
    model_path: str,
    draft_path: str | None,
    device: str | None,
    fleet: str | None,
    with_packages: tuple[str, ...],
    without: tuple[str, ...],
    installed: bool,
    **options: Any,
) -> Decision | FleetDecision:
    model = ModelSpec.from_hf_config(model_path)
    if draft_path is not None:
        model = model.with_draft(ModelSpec.from_hf_config(draft_path))
    pins = {k: _pin(v) if k.endswith("backend") else v for k, v in options.items() if v not in (None, ())}
    if fleet is None:
        return _platform(device, with_packages, without, installed).resolve(model, **pins)
    if device is not None or with_packages or without or installed:
        raise BadInputError(
            "--fleet says which devices and packages there are: leave out --device, --with, --without "
            "and --installed, and say it in the file"
        )
    return read_fleet(fleet).resolve(model, **pins)


def _pin(text: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    parts = [part.partition("=") for part in text.split(",")]
    if not all(group and name for group, _, name in parts):
        raise BadInputError(f"cannot read {text!r} as GROUP=NAME[,GROUP=NAME]")
    return {group.strip(): name.strip() for group, _, name in parts}


def _platform(
    device: str | None, with_packages: tuple[str, ...], without: tuple[str, ...], installed: bool
) -> Platform:
    versions = {}
    for text in with_packages:
        name, sep, version = text.partition("==")
        if not sep or not name or not version:
            raise BadInputError(f"--with {text!r} must look like package==1.2.3")
        versions[name.strip()] = version.strip()
    if device is not None:
        return simulate(device, installed=installed, with_packages=versions, without=without)
    here = get_platform()
    if not versions and not without:
        return here
    return simulate(here.device, installed=True, with_packages=versions, without=without)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="attn-core")
def cli() -> None:
    """Which attention kernels run this model on this hardware, and why."""


cli.add_command(bench)


@cli.command()
@_question_options
def resolve(as_json: bool, **question: Any) -> None:
    """Decide, and print the decision briefly (or whole, as JSON)."""
    decision = _decide(**question)
    if as_json:
        _print_json(decision.to_json())
        return
    if isinstance(decision, Decision):
        _show(decision, f"{decision.model.architecture or 'model'} on {decision.device}")
    else:
        for kind in decision.kinds:
            _show(kind.decision, f"{kind.decision.model.architecture or 'model'} on {kind}")
        _console().print(f"{decision.size} ranks of {len(decision.kinds)} kinds")
    _console().print(f"digest {decision.digest}; reasons: attn-core explain")


def _show(decision: Decision, title: str) -> None:
    """Who does what, and the shared values."""
    table = Table(title=title, title_justify="left")
    for column in ("group", "role", "backend", "plugin", "tier", "also eligible"):
        table.add_column(column, overflow="fold")
    for name, g in decision.groups.items():
        for role, c in g.choices.items():
            padded = f"padded {c.padded_from} -> {c.head_dim}; " if c.padded_from else ""
            others = ", ".join(decision.eligible.get(f"{name}.{role}", ()))
            table.add_row(name, role, c.backend, c.plugin, c.tier.name, padded + others)
    for role, c in decision.roles.items():
        table.add_row("", role, c.backend, c.plugin, c.tier.name, "")
    console = _console()
    console.print(table)
    console.print("  ".join(f"[bold]{k}[/] {v}" for k, v in decision.values.items()), soft_wrap=True)


@cli.command()
@_question_options
@click.option("--verbose", is_flag=True, help="every reason and every plugin")
def explain(as_json: bool, verbose: bool, **question: Any) -> None:
    """Decide, and say why: what was chosen, what was refused, by whom."""
    decision = _decide(**question)
    if as_json:
        _print_json(decision.to_json())
    else:
        _print(decision.explain(verbose=verbose))


@cli.command()
@click.option("--no-import", is_flag=True, help="only list entry points; import nothing")
@click.option("--json", "as_json", is_flag=True)
def plugins(no_import: bool, as_json: bool) -> None:
    """Installed plugins and how each fared."""
    if no_import:
        found = [
            ("core", "attn-core", metadata.version("attn-core")),
            *((f.name, f.dist, f.version) for f in discover()),
        ]
        rows = [
            {"name": n, "dist": d, "version": v, "status": "not imported", "error": None, "hint": ""}
            for n, d, v in found
        ]
    else:
        loaded = _plugins_as_they_are()
        rows = [r.to_json() for r in loaded.reports]
    if as_json:
        _print_json({"schema": SCHEMA, "plugins": rows})
        return
    _console().print(_plugin_table(rows))


def _plugin_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="plugins", title_justify="left")
    for column in ("name", "distribution", "version", "status", "what is wrong, what to do"):
        table.add_column(column, overflow="fold")
    for r in rows:
        wrong = " -> ".join(filter(None, (r["error"], r["hint"])))
        colour = {"ok": "green", "failed": "red", "incompatible": "red"}.get(r["status"], "yellow")
        table.add_row(r["name"], r["dist"], r["version"], f"[{colour}]{r['status']}[/]", wrong)
    return table


@cli.command()
@click.option("--device", metavar="P:ARCH", help="what this machine would lack if it had that device")
@click.option("--json", "as_json", is_flag=True)
def doctor(device: str | None, as_json: bool) -> None:
    """Devices, plugins and packages of this machine; what is broken and what to do."""
    loaded = _plugins_as_they_are()
    devices = loaded.probe() if device is None else (find_device(device, loaded.platforms()),)
    catalog = loaded.catalog(devices)
    present = installed_packages(catalog, devices)
    rows = _package_rows(catalog, present)
    conflict = slot_conflict(loaded.platforms().values())
    specs = loaded.platforms()
    advice = {str(d): specs[d.platform].advice.get(d.arch, ()) for d in devices if d.platform in specs}
    if as_json:
        _print_json(
            {
                "schema": SCHEMA,
                "devices": [d.to_json() for d in devices],
                "plugins": [r.to_json() for r in loaded.reports],
                "packages": rows,
                "conflicts": [conflict] if conflict else [],
                "advice": {name: list(texts) for name, texts in advice.items() if texts},
            }
        )
        return
    console = _console()
    table = Table(title="devices", title_justify="left")
    for column in ("device", "name", "memory", "instructions", "versions"):
        table.add_column(column, overflow="fold")
    for d in devices:
        memory = f"{d.total_memory / 2**30:.1f} GiB" if d.total_memory else "unknown"
        versions = ", ".join(f"{k} {v}" for k, v in d.versions.items())
        table.add_row(f"{d} #{d.index}", d.name, memory, " ".join(sorted(d.isa)), versions)
    console.print(table)
    console.print(_plugin_table([r.to_json() for r in loaded.reports]))
    if rows:
        table = Table(title="packages that backends for these devices ask for", title_justify="left")
        for column in ("package", "found", "backends", "what to do"):
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(row["requires"], row["found"] or "absent", ", ".join(row["backends"]), row["hint"])
        console.print(table)
    for name, texts in advice.items():
        for text in texts:
            console.print(f"[yellow]{name}[/]: {text}")
    if conflict:
        console.print(f"[red]conflict[/]: {conflict}")
    broken = [r for r in loaded.reports if r.status in ("failed", "incompatible")]
    console.print(f"[red]{len(broken)} plugin(s) do not work[/]" if broken else "[green]no plugin is broken[/]")


def _plugins_as_they_are() -> Plugins:
    """All plugins, probed and asked; what fails is reported here, not raised, strict or not."""
    loaded = load_plugins(strict=False)
    loaded.catalog(loaded.probe())
    return loaded


def _package_rows(catalog: Catalog, present: Installed) -> list[dict[str, Any]]:
    """Every requirement some backend of these devices has: what was found, who asks, what to do."""
    asks: dict[str, tuple[Requirement, set[str]]] = {}
    for d in catalog.devices.values():
        for b in d.backends:
            for r in b.requires:
                if isinstance(r, Requirement):
                    asks.setdefault(r.spec, (r, set()))[1].add(b.backend)
    rows = []
    for spec, (r, backends) in sorted(asks.items()):
        found = present.version(r, {})
        fits = found is not None and (not found or r.admits(found))
        hint = "" if fits else present.objection(r) or r.install or f"install {spec}"
        rows.append({"requires": spec, "found": found, "fits": fits, "backends": sorted(backends), "hint": hint})
    return rows


@cli.command()
@click.argument("a")
@click.argument("b")
@click.option("--json", "as_json", is_flag=True)
def diff(a: str, b: str, as_json: bool) -> None:
    """What differs between two saved decisions (``resolve --json``). Exits 1 when something does."""
    lines = differences(_read(a), _read(b))
    _report_differences(lines, as_json)


@cli.command(name="replay")
@click.argument("decision")
@click.option("--json", "as_json", is_flag=True)
def replay_command(decision: str, as_json: bool) -> None:
    """Ask a saved decision's question again, of the plugins installed now. Exits 1 when the answer changed."""
    old = _read(decision)
    new = replay(old, installed_plugins())
    _report_differences([] if new.digest == old.digest else differences(old, new), as_json)


def _read(path: str) -> Decision:
    try:
        return Decision.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as e:
        raise BadInputError(f"cannot read {path}: {e.strerror or e}") from None
    except UnicodeDecodeError:
        raise BadInputError(f"{path} is not a text file") from None


def _report_differences(lines: list[str], as_json: bool) -> None:
    if as_json:
        _print_json({"schema": SCHEMA, "same": not lines, "differences": lines})
    else:
        _print("\n".join(lines) if lines else "same decision")
    if lines:
        raise SystemExit(1)


def _refused(e: NoBackendError, as_json: bool) -> None:
    if as_json:
        error = {
            "code": e.code,
            "text": e.text,
            "rejections": [r.to_json() for r in e.rejections],
            "relaxations": list(e.relaxations),
        }
        _print_json({"schema": SCHEMA, "error": error})
    else:
        click.echo(e.text, err=True)


def main(args: list[str] | None = None) -> None:
    """Entry point: errors become one line on stderr and an exit status."""
    args = sys.argv[1:] if args is None else args
    try:
        with redirect_stdout(sys.stderr):  # whatever a plugin prints must not end up in the answer
            cli.main(args=args, prog_name="attn-core", standalone_mode=False)
    except NoBackendError as e:
        _refused(e, "--json" in args)
        raise SystemExit(3) from None
    except click.exceptions.Abort:
        raise SystemExit(130) from None
    except click.ClickException as e:
        click.echo(f"attn-core: {' '.join(e.format_message().split())}", err=True)
        raise SystemExit(2) from None
    except AttnCoreError as e:
        click.echo(f"attn-core: {' '.join(str(e).split())}", err=True)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
