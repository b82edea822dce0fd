"""What travels with a checkpoint: this folder is flat and imports torch and transformers only."""
