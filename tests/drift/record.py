"""Writes down what a host looks like now: ``python tests/drift/record.py HOST SITE_PACKAGES_OR_WHEEL``.

Run it after an integration has been adapted to a new version of its host; the difference of the recorded file is what
the host moved.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from seams import DISTRIBUTIONS, record
from shapes import MissingError, Sources

RECORDED = Path(__file__).parent / "recorded"


def main(host: str, root: str) -> None:
    if host not in DISTRIBUTIONS:
        raise SystemExit(f"unknown host {host!r}; hosts are {', '.join(DISTRIBUTIONS)}")
    sources = Sources(Path(root))
    if not sources.has(host):
        raise SystemExit(f"{root} holds no {host}; give a site-packages folder or a wheel")
    try:
        data = record(host, sources)
    except MissingError as e:
        raise SystemExit(f"{host} {sources.version(*DISTRIBUTIONS[host])}: {e}; adapt the integration first") from None
    path = RECORDED / f"{host}.json"
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"{path.name}: {len(data['seams'])} seams of {host} {data['version']}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2])
