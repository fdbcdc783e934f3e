"""LPCAM: class activation maps from non-discriminative features as well."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpcam.explain.explainer import LPCAM

__all__ = ["LPCAM"]


def __getattr__(name: str) -> Any:
    """Import torch only when ``LPCAM`` is used, so that the command line answers at once."""
    if name == "LPCAM":
        from lpcam.explain.explainer import LPCAM

        return LPCAM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
