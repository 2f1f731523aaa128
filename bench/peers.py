"""What a benchmark compares with has to be there."""
import importlib.util

from nanollm.config import UserError


def need(*libraries):
    """Raises UserError, before anything is measured, unless all of them are installed."""
    if missing := [name for name in libraries if importlib.util.find_spec(name) is None]:
        raise UserError(f"this compares with {' and '.join(missing)}, not installed here: pip install -e \".[test]\"")
