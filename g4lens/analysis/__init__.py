"""What is measured on a model, one method a file."""
