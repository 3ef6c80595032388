"""What `self_check` tries: attempts from inside, trials from outside, and traps that show that they can fail."""
