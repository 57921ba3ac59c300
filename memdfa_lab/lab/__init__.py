"""One experiment: its settings, data, network, training, checkpoints, and what is measured of it."""
