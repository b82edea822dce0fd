"""Several processes: launching them, and checkpoints that outlive them."""
