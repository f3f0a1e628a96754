"""The decoder, the two towers, and the model that joins them."""
