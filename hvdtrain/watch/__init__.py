"""What a run says of itself, and who looks after it."""
