"""Adapters to the vendors' kernels, one file per backend. Imported when a decision is bound, never before."""
