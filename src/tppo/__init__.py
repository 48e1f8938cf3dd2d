"""tppo: token-level proximal policy optimization for query generation."""

__version__ = "0.1.0"
