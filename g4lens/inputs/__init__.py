"""Text, pictures and sounds into what a model reads."""
