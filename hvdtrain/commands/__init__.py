"""What is done with a run once it is trained."""
