"""Transformers whose attention exposes every tensor that a numeric fault can touch."""
