"""``attn-core bench``."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from attn_core.bench.shapes import KINDS, SIZES, Shape, chosen
from attn_core.errors import BadInputError
from attn_core.spec.check import DTYPES, KV_CACHE_DTYPES

if TYPE_CHECKING:
    from attn_core.platform import Platform

PEAK_SIZES = {"smoke": (1 << 20, 64), "small": (1 << 28, 1024), "large": (1 << 30, 8192)}
"""Size -> bytes of the copy and side of the matrices that find the device's peaks."""


@click.command()
@click.option("--shapes", default="", help=f"comma-separated, of {', '.join(KINDS)}; default: all")
@click.option("--size", type=click.Choice(SIZES), help="default: small on a CPU, large on an accelerator")
@click.option("--backend", "backends", multiple=True, help="only this one (repeatable); default: all declared here")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="of q, k, v and out")
@click.option("--kv-cache-dtype", type=click.Choice(KV_CACHE_DTYPES), help="of the cache; default: the same")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: torch's own choice")
@click.option(
    "--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="also write the figures here"
)
@click.option("--plot", "plot_path", type=click.Path(dir_okay=False, path_type=Path), help="draw rooflines here")
@click.option("--reasons", is_flag=True, help="also list who was not timed, and why")
def bench(
    shapes: str, size: str | None, backends: tuple[str, ...], dtype: str, kv_cache_dtype: str | None,
    threads: int | None, json_path: Path | None, plot_path: Path | None, reasons: bool,
) -> None:  # fmt: skip
    """Time every backend that runs here, on the same inputs, after checking its answers against float64.

    Exits 1 when an answer is wrong or a kernel fails.
    """
    try:
        import torch
    except ImportError:
        raise BadInputError("bench needs torch: pip install 'attn-core[torch]'") from None
    from attn_core.bench import measure, plot, report
    from attn_core.bench.run import STATUSES, TROUBLE, Figure, figures
    from attn_core.cli import answer
    from attn_core.platform import get_platform

    if plot_path is not None:
        plot.require()
    platform = get_platform()
    size = size or ("small" if platform.name == "cpu" else "large")
    wanted = chosen(size, dtype, tuple(filter(None, (s.strip() for s in shapes.split(",")))))
    _known(platform, wanted, backends)
    if threads is not None:
        torch.set_num_threads(threads)
    quick: dict[str, Any] = {"rounds": 3, "least": 0.001} if size == "smoke" else {}
    copy_bytes, matmul_size = PEAK_SIZES[size]
    found: list[Figure] = []
    console = Console(stderr=True)
    with Progress(
        SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), console=console, transient=True
    ) as bar:
        task = bar.add_task("measuring what the device can do", total=None)
        peaks = measure.peaks(platform, getattr(torch, dtype), copy_bytes=copy_bytes, matmul_size=matmul_size)
        for part in figures(
            platform, wanted, backends, peaks, kv_cache_dtype=kv_cache_dtype,
            progress=lambda text: bar.update(task, description=text), **quick,
        ):  # fmt: skip
            found += part
    title = (
        f"{platform.device} {platform.device.name} {dtype}: copy {peaks.copy / 1e9:.3g} GB/s, "
        f"matmul {peaks.matmul / 1e9:.4g} GFLOP/s (measured)"
    )
    out = Console(file=answer(), width=None if answer().isatty() else 130, highlight=False)
    out.print(report.timed(found, title))
    left_out = report.others(found, STATUSES[1:] if reasons else TROUBLE)
    if left_out is not None:
        out.print(left_out)
    if json_path is not None:
        about = {
            "device": platform.device.to_json(), "dtype": dtype, "size": size, "threads": torch.get_num_threads(),
            "versions": {"attn-core": metadata.version("attn-core"), "torch": torch.__version__},
        }  # fmt: skip
        json_path.write_text(json.dumps(report.to_json(found, peaks, about), indent=2) + "\n", encoding="utf-8")
    if plot_path is not None:
        plot.draw(found, peaks, title, plot_path)
    if any(f.status in TROUBLE for f in found):
        raise SystemExit(1)


def _known(platform: Platform, shapes: tuple[Shape, ...], backends: tuple[str, ...]) -> None:
    from attn_core.bench.case import candidates

    known = sorted({b for s in shapes for b in candidates(platform, s.role)})
    for name in backends:
        if name not in known:
            raise BadInputError(
                f"--backend {name}: nobody declares it for {platform.device}; known: {', '.join(known)}"
            )
