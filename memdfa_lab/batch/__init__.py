"""Many notebooks or training runs in one command."""
