"""One small daemon that makes a machine with language models a hosted AI provider."""

__version__ = "0.1.0"
