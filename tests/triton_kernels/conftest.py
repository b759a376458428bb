"""Interpreter and compiler exclude each other in a process: Triton looks at TRITON_INTERPRET when a kernel is defined.

So the tests under ``interpreted`` are collected only in the process that ``test_interpreter.py`` starts for them.
"""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]
