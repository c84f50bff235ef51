"""swarmtrain: people with ordinary machines behind ordinary connections train one model together."""

__all__ = ["__version__"]

__version__ = "0.2.0"
