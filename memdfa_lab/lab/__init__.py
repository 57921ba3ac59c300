"""One experiment: its settings, data, network, training, checkpoints and measurements."""
