"""What a checkpoint is worth: held-out loss and bits per byte per domain."""
