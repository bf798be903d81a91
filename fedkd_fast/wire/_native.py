"""The extension module, or which command builds it."""

try:
    import fedkd_fast._C as _C
except ModuleNotFoundError as error:
    if error.name != "fedkd_fast._C":
        raise
    raise ImportError(
        "fedkd_fast._C is not built: run `pip install -e . --no-build-isolation` in the checkout",
        name=error.name,
    ) from error

__all__ = ["_C"]
