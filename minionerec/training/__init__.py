"""Trains: losses, rewards, the SFT and RL trainers, and checkpoints that a run can resume from."""
