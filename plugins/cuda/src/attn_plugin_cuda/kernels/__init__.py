"""Adapters: one file per backend, each with a ``bind`` that the rows name. Imported only when a backend is bound.

What holds for all of them:

* Everything known at bind is fixed there. A call passes tensors and the step's plan on to the vendor's function and
  decides nothing.
* What a step needs lies on the plan that ``plan`` returns. Modules, classes and functions keep no state, so two groups,
  devices or batches in flight cannot meet.
* Streams and devices come from the tensors; nothing here asks the runtime for a current device.
* Vendors' packages are imported in ``bind`` only, by :func:`attn_core.adapters.load`.
"""
