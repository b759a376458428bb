"""SGLang's own argument resolution with attn-core in it: what is fed, pinned, refused, left alone. No engine runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from attn_core.errors import AttnCoreError, NoBackendError
from attn_core.integrations.sglang import NAME

BACKENDS = ("attention_backend", "prefill_attention_backend", "decode_attention_backend")


@pytest.fixture(scope="module")
def resolve(model: Callable[[str], Any]) -> Callable[..., Any]:
    """``resolve(model, **server arguments)`` gives the resolved record."""
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    load_plugins()

    def run(name: str, **arguments: Any) -> Any:
        common = {"device": "cpu", "skip_tokenizer_init": True, "dtype": "float32", "context_length": 256}
        args = ServerArgs(model_path=str(model(name).folder), **common, **arguments)
        args.resolve_once()
        return args

    return run


def values(args: Any, *names: str) -> list[Any]:
    from sglang.srt.arg_groups.overrides import resolution_result

    return [resolution_result(args, name) for name in names]


def sources(args: Any, field: str) -> list[tuple[str, Any]]:
    """SGLang's own record of who declared a field, in order."""
    return [(source, fields[field]) for source, fields in args._resolved_overrides if field in fields]


def test_the_platform_is_ours_and_its_default_is_our_backend(resolve: Callable[..., Any]) -> None:
    from sglang.srt.platforms import current_platform

    args = resolve("llama")
    assert type(current_platform).__module__ == "attn_core.integrations.sglang.cpu"
    assert current_platform.is_out_of_tree()
    assert values(args, *BACKENDS) == [NAME, None, None]


def test_page_size_and_cache_dtype_come_from_the_decision(resolve: Callable[..., Any]) -> None:
    """Before SGLang's own default, which is page 1, could fill them."""
    args = resolve("llama")
    assert sources(args, "page_size") == [(NAME, 16)]
    assert sources(args, "kv_cache_dtype") == [(NAME, "auto")]


def test_pins_stay(resolve: Callable[..., Any]) -> None:
    args = resolve("gpt_oss", page_size=8, kv_cache_dtype="fp8_e4m3")
    assert values(args, "page_size", "kv_cache_dtype") == [8, "fp8_e4m3"]


def test_graphs_are_off(resolve: Callable[..., Any]) -> None:
    (config,) = values(resolve("llama"), "cuda_graph_config")
    assert (config.decode.backend, config.prefill.backend) == ("disabled", "disabled")


def test_deterministic_inference_is_asked_of_the_kernels(resolve: Callable[..., Any]) -> None:
    assert values(resolve("llama", enable_deterministic_inference=True), "attention_backend") == [NAME]


def test_what_no_kernel_can_do_is_refused_with_reasons(resolve: Callable[..., Any]) -> None:
    with pytest.raises(NoBackendError, match=r"pinned kv_cache_dtype=nvfp4; accepted: .*float32"):
        resolve("llama", kv_cache_dtype="nvfp4")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"enable_hierarchical_cache": True}, "--enable-hierarchical-cache=True is not supported"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap=True is not supported"),
        ({"disaggregation_mode": "decode"}, "--disaggregation-mode=decode is not supported"),
        ({"decode_attention_backend": NAME}, "serves both phases"),
        ({"attention_backend": NAME, "prefill_attention_backend": "triton"}, "serves both phases"),
    ],
)
def test_what_the_integration_cannot_do_is_refused(
    resolve: Callable[..., Any], arguments: dict[str, Any], told: str
) -> None:
    with pytest.raises(AttnCoreError, match=told):
        resolve("llama", **arguments)


def test_gpt_oss_passes_its_allow_list_by_a_stand_in(resolve: Callable[..., Any]) -> None:
    """Which SGLang's own record names."""
    args = resolve("gpt_oss")
    assert sources(args, "attention_backend") == [(NAME, NAME), (f"{NAME}: stand-in", "triton"), (NAME, NAME)]


def test_the_allow_list_still_holds_for_others(resolve: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError, match="GptOssForCausalLM requires one of"):
        resolve("gpt_oss", attention_backend="torch_native")


def test_other_backends_are_left_alone(resolve: Callable[..., Any]) -> None:
    """On our platform too: SGLang decides for its own."""
    args = resolve("llama", attention_backend="torch_native")
    assert values(args, "attention_backend", "page_size") == ["torch_native", 1]
    assert not [source for source, _ in args._resolved_overrides if source.startswith(NAME)]


RESOLVED = """
import json, sys
import no_cuda_torchvision
from sglang.srt.arg_groups.arg_utils import field_names
from sglang.srt.arg_groups.overrides import resolution_result
from sglang.srt.platforms import current_platform
from sglang.srt.plugins import load_plugins
from sglang.srt.server_args import ServerArgs
load_plugins()
args = ServerArgs(model_path=sys.argv[1], device="cpu", skip_tokenizer_init=True, dtype="float32", random_seed=1)
args.resolve_once()
changing = ("port", "nccl_port")
found = {n: repr(resolution_result(args, n)) for n in sorted(field_names(ServerArgs)) if n not in changing}
print("ANSWER", json.dumps([type(current_platform).__module__, found]))
"""


def test_being_installed_changes_nothing(model: Callable[[str], Any]) -> None:
    """Without SGLANG_PLATFORM: the same arguments as with every plugin switched off."""
    answers = []
    for plugins in ({}, {"SGLANG_PLUGINS": "none"}):
        environment = {k: v for k, v in os.environ.items() if k != "SGLANG_PLATFORM"} | plugins
        done = subprocess.run(
            [sys.executable, "-c", RESOLVED, str(model("llama").folder)], env=environment, cwd=Path(__file__).parent,
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        told = [line for line in done.stdout.splitlines() if line.startswith("ANSWER ")]
        assert told, done.stderr[-3000:]
        answers.append(json.loads(told[0].removeprefix("ANSWER ")))
    assert answers[0] == answers[1]
    assert answers[0][0].startswith("sglang.")
