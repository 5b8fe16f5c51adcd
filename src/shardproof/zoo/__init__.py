"""Known bugs of parallel training as small experiments, and right code that must pass."""
