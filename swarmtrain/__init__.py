"""swarmtrain: people with ordinary machines behind ordinary connections train one model together."""

__all__ = ["__version__"]

__version__ = "0.1.0"
