"""Every error attn-core raises on purpose. Each says what was asked, found, allowed, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attn_core.spec import Rejection


class AttnCoreError(Exception):
    """Base of all deliberate errors."""


class BadInputError(AttnCoreError, ValueError):
    """The question itself is wrong: an unknown device, a bad size, an unreadable model file.

    The text is one sentence; the command line prints it and exits with 2.
    """


class DeclarationError(BadInputError):
    """A plugin's declaration is not valid vocabulary. Costs that plugin only."""


class PluginError(AttnCoreError):
    """A plugin failed and ``ATTN_CORE_STRICT=1`` (or the user naming it) makes that fatal."""


class BindError(AttnCoreError):
    """A decision cannot be turned into kernels here (simulated device, missing kernel, no ``bind``)."""


class MissingKernelError(BindError):
    """Raised by a plugin's ``bind`` when the kernel package is absent or unusable; the core resolves again without the
    rows that name this ``bind``. Other rows of the backend stay: they may stand for another package's kernel.

    ``backend`` and ``bind`` are filled in by the core: the function need only say what is missing.
    """

    backend: str | None = None
    bind: str | None = None
    """``module:function``, as the row names it."""


class NoBackendError(AttnCoreError):
    """Nothing fits (``no_backend``), or only a reference backend would (``reference_only``).

    ``rejections`` holds every reason as data, ``relaxations`` what each single pin costs.
    """

    def __init__(self, code: str, text: str, rejections: Sequence[Rejection], relaxations: Sequence[str]) -> None:
        super().__init__(text)
        self.code = code
        self.text = text
        self.rejections = tuple(rejections)
        self.relaxations = tuple(relaxations)
