"""``make demo``: what this machine offers, what is decided for two models and why, and proof that the kernels work.

1. Probe the machine; list devices and plugins.
2. MiniLM with real weights through transformers: embeddings compared with eager attention.
3. A GPT-OSS-like decoder through a paged engine: every token compared with eager generation, and three wrong models
   whose tokens must differ.
4. What if: the same models, and the real gpt-oss-20b, on devices that are not here.

Exits non-zero when any comparison fails.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import minilm
import torch
from gpt_oss_tiny import generate_eager, make_model, make_prompts
from paged_engine import Stats, negative_controls, serve
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import GptOssConfig, GptOssForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from attn_core import AttnCoreError, BadInputError, Decision, ModelSpec, NoBackendError, Platform
from attn_core.integrations import transformers as hf
from attn_core.platform import get_platform, installed_plugins, simulate

MAX_DIFFERENCE = 1e-5
MIN_COSINE = 1 - 1e-6
MIN_DISTINCT_TOKENS = 20
DEVICES = ("cuda:sm_90", "cuda:sm_121", "rocm:gfx942", "musa:mp31", "ascend:910b")

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=not console.is_terminal)


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def show_machine() -> None:
    plugins = installed_plugins()
    found = table("devices", "device", "name", "memory", "instructions")
    for d in plugins.probe():
        memory = f"{d.total_memory / 2**30:.1f} GiB" if d.total_memory else "unknown"
        found.add_row(f"{d} #{d.index}", d.name, memory, " ".join(sorted(d.isa)))
    listed = table("plugins", "name", "distribution", "status", "what is wrong")
    for r in plugins.reports:
        listed.add_row(r.name, f"{r.dist} {r.version}", r.status, r.error or "")
    console.print(found, listed)


def platform_for(*models: ModelSpec) -> Platform:
    """This process's platform, or the CPU, saying why, where the platform has no kernels for these models here."""
    platform = get_platform()
    try:
        for model in models:
            platform.attention_backend(model)
    except AttnCoreError as e:
        if platform.name == "cpu":
            raise
        console.print(f"{platform.device} cannot run the demo's models, so the CPU does: {str(e).splitlines()[0]}")
        platform = get_platform("cpu")
    return platform


def explained(decision: Decision) -> None:
    console.print(decision.explain(), markup=False, style="dim", soft_wrap=True)


