"""Runs in the probe process: imports the named plugins, asks each for its devices, answers one JSON line per plugin.

Started by file name with the request on stdin, so that it finds exactly the modules its parent would.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what plugins and their libraries print is noise, in Python and in C
    sys.stdout = sys.stderr
    request = json.load(sys.stdin)
    sys.path[:] = request["path"]

    from attn_core.plugins.guard import ContainedError, Hooks, load
    from attn_core.spec import Device

    for name, reference in request["plugins"].items():
        answer: dict[str, object] = {"plugin": name}
        try:
            devices = Hooks(load(reference)).collect("attn_probe_devices", Device)
            answer["devices"] = [{**d.to_json(), "bus_id": d.bus_id} for d in devices]
        except ContainedError as e:
            answer.update(error=str(e), hint=e.hint)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    os._exit(0)  # neither a thread a probe left behind nor a library's exit handler may spoil the answers


if __name__ == "__main__":
    main()
