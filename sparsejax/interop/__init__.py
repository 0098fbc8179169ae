"""Checkpoints and configurations of other projects, both ways."""
