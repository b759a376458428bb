"""Condenses a folder of extracted vendor contracts into ``contracts/*.json``: names, kinds, signatures, nothing else.

    python tests/simulators/condense.py FOLDER                        # refresh every file from its source
    python tests/simulators/condense.py FOLDER --check                # exit 1 when one of them no longer agrees
    python tests/simulators/condense.py FOLDER --new NAME SOURCE.json[:VARIANT] FUNCTION...

A condensed file says where it comes from (``source``) and lists the functions it wants; limits and quirks are added by
hand beside them and kept. Source files come in two forms: ``functions`` at the top, or one block per build under
``variants``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent / "contracts"


def condense(folder: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """``facts`` with what the source says today of the functions it lists."""
    doc = json.loads((folder / facts["source"]["file"]).read_text(encoding="utf-8"))
    variant = facts["source"].get("variant")
    block = doc["variants"][variant] if variant else doc
    found = block["functions"]
    return {
        "distribution": block.get("distribution") or doc.get("distribution") or doc["package"],
        "version": block.get("version") or doc.get("version") or block.get("commit", "")[:12],
        "source": facts["source"],
        "functions": {name: _entry(name, found[name], found) for name in facts["functions"]},
        **{key: facts[key] for key in ("aliases", "limits", "quirks") if key in facts},
    }


def _entry(name: str, entry: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    if "alias_of" in entry:
        entry = found[entry["alias_of"]]
    return {"kind": _kind(name, entry, found), "signature": _signature(entry["parameters"])}


def _kind(name: str, entry: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    if "constructor_of" in entry:
        return "class"
    if "staticmethod" in entry.get("decorators", ()) or "classmethod" in entry.get("decorators", ()):
        return "static"
    if entry.get("kind") in ("method", "torch_op"):
        return str(entry["kind"])
    owner = name.rpartition(".")[0]
    return "method" if owner.rpartition(".")[2][:1].isupper() or owner in found else "function"


def _signature(parameters: list[Mapping[str, Any]]) -> str:
    """Parameters as Python writes them. One that is required after an optional one (torch schemas) goes by keyword."""
    optional = False
    groups: dict[str, list[str]] = {"/": [], "": [], "*": [], "*,": [], "**": []}
    codes = {"POSITIONAL_ONLY": "/", "VAR_POSITIONAL": "*", "KEYWORD_ONLY": "*,", "VAR_KEYWORD": "**"}
    for p in parameters:
        code, default = codes.get(p["kind"], ""), p.get("default")
        if code in ("", "/"):
            optional |= default is not None
            code = "*," if optional and default is None else code
        groups[code].append(p["name"] + ("" if default is None else f"={default}"))
    out = [*groups["/"], *(["/"] if groups["/"] else []), *groups[""], *(f"*{n}" for n in groups["*"])]
    if groups["*,"]:
        out += [*([] if groups["*"] else ["*"]), *groups["*,"]]
    return f"({', '.join([*out, *(f'**{n}' for n in groups['**'])])})"


def text(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 where a file differs")
    parser.add_argument("--new", nargs="+", metavar=("NAME", "SOURCE"), help="NAME SOURCE.json[:VARIANT] FUNCTION...")
    given = parser.parse_args()
    if given.new:
        name, source, *functions = given.new
        file, _, variant = source.partition(":")
        facts = {"source": {"file": file, **({"variant": variant} if variant else {})}, "functions": functions}
        (HERE / f"{name}.json").write_text(text({**condense(given.folder, facts), "limits": {}, "quirks": {}}), "utf-8")
        return 0
    stale = []
    for path in sorted(HERE.glob("*.json")):
        before = json.loads(path.read_text(encoding="utf-8"))
        if "file" not in before["source"]:  # written by hand: says what was read
            continue
        after = condense(given.folder, before)
        if after != before:
            stale.append(path.name)
            if not given.check:
                path.write_text(text(after), encoding="utf-8")
    print(", ".join(stale) or "all agree")
    return int(given.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
