"""``attn-core resolve --fleet``: exit statuses, one object on stdout, and all of it without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from attn_core.fleet import FleetDecision

GPT_OSS = str(Path(__file__).parents[2] / "data" / "models" / "gpt-oss-20b.json")
TWO = {"ranks": [{"device": "cuda:h200", "count": 8}, {"device": "rocm:mi300x", "count": 2}]}

BLOCKED = """
import sys
class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, NoTorch())
from attn_core.cli import main
main()
"""


def run(folder: Path, fleet: object, *args: str, command: str = "resolve") -> subprocess.CompletedProcess[str]:
    path = folder / "fleet.json"
    path.write_text(fleet if isinstance(fleet, str) else json.dumps(fleet))
    line = [sys.executable, "-c", BLOCKED, command, "--fleet", str(path), "--model", GPT_OSS, *args]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def test_answers_as_json_and_as_text(tmp_path: Path) -> None:
    out = run(tmp_path, TWO, "--json")
    assert out.returncode == 0, out.stderr
    data = json.loads(out.stdout)
    assert (data["schema"], data["ranks"], len(data["kinds"])) == (1, 10, 2)
    assert data["kinds"][1]["ranks"] == [[8, 9]]
    assert {"page_size", "kv_cache_dtype", "kv_layout"} <= data["values"].keys()
    fleet = FleetDecision.from_json(out.stdout)
    text = run(tmp_path, TWO)
    assert text.returncode == 0
    assert "on ranks 0 to 7 (cuda:sm_90)" in text.stdout
    assert f"10 ranks of 2 kinds\ndigest {fleet.digest}" in text.stdout
    told = run(tmp_path, TWO, command="explain")
    assert f"10 ranks of 2 kinds   [{fleet.digest}]" in told.stdout
    assert run(tmp_path, TWO, command="explain").stdout == told.stdout


def test_nothing_fits_exits_3_and_names_the_ranks(tmp_path: Path) -> None:
    out = run(tmp_path, TWO, "--backend", "fa3", "--json")
    assert out.returncode == 3
    error = json.loads(out.stdout)["error"]
    assert error["code"] == "no_backend"
    assert all(r["ranks"] == "ranks 8, 9 (rocm:gfx942)" for r in error["rejections"])
    assert any(r.startswith("without ranks 8, 9 (rocm:gfx942): ") for r in error["relaxations"])
    text = run(tmp_path, TWO, "--backend", "fa3")
    assert (text.returncode, text.stdout) == (3, "")
    assert "ranks 8, 9 (rocm:gfx942)" in text.stderr


@pytest.mark.parametrize(
    ("fleet", "args", "says"),
    [
        ("{not json", (), "fleet.json: is not JSON"),
        ({"ranks": [{"device": "cuda:h900"}]}, (), "unknown device 'cuda:h900'"),
        ({"ranks": [{"device": "cuda:h200", "roles": ["prefill"]}]}, (), "no rank runs decode"),
        (TWO, ("--device", "cuda:h200"), "--fleet says which devices"),
        (TWO, ("--without", "cuda"), "--fleet says which devices"),
        (TWO, ("--page-size", "-1"), "page_size=-1"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path: Path, fleet: object, args: tuple[str, ...], says: str) -> None:
    out = run(tmp_path, fleet, *args)
    assert (out.returncode, out.stdout) == (2, "")
    (line,) = out.stderr.strip().splitlines()
    assert line.startswith("attn-core: ")
    assert says in line


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    line = [sys.executable, "-c", BLOCKED, "resolve", "--fleet", str(tmp_path / "no.json"), "--model", GPT_OSS]
    out = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    assert out.returncode == 2
    assert "no.json: cannot be read: No such file" in out.stderr