def run_minilm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Embeddings by attn-core against eager ones; what went wrong."""
    texts = minilm.sentences(32)
    with progress() as bar:
        task = bar.add_task("MiniLM, 32 sentences: eager, attn_core", total=2)
        expected = minilm.embed(model, tokenizer, texts)
        bar.advance(task)
        attn = hf.attach(model)
        found = minilm.agreement(minilm.embed(model, tokenizer, texts), expected)
        bar.advance(task)
    explained(attn.decision)
    shown = table("MiniLM: 32 sentences, attn_core against eager", "measure", "found", "bound")
    shown.add_row("largest difference of a component", f"{found.max_abs:.2e}", f"<= {MAX_DIFFERENCE:.0e}")
    shown.add_row("smallest cosine", f"{found.min_cosine:.9f}", f">= {MIN_COSINE}")
    console.print(shown)
    good = found.max_abs <= MAX_DIFFERENCE and found.min_cosine >= MIN_COSINE
    return [] if good else [f"MiniLM embeddings differ from eager: {found}"]


def run_engine(platform: Platform, model: GptOssForCausalLM) -> list[str]:
    """Tokens of the paged engine against eager generation, then the negative controls; what went wrong."""
    prompts = make_prompts(10)
    max_new = [12 + 3 * (i % 5) for i in range(len(prompts))]
    spec = ModelSpec.from_hf_config(model.config)
    wrong = negative_controls(spec)
    with progress() as bar:
        task = bar.add_task("eager generation, request by request", total=len(prompts))
        expected = []
        for prompt, n in zip(prompts, max_new):
            expected.append(generate_eager(model, prompt, n))
            bar.advance(task)

        def engine(name: str, asked: ModelSpec) -> tuple[list[list[int]], Stats]:
            task = bar.add_task(f"paged engine, {name}", total=sum(max_new))
            return serve(
                model, prompts, max_new, spec=asked, platform=platform, tick=lambda tokens: bar.advance(task, tokens)
            )

        got, stats = engine("as the config says", spec)
        outputs = {name: engine(name, changed)[0] for name, changed in wrong.items()}
    explained(platform.resolve(spec, page_size=4))

    tokens = {t for out in expected for t in out}
    longest = max(len(p) + n for p, n in zip(prompts, max_new))
    shown = table("GPT-OSS-like decoder in the paged engine", "what", "found")
    shown.add_row("requests, prompt lengths", f"{len(prompts)}, {sorted(map(len, prompts))}")
    shown.add_row("tokens made, distinct ones", f"{sum(max_new)}, {len(tokens)}")
    shown.add_row("longest context, sliding window", f"{longest}, {model.config.sliding_window}")
    shown.add_row("steps, of them decode and prompts mixed", f"{stats.steps}, {stats.mixed_steps}")
    shown.add_row("chunks of prompts, waits, preemptions", f"{stats.chunks}, {stats.waits}, {stats.preemptions}")
    for name, (size, demand, reused) in stats.pages.items():
        found = f"{size} in the pool, {demand} needed in all, {reused} handed out again"
        shown.add_row(f"pages of group {name}", found)
    console.print(shown)

    problems = []
    if len(tokens) < MIN_DISTINCT_TOKENS:
        problems.append(f"only {len(tokens)} distinct tokens: the comparison is too weak")
    compared = table("greedy tokens against transformers' eager generate", "model", "requests that agree", "wanted")
    compared.add_row("as the config says", f"{_equal(got, expected)} of {len(prompts)}", "all")
    if got != expected:
        problems.append("the paged engine's tokens differ from eager generation")
    for name, out in outputs.items():
        compared.add_row(f"control: {name}", f"{_equal(out, expected)} of {len(prompts)}", "fewer")
        if out == expected:
            problems.append(f"negative control {name!r} changed no token: the comparison cannot fail")
    console.print(compared)
    return problems


def _equal(a: Sequence[list[int]], b: Sequence[list[int]]) -> int:
    return sum(x == y for x, y in zip(a, b))


def what_if(models: dict[str, ModelSpec]) -> None:
    """The decisions elsewhere, with their reasons; a refusal with its first ones."""
    shown = table("what if: decided for devices that are not here, in bfloat16", "device", "model", "decision", "why")
    for device in DEVICES:
        try:
            platform = simulate(device)
        except BadInputError as e:
            shown.add_row(device, "", "unknown", str(e))
            shown.add_section()
            continue
        for name, model in models.items():
            try:
                decision = platform.resolve(model)
            except NoBackendError as e:
                shown.add_row(device, name, f"[red]{e.code}[/]", _first_lines(e.text, 4))
            else:
                shown.add_row(device, name, _brief(decision), _why(decision))
        shown.add_section()
    console.print(shown)


def _brief(decision: Decision) -> str:
    """Backends of each group (prefill / decode), then the values."""
    lines = []
    for name, group in decision.groups.items():
        chosen = [c for role, c in group.choices.items() if role in ("encode", "prefill", "decode")]
        padded = {f" {c.padded_from} -> {c.head_dim} wide" for c in chosen if c.padded_from}
        backends = " / ".join(dict.fromkeys(f"{c.backend} ({c.tier.name})" for c in chosen))
        lines.append(f"{name}: {backends}{''.join(padded)}")
    return "\n".join([*lines, ", ".join(f"{k} {v}" for k, v in decision.values.items())])


def _why(decision: Decision) -> str:
    """Reasons for the page size, and one against each of the first backends that were refused."""
    chosen = {c.backend for group in decision.groups.values() for c in group.choices.values()}
    against = [r for r in decision.rejections if r.backend not in chosen and r.field != "kind"]
    against.sort(key=lambda r: ("isa", "feature").index(r.code) if r.code in ("isa", "feature") else 2)
    refused: dict[str, str] = {}
    for r in against:
        refused.setdefault(r.backend, f"not {r.backend}: {r.text}")
    lines = [f"page size: {reason}" for reason in decision.because.get("page_size", ())[:1]]
    return "\n".join(_short(line) for line in [*lines, *list(refused.values())[:3]])


def _first_lines(text: str, count: int) -> str:
    lines = [_short(line) for line in text.splitlines() if line.strip()]
    return "\n".join([*lines[:count], *(["..."] if len(lines) > count else [])])


def _short(line: str, most: int = 100) -> str:
    return line if len(line) <= most else f"{line[: most - 3]}..."


def in_bfloat16(model: ModelSpec) -> ModelSpec:
    """As one would serve it on an accelerator."""
    return replace(model, groups={name: replace(g, dtype="bfloat16") for name, g in model.groups.items()})


def main() -> int:
    start = time.perf_counter()
    torch.set_num_threads(1)  # toy sizes: threads would mostly wait for each other
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()

    console.rule("1. this machine")
    show_machine()

    with progress() as bar:
        task = bar.add_task("loading models", total=2)
        encoder, tokenizer = minilm.load()
        bar.advance(task)
        decoder = make_model()
        bar.advance(task)
    small, tiny = (ModelSpec.from_hf_config(m.config) for m in (encoder, decoder))
    real = ModelSpec.from_hf_config(GptOssConfig(num_hidden_layers=24, num_local_experts=32, dtype="bfloat16"))
    platform = platform_for(small, tiny)
    encoder.to(platform.torch_device())
    decoder.to(platform.torch_device())

    console.rule("2. an encoder through transformers")
    problems = run_minilm(encoder, tokenizer)
    console.rule("3. a decoder in a paged engine")
    problems += run_engine(platform, decoder)
    console.rule("4. elsewhere")
    what_if({"MiniLM": in_bfloat16(small), "GPT-OSS tiny": in_bfloat16(tiny), "gpt-oss-20b": real})

    for problem in problems:
        console.print(f"[red]FAILED[/] {problem}")
    if not problems:
        console.print("[green]everything agrees[/]")
    console.print(f"{time.perf_counter() - start:.0f} s")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
