"""Conversion of checkpoints and configurations from and to other projects."""
