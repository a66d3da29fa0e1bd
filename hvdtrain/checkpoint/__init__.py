"""Checkpoints: written beside their final name, listed with digests last, loaded on any rank count."""
