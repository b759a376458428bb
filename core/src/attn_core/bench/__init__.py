"""``attn-core bench``: every backend that can be bound here, on the same inputs, checked before it is timed.

``shapes`` what is asked; ``case`` one shape bound to one backend; ``check`` its answer against float64; ``measure``
seconds, and what the device can do at best; ``report`` table and JSON; ``plot`` rooflines; ``command`` the CLI.
"""
