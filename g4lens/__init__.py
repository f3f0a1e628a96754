"""A faithful, hookable Gemma 4: open its activations on text, pictures and sound."""

__version__ = "0.1.0"
