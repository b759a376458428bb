"""Run the benchmarks: ``python benchmarks/run.py [SET ...] [--gate] [--json FILE]``.

Figures are medians with their spread. ``--gate`` exits 1 when a figure misses its limit, and refuses to judge (exit 2)
when the machine's load exceeds its cores.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")
sys.path.insert(0, str(Path(__file__).parent))

import click
from harness import Result, busy
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

SETS = (
    "resolve",
    "vendors",
    "fleet",
    "overhead",
    "adapters",
    "torch_ops",
    "hf_paged",
    "cpu",
    "vllm_cpu",
    "transformers",
)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(SETS))
@click.option("--gate", is_flag=True, help="exit 1 when a figure misses its limit")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="also write the figures here")
def main(names: tuple[str, ...], gate: bool, json_path: str | None) -> None:
    console = Console(width=None if sys.stdout.isatty() else 130)
    why = busy()
    if gate and why:
        console.print(f"not judged: {why}; try again on a quiet machine")
        raise SystemExit(2)
    results: list[Result] = []
    with Progress(SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("starting", total=None)
        for name in names or SETS:
            for f in __import__(f"bench_{name}").ALL:
                progress.update(task, description=f"{name}: {f.__name__}")
                for r in f():
                    results.append(r)
                    progress.update(task, description=f"{name}: {r.name}")
    table = Table(title="median [lowest, highest]" + (f"; {why}" if why else ""), title_justify="left")
    for column in ("figure", "value", "spread", "limit", "", "note"):
        table.add_column(column, overflow="fold")
    for r in results:
        limit = "" if r.limit is None else f"{'<=' if r.at_most else '>='} {r.limit:g}"
        verdict = {None: "", True: "[green]ok[/]", False: "[red]missed[/]"}[r.ok]
        table.add_row(
            r.name,
            f"{r.value:.3g} {r.unit}",
            f"[{r.low:.3g}, {r.high:.3g}]".replace("[", r"\["),
            limit,
            verdict,
            r.note,
        )
    console.print(table)
    if json_path:
        Path(json_path).write_text(json.dumps([r.to_json() for r in results], indent=2) + "\n", encoding="utf-8")
    if gate and any(r.ok is False for r in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
